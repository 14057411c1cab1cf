"""Methods compared item by item, on made-up answers."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy.stats import binomtest

from folora import significance
from folora.comparison import Comparison, compare
from folora.frontier import Curve
from folora.paired import BASE_CHECKPOINT, Pairing
from folora.significance import SEED, holm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from folora.storage import Record

ITEMS = {"sub": 40, "add": 30, "max": 50}
TASKS = {"target": ["sub"], "kept": ["add", "max"]}
Answers = dict[tuple[str, int], dict[str, Any]]
Shares = tuple[float, float]  # of right answers to the target and to the kept tasks


def record(run: str, method: str, seed: int, step: int, right: dict[str, Any], kl: float) -> Record:
    kept = {f"kept/{task}": float(right[task].mean()) for task in TASKS["kept"]}
    own = {"run": run, "method": method, "learning_rate": 0.1, "seed": seed, "step": step, "kl": kl, "perplexity": 2.0}
    return own | {"target": float(right["sub"].mean()), "validation": 0.5, "kept": fmean(kept.values()), **kept}


def make(
    methods: Mapping[str, list[list[Shares]]], random: int = 0
) -> tuple[Comparison, Record, list[Record], Answers]:
    """Methods by name: for each seed the shares of right answers of every checkpoint."""
    generator = np.random.default_rng(random)

    def draw(shares: Shares) -> dict[str, Any]:
        return {task: (generator.random(n) < shares[task != "sub"]).astype(float) for task, n in ITEMS.items()}

    answers = {BASE_CHECKPOINT: draw((0.05, 0.98))}
    base = record("base", "base", 0, 0, answers[BASE_CHECKPOINT], 0.0)
    records = []
    for method, seeds in methods.items():
        for seed, checkpoints in enumerate(seeds):
            for step, shares in enumerate(checkpoints, start=1):
                answers[f"{method}-{seed}", step] = draw(shares)
                own = answers[f"{method}-{seed}", step]
                records.append(record(f"{method}-{seed}", method, seed, step, own, 0.1 * step))
    return compare("x", base, records, "lora"), base, records, answers


THREE = {
    "lora": [[(0.4, 0.7), (0.8, 0.3)]],
    "folora": [[(0.4, 0.9), (0.75, 0.7)]],
    "uniform": [[(0.5, 0.6), (0.7, 0.35)]],
}
ALL = [("folora", "lora"), ("uniform", "lora"), ("folora", "uniform")]


def test_differences_at_the_last_checkpoints() -> None:
    comparison, base, records, answers = make(THREE)
    pairs = Pairing(comparison, base, records, answers, TASKS).pairs(ALL)
    last = {method: answers[f"{method}-0", 2] for method in THREE}
    for figure, tasks in TASKS.items():
        raw = []
        for one, other in ALL:
            found = getattr(pairs[one, other], figure)
            shares = [last[one][task].mean() - last[other][task].mean() for task in tasks]
            assert found.value == pytest.approx(fmean(shares))
            assert found.low < found.value < found.high
            only = [sum((last[a][t] > last[b][t]).sum() for t in tasks) for a, b in ((one, other), (other, one))]
            raw.append(binomtest(int(only[0]), int(sum(only))).pvalue)
        assert [getattr(pairs[pair], figure).p for pair in ALL] == pytest.approx(holm(raw))
    assert pairs["folora", "lora"].kept.significant
    assert not pairs["folora", "lora"].target.significant


def test_gain_is_the_match_of_the_comparison() -> None:
    comparison, base, records, answers = make(THREE)
    pairs = Pairing(comparison, base, records, answers, TASKS).pairs(ALL)
    for (one, other), pair in pairs.items():
        assert pair.gain.value == comparison.arms[one].matches[other].kept_gain
        assert pair.gain.low < pair.gain.value < pair.gain.high


def test_the_other_way_round_is_the_negative() -> None:
    pairing = Pairing(*make(THREE), TASKS)
    pair = pairing.pairs([("folora", "lora")])["folora", "lora"]
    back = pairing.pairs([("lora", "folora")])["lora", "folora"]
    for figure in ("kept", "target", "gain"):
        one, other = getattr(pair, figure), getattr(back, figure)
        assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
        assert one.p == other.p


def test_equal_answers_tie() -> None:
    comparison, base, records, answers = make({"lora": [[(0.6, 0.5)]], "folora": [[(0.6, 0.5)]]})
    answers["folora-0", 1] = answers["lora-0", 1]
    records[1] = record("folora-0", "folora", 0, 1, answers["lora-0", 1], 0.1)
    comparison = compare("x", base, records, "lora")
    pair = Pairing(comparison, base, records, answers, TASKS).pairs([("folora", "lora")])["folora", "lora"]
    for difference in (pair.kept, pair.target, pair.gain):
        assert (difference.value, difference.low, difference.high, difference.p) == (0, 0, 0, 1)
        assert not difference.significant


def test_against_an_explicit_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loop over resamples and seeds, with the counts that the generator draws: seeds first, then task by task."""
    monkeypatch.setattr(significance, "RESAMPLES", 60)
    seeds = {
        "lora": [[(0.4, 0.7), (0.8, 0.3)], [(0.3, 0.8), (0.6, 0.5)]],
        "folora": [[(0.4, 0.9), (0.75, 0.7)], [(0.5, 0.9), (0.7, 0.6)]],
    }
    comparison, base, records, answers = make(seeds)
    pair = Pairing(comparison, base, records, answers, TASKS).pairs([("folora", "lora")])["folora", "lora"]

    generator = np.random.default_rng(SEED)
    seed_counts = generator.multinomial(2, [0.5, 0.5], size=60)
    counts = {t: generator.multinomial(ITEMS[t], [1 / ITEMS[t]] * ITEMS[t], size=60) for t in ("sub", "add", "max")}

    def accuracy(checkpoint: tuple[str, int], tasks: list[str], resample: int) -> float:
        return fmean((answers[checkpoint][t] * counts[t][resample]).sum() / ITEMS[t] for t in tasks)

    def curve(method: str, seed: int, resample: int) -> Curve:
        checkpoints = [BASE_CHECKPOINT, (f"{method}-{seed}", 1), (f"{method}-{seed}", 2)]
        target, kept = ([accuracy(c, TASKS[f], resample) for c in checkpoints] for f in ("target", "kept"))
        return Curve(np.array(target), np.array(kept), np.array([0.0, 0.1, 0.2]))

    samples: dict[str, list[float]] = {"kept": [], "target": [], "gain": []}
    for resample in range(60):
        drawn = [seed for seed in (0, 1) for _ in range(seed_counts[resample, seed])]
        for figure, tasks in TASKS.items():
            each = [
                accuracy((f"folora-{s}", 2), tasks, resample) - accuracy((f"lora-{s}", 2), tasks, resample)
                for s in drawn
            ]
            samples[figure].append(fmean(each))
        gains = []
        for seed in drawn:
            own, others = curve("folora", seed, resample), curve("lora", seed, resample)
            target = min(accuracy((f"lora-{seed}", 2), ["sub"], resample), own.target.max(), others.target.max())
            gains.append(float(own.at(target)[0] - others.at(target)[0]))
        samples["gain"].append(fmean(gains))
    for figure, values in samples.items():
        found = getattr(pair, figure)
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


