"""What a report says in words, and how it tells to use an adapter, on made-up studies."""

from __future__ import annotations

from typing import Any

import pytest

from folora.comparison import Arm, Comparison, Match
from folora.paired import Difference, Pair
from folora.params import Params
from folora.report.study import Study, subject_of
from folora.report.verdict import verdict

NOTHING = Difference(0, 0, 0, 1)


def arm(method: str, hypervolume: float = 0.5, matches: dict[str, Match] | None = None) -> Arm:
    return Arm(method, 0.01, {0: (f"{method}-run", 6)}, {}, {}, hypervolume, matches or {})


def study(gains: dict[str, tuple[float, float]], kl_ratio: float | None = 2.0, **record: Any) -> Study:
    """Folora against others: what it gains over each, and the p-value of that."""
    matches = {other: Match(0.8, 0.5, 0.1, gain, kl_ratio) for other, (gain, _) in gains.items()}
    pairs = {
        ("folora", other): Pair(NOTHING, NOTHING, Difference(gain, gain - 0.01, gain + 0.02, p))
        for other, (gain, p) in gains.items()
    }
    arms = {"folora": arm("folora", matches=matches)} | {other: arm(other) for other in ("lora", *gains)}
    records = [{"run": "folora-run", "step": 6, **record}]
    comparison = Comparison("x", "lora", [0], list(arms), {}, arms)
    return Study(comparison, "folora", [], {}, records, [], pairs, {}, {}, [], [], [], {})


@pytest.mark.parametrize(
    ("gains", "kl_ratio", "expected"),
    [
        (
            {"lora": (0.45, 0.001)},
            2.83,
            "folora keeps 0.45 more than lora at the target accuracy 0.80 (95 % interval 0.44 to 0.47), at a KL "
            "2.8 times smaller.",
        ),
        (
            {"lora": (-0.2, 0.001)},
            0.5,
            "folora keeps 0.20 less than lora at the target accuracy 0.80 (95 % interval -0.21 to -0.18), at a KL 2.0 "
            "times greater.",
        ),
        (
            {"lora": (0.006, 0.7)},
            None,
            "folora ties with lora at the target accuracy 0.80: it keeps 0.01 more (95 % interval 0.00 to 0.03).",
        ),
        (
            {"lora": (0.3, 0.01), "a": (0.2, 0.01), "b": (0.4, 0.01), "c": (-0.03, 0.2), "d": (-0.25, 0.01)},
            1.0,
            "folora keeps 0.30 more than lora at the target accuracy 0.80 (95 % interval 0.29 to 0.32), at the "
            "same KL. It keeps more than b (+0.40 at 0.80) and a (+0.20 at 0.80); it ties with c (-0.03 at 0.80); it "
            "loses to d (-0.25 at 0.80).",
        ),
        (
            {"a": (-0.1, 0.01), "b": (-0.2, 0.01)},
            1.0,
            "folora loses to a (-0.10 at 0.80) and b (-0.20 at 0.80).",
        ),
        (
            {f"m{n}": (0.1 * n, 0.01) for n in range(1, 6)},
            1.0,
            "folora keeps more than 5 methods, from m5 (+0.50 at 0.80) to m1 (+0.10 at 0.80).",
        ),
        ({}, 1.0, "folora cannot be compared: no other method has the seeds of lora."),
    ],
)
def test_verdict(gains: dict[str, tuple[float, float]], kl_ratio: float | None, expected: str) -> None:
    assert verdict(study(gains, kl_ratio)) == expected


def test_a_subject_that_lacks_a_seed_is_the_one_that_is_named() -> None:
    made = study({})
    made.comparison.complete.remove("folora")
    assert verdict(made) == "folora cannot be compared: it lacks some of the seeds of lora."


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({"lora": "lora", "replay": "lora", "ours": "folora", "folora": "folora"}, "ours"),
        ({"lora": "lora", "replay": "lora", "pissa": "pissa"}, "replay"),
        ({"lora": "lora"}, "lora"),
    ],
)
def test_the_subject_is_chosen_before_the_results_are_known(
    kinds: dict[str, str], expected: str, tiny_values: dict[str, Any]
) -> None:
    """The first method of kind folora; only where there is none, the best of the others."""
    run = next(iter(tiny_values["runs"].values()))
    methods = {name: {"kind": kind} for name, kind in kinds.items()}
    runs = {name: run | {"method": name} for name in kinds}
    params = Params.model_validate(tiny_values | {"methods": methods, "runs": runs})
    area = {"lora": 0.9, "replay": 0.8, "pissa": 0.7, "ours": 0.1, "folora": 0.5}
    comparison = Comparison("x", "lora", [0], list(kinds), {}, {name: arm(name, area[name]) for name in kinds})
    assert subject_of(params, comparison) == expected
