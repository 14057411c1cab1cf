from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from folora.errors import FoLoRAError
from folora.params import Proxy
from folora.proxy import generate_proxy, loops
from folora.sampling import invert, sample, sequence_seed, uniform_numbers
from folora.storage import read_table, read_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pipeline, Refused, SaveParams
    from torch import Tensor
    from transformers import PreTrainedModel

BOS, EOS = 1, 2
LARGEST_UNIFORM = 1 - 2.0**-53  # of numpy's float64 generators


@pytest.fixture(scope="module")
def model(pipeline: Pipeline) -> PreTrainedModel:
    return pipeline.base.load_model()


def next_token(model: PreTrainedModel, ids: list[int], temperature: float) -> Tensor:
    """Log-probabilities of the token after ``ids``, from a pass without cache or batch."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return torch.log_softmax(logits.double() / temperature, dim=-1)


def columns(path: Path) -> dict[str, list]:
    return read_table(path, artefact="proxy")[0].to_pydict()


@pytest.mark.parametrize("batch_size", [3, 20, 500])
def test_batch_size_does_not_matter(batch_size: int, pipeline: Pipeline, tmp_path: Path) -> None:
    settings = pipeline.params.proxy.model_copy(update={"batch_size": batch_size})
    generate_proxy(settings, "sampled", "0", pipeline.base, tmp_path / "0.parquet")
    found, expected = columns(tmp_path / "0.parquet"), columns(pipeline.proxy / "0.parquet")
    for found_row, row in zip(found.pop("logprobs"), expected.pop("logprobs"), strict=True):
        assert found_row == pytest.approx(row, abs=1e-4)
    assert found == expected


def test_a_sequence_does_not_depend_on_the_others(pipeline: Pipeline, tmp_path: Path) -> None:
    settings = pipeline.params.proxy.model_copy(update={"sequences": 5})
    generate_proxy(settings, "sampled", "0", pipeline.base, tmp_path / "0.parquet")
    assert columns(tmp_path / "0.parquet")["text"] == columns(pipeline.proxy / "0.parquet")["text"][:5]


def test_same_settings_give_the_same_bytes(pipeline: Pipeline, tmp_path: Path) -> None:
    generate_proxy(pipeline.params.proxy, "sampled", "1", pipeline.base, tmp_path / "1.parquet")
    assert (tmp_path / "1.parquet").read_bytes() == (pipeline.proxy / "1.parquet").read_bytes()


def test_shards_and_heldout_text_share_no_seed(pipeline: Pipeline, tmp_path: Path) -> None:
    paths = [pipeline.proxy / "0.parquet", pipeline.proxy / "1.parquet", pipeline.heldout]
    seeds = [seed for path in paths for seed in columns(path)["seed"]]
    settings = pipeline.params.proxy
    assert len(set(seeds)) == len(seeds) == 2 * settings.sequences + settings.heldout_sequences
    assert seeds == [sequence_seed(0, s, i) for s, n in (("0", 96), ("1", 96), ("heldout", 24)) for i in range(n)]
    assert columns(paths[0])["text"] != columns(paths[1])["text"]
    generate_proxy(settings.model_copy(update={"seed": 1}), "sampled", "0", pipeline.base, tmp_path / "0.parquet")
    assert not set(columns(tmp_path / "0.parquet")["seed"]) & set(seeds)


def test_rows_are_consistent(pipeline: Pipeline) -> None:
    rows, manifest = read_table(pipeline.proxy / "0.parquet", **pipeline.base.identity)
    tokenizer, settings = pipeline.base.load_tokenizer(), pipeline.params.proxy
    assert manifest["shard"] == "0"
    assert manifest["proxy"] == settings.sampling("sampled")
    reasons = set()
    for number, row in enumerate(rows.to_pylist()):
        ids = row["token_ids"]
        assert row["index"] == number
        assert ids[0] == BOS
        assert len(row["logprobs"]) == len(ids) - 1
        assert max(row["logprobs"]) <= 0
        assert row["text"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert EOS not in ids[:-1]
        assert row["finish_reason"] == ("stop" if ids[-1] == EOS else "length")
        assert len(ids) == settings.max_length or row["finish_reason"] == "stop"
        reasons.add(row["finish_reason"])
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_logprobs_are_those_of_a_full_pass(temperature: float, model: PreTrainedModel) -> None:
    uniforms = uniform_numbers([sequence_seed(5, "x", i) for i in range(6)], 20)
    samples = sample(model, uniforms, BOS, EOS, temperature)
    assert len({len(one.token_ids) for one in samples}) > 1  # some leave the batch early
    for one in samples:
        ids = one.token_ids
        full = [float(next_token(model, ids[:i], temperature)[ids[i]]) for i in range(1, len(ids))]
        assert one.logprobs == pytest.approx(full, abs=1e-4)


def chi_squared(tokens: list[int], probabilities: Tensor) -> float:
    """P-value of token counts against a distribution; tokens that are expected under five times share a bin."""
    expected = probabilities.numpy() * len(tokens)
    found = np.bincount(tokens, minlength=len(expected))
    bins = np.where(expected < 5, len(expected), np.arange(len(expected)))
    used = np.unique(bins)
    found, expected = np.bincount(bins, found)[used], np.bincount(bins, expected)[used]
    return float(scipy.stats.chisquare(found, expected).pvalue)


def check_follows(samples: list[list[int]], model: PreTrainedModel, temperature: float, other: float) -> None:
    """See that first and second tokens follow the model at a temperature, and would not at the other one."""
    first = [ids[1] for ids in samples]
    exact = next_token(model, [BOS], temperature).exp()
    assert chi_squared(first, exact) > 1e-3
    commonest = max(set(first) - {EOS}, key=first.count)
    second = [ids[2] for ids in samples if ids[1] == commonest]
    assert chi_squared(second, next_token(model, [BOS, commonest], temperature).exp()) > 1e-3
    # this would notice another temperature or another context
    assert chi_squared(first, next_token(model, [BOS], other).exp()) < 1e-6
    assert chi_squared(second, exact) < 1e-6


def test_samples_follow_the_model(model: PreTrainedModel) -> None:
    count, temperature = 6000, 0.15
    uniforms = uniform_numbers([sequence_seed(0, "test", i) for i in range(count)], 2)
    check_follows([one.token_ids for one in sample(model, uniforms, BOS, EOS, temperature)], model, temperature, 0.2)


def test_a_model_that_does_not_take_the_cache_is_refused(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a version of transformers that calls it otherwise, and takes any name."""
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda cache, **inputs: forward(**inputs))  # noqa: ARG005
    with pytest.raises(FoLoRAError, match="leaves the cache empty"):
        sample(model, uniform_numbers([0, 1], 5), BOS, EOS, 1.0)


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1.0)), min_size=1, max_size=8).filter(any),
    st.one_of(st.sampled_from([0.0, 2.0**-53, LARGEST_UNIFORM]), st.floats(0, LARGEST_UNIFORM)),
)
def test_no_token_of_probability_zero_is_chosen(weights: list[float], uniform: float) -> None:
    probabilities = torch.tensor([weights], dtype=torch.float64)
    probabilities /= probabilities.sum()
    (chosen,) = invert(probabilities, torch.tensor([uniform], dtype=torch.float64)).tolist()
    assert probabilities[0, chosen] > 0
    assert probabilities[0, :chosen].sum() <= uniform + 1e-12
    assert probabilities[0, : chosen + 1].sum() > uniform - 1e-12


