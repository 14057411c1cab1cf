from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folora.covariance import StoredMoments, compute_covariance
from folora.errors import FoLoRAError
from folora.layers import adapted_layers
from folora.moments import memory_of, split_passes
from folora.storage import read_table, read_tensors, write_table, write_tensors
from folora.triangle import half_size, whole_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Pipeline, Refused, SaveParams
    from torch import Tensor

    from folora.params import Params


def settings(params: Params, **changes: object) -> Params:
    return params.model_copy(update={"covariance": params.covariance.model_copy(update=changes)})


def one_by_one(pipeline: Pipeline, rows: list[tuple[list[int], list[bool]]]) -> dict[str, Tensor]:
    """Σ x xᵀ in float64 over the masked tokens, a row at a time, for every adapted layer."""
    model = pipeline.base.load_model()
    sums: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model, "all-linear").items():
        layer.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0][0].double()}))
    for ids, mask in rows:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        for name, x in inputs.items():
            chosen = x[torch.tensor(mask)]
            sums[name] = sums.get(name, 0) + chosen.mT @ chosen
    return sums


@pytest.mark.parametrize(
    ("rows", "positions"),
    [("proxy", "all"), ("proxy", "without_first"), ("task", "all"), ("task", "without_first"), ("task", "response")],
)
def test_sums_are_those_of_single_rows(rows: str, positions: str, pipeline: Pipeline, tmp_path: Path) -> None:
    table, manifest = read_table(pipeline.task if rows == "task" else pipeline.proxy / "0.parquet")
    table = table.slice(0, 11)
    write_table(tmp_path / "rows", table, manifest)
    params = settings(pipeline.params, batch_size=4, **{f"{rows}_positions": positions})
    compute_covariance(params, pipeline.base, tmp_path / "rows", tmp_path / "out")

    all_ids = table["input_ids" if rows == "task" else "token_ids"].to_pylist()
    masks = {
        "all": [[True] * len(ids) for ids in all_ids],
        "without_first": [[False] + [True] * (len(ids) - 1) for ids in all_ids],
        "response": table["loss_mask"].to_pylist() if rows == "task" else None,
    }[positions]
    expected = one_by_one(pipeline, list(zip(all_ids, masks, strict=True)))
    sums, manifest = read_tensors(tmp_path / "out", artefact="covariance", positions=positions)
    assert manifest["tokens"] == sum(map(sum, masks))
    assert sorted(name for names in manifest["groups"].values() for name in names) == sorted(expected)
    for leader, names in manifest["groups"].items():
        assert sums[leader].dtype == torch.float64
        for name in names:  # layers of one group read the same input
            found = whole_of(sums[leader], len(expected[name]))
            torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-4)


def test_the_first_rows_of_a_task_are_enough(pipeline: Pipeline, tmp_path: Path) -> None:
    table, about = read_table(pipeline.task)
    write_table(tmp_path / "first", table.slice(0, 5), about)
    compute_covariance(pipeline.params, pipeline.base, tmp_path / "first", tmp_path / "expected")
    params = settings(pipeline.params, task_rows=5, batch_size=2)
    compute_covariance(params, pipeline.base, pipeline.task, tmp_path / "found")
    (found, about), (expected, _) = (read_tensors(tmp_path / name) for name in ("found", "expected"))
    assert about["tokens"] == sum(map(len, table["input_ids"].to_pylist()[:5]))
    for name, sums in expected.items():
        torch.testing.assert_close(found[name], sums, rtol=1e-5, atol=1e-5)
    # the proxy text is read whole
    compute_covariance(params, pipeline.base, pipeline.proxy / "0.parquet", tmp_path / "proxy")
    assert (
        read_tensors(tmp_path / "proxy")[1]["tokens"]
        == read_tensors(pipeline.proxy_moments / "0.safetensors")[1]["tokens"]
    )


def test_shards_add_up_to_the_whole(pipeline: Pipeline, tmp_path: Path) -> None:
    tables = [read_table(pipeline.proxy / f"{shard}.parquet") for shard in (0, 1)]
    write_table(tmp_path / "rows", pa.concat_tables([table for table, _ in tables]), tables[0][1])
    compute_covariance(pipeline.params, pipeline.base, tmp_path / "rows", tmp_path / "whole")
    total = StoredMoments(
        [(pipeline.proxy_moments / f"{shard}.safetensors", {"shard": str(shard)}) for shard in (0, 1)]
    )
    whole = StoredMoments([(tmp_path / "whole", {})])
    assert total.tokens == whole.tokens
    assert total.groups == whole.groups
    for name in total.groups:
        summed = total.read(name)
        assert summed.tokens == total.tokens > total.read(name, 1).tokens
        torch.testing.assert_close(summed.sums[name], whole.read(name).sums[name], rtol=1e-6, atol=1e-4)


