from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from folora.covariance import read_moments
from folora.errors import FoLoRAError
from folora.layers import adapted_layers
from folora.pencil import normalise
from folora.spectrum import compute_spectrum, read_spectrum
from folora.storage import read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Pipeline, Refused, SaveParams

    from folora.params import Params


def test_spectrum_solves_the_pencil_of_its_moments(pipeline: Pipeline) -> None:
    spectrum = read_spectrum(pipeline.spectrum, **pipeline.base.identity)
    shrinkage = pipeline.params.spectrum.shrinkage
    for name, one in spectrum.inputs.items():
        C_p, C_t = normalise(one.penalty.double(), shrinkage), normalise(one.utility.double())
        V = one.basis.double()
        penalty, utility = V.mT @ C_p @ V, V.mT @ C_t @ V
        scale = float(penalty.diagonal().mean())
        identity = torch.eye(len(V), dtype=V.dtype)
        torch.testing.assert_close(penalty / scale, identity, rtol=0, atol=1e-3, msg=name)
        torch.testing.assert_close(utility / scale, one.eigenvalues.diag(), rtol=1e-3, atol=2e-3 * len(V), msg=name)
        assert (one.eigenvalues.diff() >= 0).all()
        assert one.eigenvalues[0] >= 0


def test_moments_are_means_over_all_shards(pipeline: Pipeline) -> None:
    shards = [read_tensors(pipeline.proxy_moments / f"{shard}.safetensors") for shard in (0, 1)]
    tokens = sum(manifest["tokens"] for _, manifest in shards)
    task, task_manifest = read_tensors(pipeline.task_moments)
    _, manifest = read_tensors(pipeline.spectrum)
    assert (manifest["proxy_tokens"], manifest["task_tokens"]) == (tokens, task_manifest["tokens"])
    for name, one in read_spectrum(pipeline.spectrum).inputs.items():
        mean = (shards[0][0][name] + shards[1][0][name]) / tokens
        torch.testing.assert_close(one.penalty.double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one.utility.double(), task[name] / task_manifest["tokens"], rtol=1e-6, atol=1e-6)


def test_every_adapted_layer_is_in_one_group(pipeline: Pipeline) -> None:
    spectrum = read_spectrum(pipeline.spectrum)
    layers = adapted_layers(pipeline.base.load_model(), "all-linear")
    assert sorted(name for names in spectrum.groups.values() for name in names) == sorted(layers)
    for leader, names in spectrum.groups.items():
        assert {layers[name].in_features for name in names} == {len(spectrum.inputs[leader].eigenvalues)}
    _, manifest = read_tensors(pipeline.spectrum)
    assert manifest["health"].keys() == spectrum.groups.keys()
    assert all(health["residual"] < 1e-8 for health in manifest["health"].values())


def test_same_moments_give_the_same_bytes(pipeline: Pipeline, tmp_path: Path) -> None:
    inputs = (pipeline.params, "subtraction", "sampled", pipeline.base, pipeline.proxy_moments, pipeline.task_moments)
    compute_spectrum(*inputs, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == pipeline.spectrum.read_bytes()


def test_spectrum_of_another_task_is_refused(pipeline: Pipeline) -> None:
    task = pipeline.params.tasks["subtraction"].model_copy(update={"max_length": 31})
    with pytest.raises(FoLoRAError, match=r"subtraction/sampled\.safetensors: made with task "):
        read_spectrum(pipeline.spectrum, task=task.model_dump())


def rewrite(path: Path, change: Callable[[dict, dict], object]) -> None:
    tensors, manifest = read_tensors(path)
    change(tensors, manifest)
    write_tensors(path, tensors, manifest)


def first(tensors: dict) -> str:
    return next(iter(sorted(tensors)))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "model": (lambda p: rewrite(p, lambda _, m: m.update(model="0")), "made with model 0, but "),
    "tokenizer": (lambda p: rewrite(p, lambda _, m: m.update(tokenizer="0")), "made with tokenizer 0, but "),
    "temperature": (
        lambda p: rewrite(p, lambda _, m: m["proxy"]["source"].update(temperature=2.0)),
        "made with proxy {",
    ),
    "positions": (lambda p: rewrite(p, lambda _, m: m.update(positions="without_first")), "made with positions wi"),
    "groups": (lambda p: rewrite(p, lambda _, m: m["groups"].popitem()), "made with groups {"),
    "format": (lambda p: rewrite(p, lambda _, m: m.update(format=0)), "made with format 0, but 1 is expected"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "damaged or truncated"),
    "nan": (lambda p: rewrite(p, lambda t, _: t[first(t)].fill_(float("nan"))), "holds NaN or infinite values"),
    "missing": (lambda p: p.unlink(), "not found: run the stage"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_shard_is_one_line(
    damage: str, pipeline: Pipeline, save_params: SaveParams, tmp_path: Path, refused: Refused
) -> None:
    copy = pipeline.copy(tmp_path / "copy")
    shard = copy.proxy_moments / "1.safetensors"
    act, expected = DAMAGES[damage]
    act(shard)
    arguments = ("--proxy-moments", copy.proxy_moments, "--task-moments", copy.task_moments, "--threads", 1)
    line = refused(
        "spectrum",
        "subtraction",
        "sampled",
        "--foundation",
        copy.foundation,
        *arguments,
        "--params",
        save_params(copy.values()),
    )
    assert line.startswith(f"{shard}: ")
    assert expected in line


def test_moments_of_another_parameter_set_are_refused(
    pipeline: Pipeline, save_params: SaveParams, refused: Refused
) -> None:
    values = pipeline.values()
    values["proxy"]["sequences"] = 97
    arguments = ("--proxy-moments", pipeline.proxy_moments, "--task-moments", pipeline.task_moments, "--threads", 1)
    arguments = ("spectrum", "subtraction", "sampled", "--foundation", pipeline.foundation, *arguments)
    line = refused(*arguments, "--params", save_params(values))
    assert line.startswith(f"{pipeline.proxy_moments / '0.safetensors'}: made with proxy ")
    values = pipeline.values()
    values["tasks"]["subtraction"]["response"] = "{{ response }}!"
    line = refused(*arguments, "--params", save_params(values))
    assert line.startswith(f"{pipeline.task_moments}: made with task ")


def test_shards_may_not_differ_from_the_first(pipeline: Pipeline, tmp_path: Path) -> None:
    copy = pipeline.copy(tmp_path / "copy")
    rewrite(copy.proxy_moments / "1.safetensors", lambda _, m: m["groups"].popitem())
    with pytest.raises(FoLoRAError, match=r"1\.safetensors: made with groups"):
        read_moments([(copy.proxy_moments / "0.safetensors", {}), (copy.proxy_moments / "1.safetensors", {})])


def test_shrinkage_is_used(pipeline: Pipeline, tmp_path: Path) -> None:
    def largest(shrinkage: float) -> float:
        section = pipeline.params.spectrum.model_copy(update={"shrinkage": shrinkage})
        params: Params = pipeline.params.model_copy(update={"spectrum": section})
        inputs = (params, "subtraction", "sampled", pipeline.base, pipeline.proxy_moments, pipeline.task_moments)
        compute_spectrum(*inputs, tmp_path / str(shrinkage))
        return max(float(one.eigenvalues[-1]) for one in read_spectrum(tmp_path / str(shrinkage)).inputs.values())

    assert largest(0.001) > largest(0.01) > largest(0.5)