def test_invert_takes_each_row_by_itself() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.75], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    for uniforms, expected in [((0, 0, 0), [1, 0, 0]), ((0.24, 0.5, 0.9), [1, 1, 0]), ((0.25, 0.99, 0.1), [2, 1, 0])]:
        assert invert(probabilities, torch.tensor(uniforms, dtype=torch.float64)).tolist() == expected


def test_longer_than_the_context_is_one_line(pipeline: Pipeline, save_params: SaveParams, refused: Refused) -> None:
    values = pipeline.values()
    values["proxy"]["max_length"] = 65
    arguments = ("--foundation", pipeline.foundation, "--threads", 1, "--params", save_params(values))
    assert "proxy.max_length: 65 is more than the model's context of 64" in refused("proxy", "sampled", "0", *arguments)


def with_source(pipeline: Pipeline, **source: Any) -> Proxy:
    values = pipeline.values()["proxy"] | {"corpora": str(pipeline.world), "sources": {"other": source}}
    return Proxy.model_validate(values)


def test_random_tokens_are_of_the_vocabulary(pipeline: Pipeline, tmp_path: Path) -> None:
    generate_proxy(with_source(pipeline, kind="random"), "other", "0", pipeline.base, tmp_path / "0.parquet")
    rows, tokenizer = columns(tmp_path / "0.parquet"), pipeline.base.load_tokenizer()
    drawn = [token for ids in rows["token_ids"] for token in ids[1:]]
    words = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    assert {ids[0] for ids in rows["token_ids"]} == {BOS}
    assert {len(ids) for ids in rows["token_ids"]} == {pipeline.params.proxy.max_length}
    assert set(drawn) == set(words)
    uniform = torch.full((len(words),), 1 / len(words), dtype=torch.float64)
    assert chi_squared([words.index(token) for token in drawn], uniform) > 1e-3


