from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch

from folora.covariance import StoredMoments
from folora.errors import FoLoRAError
from folora.layers import adapted_layers
from folora.pencil import normalise
from folora.spectrum import compute_spectrum, read_spectrum
from folora.stability import gate_difference, tokens_needed
from folora.storage import read_tensors, write_tensors
from folora.triangle import whole_of

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
        width = task_manifest["widths"][name]
        penalty = whole_of(shards[0][0][name] + shards[1][0][name], width) / tokens
        utility = whole_of(task[name], width) / task_manifest["tokens"]
        torch.testing.assert_close(one.penalty.double(), penalty, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one.utility.double(), utility, rtol=1e-6, atol=1e-6)


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
    moments = (pipeline.proxy_moments, pipeline.task_moments)
    inputs = (pipeline.params, "subtraction", "sampled", 0, pipeline.base, *moments)
    compute_spectrum(*inputs, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == pipeline.spectrum.read_bytes()


def test_spectrum_of_another_task_is_refused(pipeline: Pipeline) -> None:
    task = pipeline.params.tasks["subtraction"].model_copy(update={"max_length": 31})
    with pytest.raises(FoLoRAError, match=r"sampled/0\.safetensors: made with task "):
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
        0,
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
    arguments = ("spectrum", "subtraction", "sampled", 0, "--foundation", pipeline.foundation, *arguments)
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
        StoredMoments([(copy.proxy_moments / "0.safetensors", {}), (copy.proxy_moments / "1.safetensors", {})])


def test_shrinkage_is_used(pipeline: Pipeline, tmp_path: Path) -> None:
    def largest(shrinkage: float) -> float:
        section = pipeline.params.spectrum.model_copy(update={"shrinkage": shrinkage})
        params: Params = pipeline.params.model_copy(update={"spectrum": section})
        inputs = (params, "subtraction", "sampled", 0, pipeline.base, pipeline.proxy_moments, pipeline.task_moments)
        compute_spectrum(*inputs, tmp_path / str(shrinkage))
        return max(float(one.eigenvalues[-1]) for one in read_spectrum(tmp_path / str(shrinkage)).inputs.values())

    assert largest(0.001) > largest(0.01) > largest(0.5)


Q = "model.layers.0.self_attn.q_proj"


def shrunk(tensor: torch.Tensor, *, by: int) -> torch.Tensor:
    return tensor[:-by].clone()


SICK: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "residual": (lambda _, m: m["health"][Q].update(residual=0.02), "the residual of its pencil is 2e-02, more than"),
    "deviation": (lambda _, m: m["health"][Q].update(orthonormality=1.0), "the orthonormality of its pencil is 1e"),
    "record": (lambda _, m: m["health"].pop(Q), "health and groups name other layer inputs"),
    "field": (lambda _, m: m["health"][Q].pop("condition"), "condition: Field required"),
    "type": (lambda _, m: m["health"][Q].update(shrinkage="0.01"), "shrinkage: Input should be a valid number"),
    "tokens": (lambda _, m: m.update(proxy_tokens=0), "proxy_tokens: Input should be greater than or equal to 1"),
    "tensor": (lambda t, _: t.pop(f"{Q}.basis"), "basis: delete it"),
    "width": (lambda t, _: t.update({f"{Q}.eigenvalues": shrunk(t[f"{Q}.eigenvalues"], by=1)}), "not of width 32"),
    "order": (lambda t, _: t.update({f"{Q}.eigenvalues": t[f"{Q}.eigenvalues"].flip(0)}), "negative or out of order"),
    "sign": (lambda t, _: t[f"{Q}.eigenvalues"].sub_(1e-3), "negative or out of order"),
    "scale": (lambda t, _: t[f"{Q}.eigenvalues"].mul_(1.5), "eigenvalues are not those of its moments"),
    "basis": (lambda t, _: t[f"{Q}.basis"][:, -1].mul_(1.1), "deviates from C_p-orthonormality by"),
    "energy": (lambda t, _: t[f"{Q}.penalty"].zero_(), "a moment of it has no energy"),
    "kind": (lambda t, _: t.update({f"{Q}.utility": t[f"{Q}.utility"].int()}), "not float32 or float64"),
}


@pytest.mark.parametrize("sickness", SICK)
def test_a_sick_spectrum_is_refused_and_the_layer_named(sickness: str, pipeline: Pipeline, tmp_path: Path) -> None:
    act, expected = SICK[sickness]
    path = tmp_path / "x.safetensors"
    path.write_bytes(pipeline.spectrum.read_bytes())
    rewrite(path, act)
    with pytest.raises(FoLoRAError, match=r"x\.safetensors: ") as refused:
        read_spectrum(path)
    assert expected in str(refused.value)
    assert sickness in ("record", "tokens") or Q in str(refused.value)