def test_seeds_that_disagree_widen_the_interval() -> None:
    steady = make({"lora": [[(0.6, 0.5)]] * 3, "folora": [[(0.6, 0.7)]] * 3})
    moody = make({"lora": [[(0.6, 0.5)]] * 3, "folora": [[(0.6, 0.4)], [(0.6, 0.7)], [(0.6, 1.0)]]})
    widths = []
    for made in (steady, moody):
        kept = Pairing(*made, TASKS).pairs([("folora", "lora")])["folora", "lora"].kept
        widths.append(kept.high - kept.low)
    assert widths[1] > 2 * widths[0]


def test_a_method_without_all_seeds_has_no_pair() -> None:
    made = make({"lora": [[(0.6, 0.5)]] * 2, "folora": [[(0.6, 0.7)]], "uniform": [[(0.5, 0.6)]] * 2})
    pairing = Pairing(*made, TASKS)
    assert pairing.pairs([("folora", "lora"), ("uniform", "lora")]).keys() == {("uniform", "lora")}
    assert {method for method, _ in pairing.against_base()} == {"lora", "folora", "uniform"}


def test_every_ability_is_tested_against_the_base() -> None:
    comparison, base, records, answers = make(THREE)
    found = Pairing(comparison, base, records, answers, TASKS).against_base()
    before = answers[BASE_CHECKPOINT]
    raw = {}
    for method in THREE:
        for task in TASKS["kept"]:
            after = answers[f"{method}-0", 2][task]
            gained, lost = int((after > before[task]).sum()), int((before[task] > after).sum())
            raw[method, task] = binomtest(gained, gained + lost).pvalue
    assert found == pytest.approx(dict(zip(raw, holm(list(raw.values())), strict=True)))
    assert found["lora", "max"] < 0.001