def test_corpus_rows_are_those_of_the_data_set(pipeline: Pipeline, tmp_path: Path) -> None:
    settings = with_source(pipeline, kind="corpus", dataset="addition", text="{{ prompt }}{{ response }}")
    generate_proxy(settings, "other", "0", pipeline.base, tmp_path / "0.parquet")
    lines = (pipeline.world / "addition" / "train.jsonl").read_text().splitlines()
    texts = {item["prompt"] + item["response"] for item in map(json.loads, lines)}
    rows = columns(tmp_path / "0.parquet")
    assert set(rows["text"]) <= texts
    assert len(set(rows["text"])) > 0.5 * len(rows["text"])  # drawn with replacement from all of them
    assert {ids[-1] for ids in rows["token_ids"]} == {EOS}
    generate_proxy(settings, "other", "1", pipeline.base, tmp_path / "1.parquet")
    assert columns(tmp_path / "1.parquet")["text"] != rows["text"]


def test_longer_rows_of_a_corpus_are_cut(pipeline: Pipeline, tmp_path: Path) -> None:
    source = {"kind": "corpus", "dataset": "addition", "text": "{{ prompt }}{{ response }}"}
    settings = with_source(pipeline, **source).model_copy(update={"max_length": 5})
    generate_proxy(settings, "other", "0", pipeline.base, tmp_path / "0.parquet")
    rows = columns(tmp_path / "0.parquet")
    assert {len(ids) for ids in rows["token_ids"]} == {5}
    assert set(rows["finish_reason"]) == {"length"}


@pytest.mark.parametrize(
    ("dataset", "text", "expected"),
    [
        ("poetry", "{{ prompt }}", "no data set here: proxy.sources"),
        ("addition", "{{ verse }}", "the columns are prompt, response"),
    ],
)
def test_bad_corpus_is_one_line(
    dataset: str, text: str, expected: str, pipeline: Pipeline, save_params: SaveParams, refused: Refused
) -> None:
    settings = with_source(pipeline, kind="corpus", dataset=dataset, text=text)
    values = pipeline.values() | {"proxy": settings.model_dump()}
    for run in values["runs"].values():
        run["proxy"] = "other"
    arguments = ("--foundation", pipeline.foundation, "--threads", 1, "--params", save_params(values))
    assert expected in refused("proxy", "other", "0", *arguments)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, *range(50, 90)], False),
        ([1, *range(50, 90), *[7] * 16], False),  # its first token does not repeat one
        ([1, *range(50, 90), *[7] * 17], True),
        ([1, *range(50, 90), *[7, 8, 9] * 7], True),
        ([1, *[7] * 15], False),
        ([1, *range(200), *[7] * 40], False),  # less than its last quarter
        ([1, *range(100), *[7] * 40], True),
        ([1, *range(50, 90), *[7] * 30, 2], False),  # it came out of the loop, and ended
    ],
)
def test_a_text_that_ends_by_repeating_itself_loops(ids: list[int], expected: bool) -> None:
    assert loops(ids) == expected


def test_loops_are_counted_up_to_the_spectrum(pipeline: Pipeline) -> None:
    table, manifest = read_table(pipeline.proxy / "0.parquet", artefact="proxy")
    assert manifest["sequences"] == len(table)
    assert manifest["loops"] == sum(map(loops, table["token_ids"].to_pylist()))
    about = read_tensors(pipeline.spectrum, artefact="spectrum")[1]
    assert about["sequences"] == len(pipeline.params.proxy.shards) * pipeline.params.proxy.sequences