def test_a_pencil_that_is_not_solved_well_is_not_written(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where solved inputs stay, for a stage that goes on
    monkeypatch.setattr("folora.health.SOLVE_TOLERANCE", 1e-17)
    moments = (pipeline.proxy_moments, pipeline.task_moments)
    inputs = (pipeline.params, "subtraction", "sampled", 0, pipeline.base, *moments)
    with pytest.raises(FoLoRAError, match=r"^model\.layers.*more than 1e-17: raise spectrum\.shrinkage"):
        compute_spectrum(*inputs, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == [".folora"]


def test_halves_of_the_proxy_text_are_compared(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spectrum, manifest = read_spectrum(pipeline.spectrum), read_tensors(pipeline.spectrum)[1]
    moments = [StoredMoments([(pipeline.proxy_moments / f"{shard}.safetensors", {})]) for shard in (0, 1)]
    for name, one in spectrum.inputs.items():
        record = manifest["health"][name]
        halves = (half.read(name).mean(name) for half in moments)
        difference = gate_difference(*halves, one.utility.double(), one.shrinkage)
        assert record["gate_difference"] == pytest.approx(difference, rel=1e-6)
        assert record["tokens_needed"] == tokens_needed(manifest["proxy_tokens"], record["gate_difference"])
        assert record["tokens_per_width"] == pytest.approx(manifest["proxy_tokens"] / one.health.width)
    inputs = ("subtraction", "sampled", 0, pipeline.base, pipeline.proxy_moments, pipeline.task_moments, tmp_path / "x")
    monkeypatch.setattr("folora.stability.GATE_DIFFERENCE", 1e-6)
    monkeypatch.setattr("folora.health.TOP_SHARE", 1.0)
    compute_spectrum(pipeline.params, *inputs)
    (warning,) = caplog.messages
    assert warning.startswith("subtraction, sampled: 8 of 8 layer inputs have gates of which two halves")
    one = pipeline.params.model_copy(update={"proxy": pipeline.params.proxy.model_copy(update={"shards": [0]})})
    compute_spectrum(one, *inputs)
    alone = read_tensors(tmp_path / "x")[1]["health"].values()
    assert {(record["gate_difference"], record["tokens_needed"]) for record in alone} == {(None, None)}
    assert len(caplog.messages) == 1


def test_a_direction_that_holds_most_of_a_moment_is_told(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = read_tensors(pipeline.spectrum)[1]
    shares = {name: record["top_share"] for name, record in manifest["health"].items()}
    worst = max(shares, key=lambda name: shares[name])
    monkeypatch.setattr("folora.health.TOP_SHARE", 0.99 * shares[worst])
    inputs = ("subtraction", "sampled", 0, pipeline.base, pipeline.proxy_moments, pipeline.task_moments, tmp_path / "x")
    compute_spectrum(pipeline.params, *inputs)
    (warning,) = caplog.messages
    assert re.match(rf"subtraction, sampled: \d of 8 layer inputs have more .* most of all {worst} \(\d\d%\)", warning)


@pytest.mark.parametrize("eigenvalues", [torch.tensor(1.0), torch.zeros(0), torch.zeros(2, 2)])
def test_eigenvalues_of_another_shape_are_refused(
    eigenvalues: torch.Tensor, pipeline: Pipeline, tmp_path: Path
) -> None:
    tensors, manifest = read_tensors(pipeline.spectrum, artefact="spectrum")
    name = next(iter(manifest["groups"]))
    write_tensors(tmp_path / "s.safetensors", tensors | {f"{name}.eigenvalues": eigenvalues.double()}, manifest)
    with pytest.raises(FoLoRAError, match=f"{name}: its tensors are not of width"):
        read_spectrum(tmp_path / "s.safetensors")


def test_parts_solve_what_one_solves(pipeline: Pipeline, tmp_path: Path) -> None:
    section = pipeline.params.spectrum.model_copy(update={"parts": [3, 0, 1]})
    params: Params = pipeline.params.model_copy(update={"spectrum": section})
    files = section.files(tmp_path)
    for part, file in zip(section.parts, files, strict=True):
        moments = (pipeline.proxy_moments, pipeline.task_moments)
        compute_spectrum(params, "subtraction", "sampled", part, pipeline.base, *moments, file)
    found, expected = read_spectrum(*files), read_spectrum(pipeline.spectrum)
    assert list(found.groups.items()) == list(expected.groups.items())
    assert [len(read_tensors(file)[1]["groups"]) for file in files] == [2, 3, 3]
    for name, one in expected.inputs.items():
        assert torch.equal(found.inputs[name].basis, one.basis)
        assert torch.equal(found.inputs[name].eigenvalues, one.eigenvalues)
    with pytest.raises(FoLoRAError, match="part 1 is missing: run the stage that makes it"):
        read_spectrum(*files[:2])
    with pytest.raises(FoLoRAError, match=r"0\.safetensors: made with parts \[0\], but \[3, 0, 1\] is expected"):
        read_spectrum(files[0], pipeline.spectrum)


def test_more_parts_than_layer_inputs_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    section = pipeline.params.spectrum.model_copy(update={"parts": list(range(9))})
    params: Params = pipeline.params.model_copy(update={"spectrum": section})
    inputs = (params, "subtraction", "sampled", 8, pipeline.base, pipeline.proxy_moments, pipeline.task_moments)
    with pytest.raises(FoLoRAError, match=r"spectrum\.parts: 9 of them share 8 layer inputs: name fewer"):
        compute_spectrum(*inputs, tmp_path / "x")