def test_same_rows_give_the_same_bytes(pipeline: Pipeline, tmp_path: Path) -> None:
    compute_covariance(pipeline.params, pipeline.base, pipeline.task, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == pipeline.task_moments.read_bytes()


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("spare", [0, 20_000, 1_000_000])
def test_a_memory_budget_changes_no_byte(spare: int, pipeline: Pipeline, tmp_path: Path) -> None:
    params = settings(pipeline.params, memory_budget=memory_of([48]) + spare)
    compute_covariance(params, pipeline.base, pipeline.task, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == pipeline.task_moments.read_bytes()
    assert not list((tmp_path / ".folora/scratch").iterdir())


def test_a_budget_for_less_than_one_input_names_the_number_needed(
    pipeline: Pipeline, save_params: SaveParams, refused: Refused
) -> None:
    values = pipeline.values()
    values["covariance"]["memory_budget"] = "10 kB"
    arguments = ("--foundation", pipeline.foundation, "--rows", pipeline.task, "--threads", 1)
    line = refused("covariance", *arguments, "--params", save_params(values))
    needed, few = memory_of([48]), "10000 bytes are too few for the moments of a layer input of width 48"
    assert line == f"covariance.memory_budget: {few}: give {needed} or more"
    assert split_passes({"a": 32, "b": 48}, needed) == [["a"], ["b"]]


@given(widths=st.lists(st.integers(1, 3000), min_size=1, max_size=12), spare=st.integers(0, 10**8))
def test_passes_hold_as_many_inputs_as_fit(widths: list[int], spare: int) -> None:
    budget = memory_of([max(widths)]) + spare
    named = {str(number): width for number, width in enumerate(widths)}
    passes = split_passes(named, budget)
    assert [name for names in passes for name in names] == list(named)
    for names, following in zip(passes, [*passes[1:], []], strict=True):
        assert memory_of([named[name] for name in names]) <= budget
        assert not following or memory_of([named[name] for name in (*names, following[0])]) > budget


PEAK = """
import sys
from ctypes import CDLL
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import pyarrow as pa
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from folora.covariance import compute_covariance
from folora.params import load_params
from folora.storage import write_table

torch.set_num_threads(1)
sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
tokenizer = SimpleNamespace(pad_token_id=0)
base = SimpleNamespace(identity={}, load_for_inference=lambda: model, load_tokenizer=lambda: tokenizer)
write_table(Path("rows"), pa.table({"token_ids": [[1, 2, 3], [4, 5]]}), {"artefact": "proxy"})
params = load_params(Path(sys.argv[1]))


def held():
    return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])


def run(modules, budget, output):
    covariance = params.covariance.model_copy(update={"memory_budget": budget})
    adapter = params.adapter.model_copy(update={"target_modules": modules})
    changed = params.model_copy(update={"covariance": covariance, "adapter": adapter})
    CDLL(None).malloc_trim(0)  # what the allocator keeps of the run before would hide as much of this one
    before, seen, done = held(), [], Event()

    def watch():
        while not done.wait(0.0005):
            seen.append(held())

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    compute_covariance(changed, base, Path("rows"), Path(output))
    done.set()
    watcher.join()
    return max(seen) - before


run(["layers.0.mlp.down_proj"], None, "one")  # takes what any run takes once
print(run("all-linear", int(sys.argv[2]), "within"), run("all-linear", None, "at once"))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what of a process's memory is no file's")
def test_peak_memory_stays_within_the_budget(pipeline: Pipeline, save_params: SaveParams, tmp_path: Path) -> None:
    file, budget = save_params(pipeline.values()), 80_000_000
    command = [sys.executable, "-c", PEAK, str(file), str(budget)]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    within, at_once = map(int, printed.split())
    moments = 8 * 6 * (3 * half_size(1024) + half_size(2048))
    assert within <= budget < moments / 2
    assert at_once >= moments
    assert (tmp_path / "within").read_bytes() == (tmp_path / "at once").read_bytes()


def test_chosen_modules_only(pipeline: Pipeline, tmp_path: Path) -> None:
    adapter = pipeline.params.adapter.model_copy(update={"target_modules": ["v_proj", "down_proj"]})
    params = pipeline.params.model_copy(update={"adapter": adapter})
    compute_covariance(params, pipeline.base, pipeline.task, tmp_path / "out")
    _, manifest = read_tensors(tmp_path / "out")
    names = [f"model.layers.{i}.{module}" for i in (0, 1) for module in ("self_attn.v_proj", "mlp.down_proj")]
    assert manifest["groups"] == {name: [name] for name in names}


def test_module_that_matches_nothing_is_one_line(pipeline: Pipeline, save_params: SaveParams, refused: Refused) -> None:
    values = pipeline.values()
    values["adapter"]["target_modules"] = ["q_proj", "qkv"]
    arguments = ("--foundation", pipeline.foundation, "--rows", pipeline.task, "--threads", 1)
    line = refused("covariance", *arguments, "--params", save_params(values))
    assert line.startswith("adapter.target_modules: 'qkv' matches no linear layer; there are down_proj, gate_proj")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("truncated", "damaged or truncated"),
        ("missing", "not found: run the stage"),
        ("other model", "made with model 0"),
    ],
)
def test_bad_rows_are_one_line(
    damage: str, expected: str, pipeline: Pipeline, save_params: SaveParams, tmp_path: Path, refused: Refused
) -> None:
    rows = tmp_path / "rows.parquet"
    if damage == "truncated":
        rows.write_bytes(pipeline.task.read_bytes()[:-500])
    elif damage == "other model":
        table, manifest = read_table(pipeline.task)
        write_table(rows, table, manifest | {"model": "0"})
    arguments = ("--foundation", pipeline.foundation, "--rows", rows, "--threads", 1)
    line = refused("covariance", *arguments, "--params", save_params(pipeline.values()))
    assert line.startswith(f"{rows}: {expected}")


def test_no_token_that_counts_is_an_error(pipeline: Pipeline, tmp_path: Path) -> None:
    _, manifest = read_table(pipeline.proxy / "0.parquet")
    write_table(tmp_path / "rows", pa.table({"token_ids": [[1], [1]]}), manifest)
    params = settings(pipeline.params, proxy_positions="without_first")
    with pytest.raises(FoLoRAError, match="rows: no token counts under covariance positions 'without_first'"):
        compute_covariance(params, pipeline.base, tmp_path / "rows", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def read_all(path: Path) -> None:
    moments = StoredMoments([(path, {})])
    for name in moments.groups:
        moments.read(name)


Q = "model.layers.0.self_attn.q_proj"
SICK: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "asymmetric": (lambda t, _: t[Q].view(32, 32)[3].mul_(2), "its sum is not symmetric"),
    "negative": (lambda t, _: t[Q].neg_(), "a sum of squares is negative"),
    "indefinite": (lambda t, _: t[Q].view(32, 32).fill_diagonal_(1e-3), "its sum is not positive semi-definite"),
    "shape": (lambda t, _: t.update({Q: t[Q][:-1].clone()}), "its sum is not the half of a matrix of width 32"),
    "empty": (lambda t, _: t.update({Q: t[Q][:0].clone()}), "its sum is not the half of a matrix of width 32"),
    "type": (lambda t, _: t.update({Q: t[Q].float()}), "its sums are not float64"),
    "fourth": (lambda t, _: t[f"fourth/{Q}"].mul_(1e6), "its sums are not those of"),
    "tokens": (lambda _, m: m.update(tokens=3), "its sums are not those of 3 tokens"),
    "many tokens": (lambda _, m: m.update(tokens=10**400), "tokens: Input should be less than or equal to"),
    "no tokens": (lambda _, m: m.update(tokens=0), "tokens: Input should be greater than or equal to 1 (got 0)"),
    "text": (lambda _, m: m.update(tokens="9"), "tokens: Input should be a valid integer (got '9')"),
    "tensor": (lambda t, _: t.pop(Q), f"lacks {Q}: delete it"),
    "groups": (lambda _, m: m.pop("groups"), "groups: Field required"),
    "widths": (lambda _, m: m["widths"].pop(Q), "widths and groups name other layer inputs"),
}


@pytest.mark.parametrize("sickness", SICK)
def test_sick_moments_are_refused_and_the_layer_named(sickness: str, pipeline: Pipeline, tmp_path: Path) -> None:
    act, expected = SICK[sickness]
    tensors, manifest = read_tensors(pipeline.proxy_moments / "0.safetensors")
    act(tensors, manifest)
    write_tensors(tmp_path / "x", tensors, manifest)
    with pytest.raises(FoLoRAError, match=r"x: ") as refused:
        read_all(tmp_path / "x")
    assert expected in str(refused.value)
    assert sickness in ("tokens", "many tokens", "no tokens", "text", "groups", "widths") or Q in str(refused.value)
