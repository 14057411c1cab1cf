from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from folora.comparison import compare, seed_curve
from folora.selection import best_rate, last_checkpoints

if TYPE_CHECKING:
    from folora.storage import Record

BASE = {"target": 0.0, "validation": 0.1, "kept": 1.0, "kl": 0.0, "perplexity": 2.0, "kept/add": 0.9, "kept/max": 1.0}


def record(method: str, rate: float, seed: int, step: int = 10, **figures: Any) -> Record:
    run = {"run": f"{method}-{rate}-{seed}", "method": method, "learning_rate": rate, "seed": seed, "step": step}
    defaults = {"target": 0.5, "validation": 0.5, "kept": 0.5, "kl": 1.0, "perplexity": 3.0}
    return run | defaults | {"kept/add": 0.4, "kept/max": 0.6} | figures


def test_last_checkpoint_is_the_greatest_step_of_a_run_in_any_order() -> None:
    records = [record("lora", rate, seed, step) for rate in (0.1, 0.2) for seed in (0, 1) for step in (2, 10, 9)]
    for order in (records, records[::-1]):
        last = last_checkpoints(order)
        assert {r["step"] for r in last} == {10}
        assert sorted(r["run"] for r in last) == sorted({r["run"] for r in records})


def test_rate_is_chosen_on_validation_at_the_last_checkpoint() -> None:
    records = [
        record("lora", 0.1, 0, validation=0.6, target=0.1),
        record("lora", 0.2, 0, validation=0.5, target=1.0),
        record("lora", 0.2, 0, step=5, validation=0.9, target=1.0),
    ]
    assert best_rate(records) == 0.1


def test_rate_is_chosen_by_the_mean_over_seeds() -> None:
    spread = [record("lora", 0.1, seed, validation=v) for seed, v in enumerate((0.9, 0.1, 0.2))]
    steady = [record("lora", 0.2, seed, validation=0.45) for seed in range(3)]
    assert best_rate(spread + steady) == 0.2


@pytest.mark.parametrize("rates", [(0.3, 0.1, 0.2), (0.1, 0.2, 0.3), (0.2, 0.3, 0.1)])
def test_a_tie_goes_to_the_smaller_rate(rates: tuple[float, ...]) -> None:
    assert best_rate([record("lora", rate, 0) for rate in rates]) == 0.1


def test_a_curve_is_the_base_and_all_checkpoints_of_one_seed() -> None:
    records = [
        record("lora", 0.1, 0, 5, target=0.2, kept=0.8, kl=0.3),
        record("lora", 0.2, 0, target=0.4, kept=0.6, kl=0.7),
        record("lora", 0.1, 1),
    ]
    curve = seed_curve(BASE, records, 0)
    assert (curve.target.tolist(), curve.kept.tolist(), curve.kl.tolist()) == (
        [0, 0.2, 0.4],
        [1, 0.8, 0.6],
        [0, 0.3, 0.7],
    )


def test_figures_are_means_over_seeds_at_the_chosen_rate_and_last_checkpoint() -> None:
    records = [
        record("lora", 0.1, 0, target=0.2, kl=0.5, perplexity=3, **{"kept/add": 0.1}),
        record("lora", 0.1, 1, target=0.6, kl=1.5, perplexity=5, **{"kept/add": 0.5}),
        record("lora", 0.1, 1, step=5, target=1.0, kl=9.0),
        record("lora", 0.9, 0, validation=0.2, target=1.0),
    ]
    found = compare("subtraction", BASE, records, "lora")
    arm = found.arms["lora"]
    assert (found.adaptation, arm.method, arm.learning_rate) == ("subtraction", "lora", 0.1)
    expected = {
        "target": 0.4,
        "validation": 0.5,
        "kept": 0.5,
        "kl": 1.0,
        "perplexity": 4,
        "kept/add": 0.3,
        "kept/max": 0.6,
    }
    assert arm.figures == pytest.approx(expected)
    assert arm.finals == {0: ("lora-0.1-0", 10), 1: ("lora-0.1-1", 10)}
    assert arm.half_widths == pytest.approx({"target": 0.2 * 12.706, "kept": 0, "kl": 0.5 * 12.706}, rel=1e-4)
    assert found.base == BASE


def test_methods_keep_the_order_of_the_records() -> None:
    records = [record(method, 0.1, 0) for method in ("uniform", "folora", "lora", "folora")]
    assert list(compare("x", BASE, records, "lora").arms) == ["uniform", "folora", "lora"]


def test_others_are_read_at_the_target_the_reference_reaches_seed_by_seed() -> None:
    records = [
        record("lora", 0.1, 0, target=0.5, kept=0.2, kl=2.0),
        record("lora", 0.1, 1, target=0.25, kept=0.4, kl=1.0),
        record("folora", 0.1, 0, target=1.0, kept=0.6, kl=0.4),  # from the base: 0.8 and 0.2 at half the target
        record("folora", 0.1, 1, target=0.5, kept=0.5, kl=0.8),  # 0.75 and 0.4 at half the target
    ]
    found = compare("x", BASE, records, "lora").arms
    found_match = asdict(found["folora"].matches["lora"])
    expected = {"target": 0.375, "kept": 0.775, "kl": 0.3, "kept_gain": 0.775 - 0.3, "kl_ratio": 1.5 / 0.3}
    assert found_match == pytest.approx(expected)
    back = found["lora"].matches["folora"]
    assert (back.kept_gain, back.kl_ratio) == (pytest.approx(-0.475), pytest.approx(0.2))


def test_matching_uses_every_rate_and_checkpoint() -> None:
    records = [
        record("lora", 0.1, 0, target=0.5),
        record("folora", 0.1, 0, validation=0.9, target=0.6, kept=0.1, kl=3.0),
        record("folora", 0.01, 0, step=5, validation=0.1, target=0.5, kept=0.7, kl=0.2),
        record("folora", 0.01, 0, validation=0.1, target=0.4, kept=0.3, kl=0.3),
    ]
    arm = compare("x", BASE, records, "lora").arms["folora"]
    assert arm.learning_rate == 0.1
    assert (arm.matches["lora"].kept, arm.matches["lora"].kl) == (pytest.approx(0.7), pytest.approx(0.2))


def test_where_the_target_is_out_of_reach_both_are_read_at_the_highest_they_share() -> None:
    records = [record("lora", 0.1, 0, target=0.5, kept=0.2, kl=2.0)]
    records += [record("folora", 0.1, 0, target=0.4, kept=0.6, kl=0.4)]
    match = compare("x", BASE, records, "lora").arms["folora"].matches["lora"]
    assert match.target == pytest.approx(0.4)
    assert (match.kept, match.kl) == (pytest.approx(0.6), pytest.approx(0.4))
    assert match.kl_ratio == pytest.approx(0.8 * 2.0 / 0.4)  # LoRA at four fifths of the way from the base


def test_a_method_that_lacks_a_seed_is_not_matched() -> None:
    records = [record("lora", 0.1, seed, target=0.5) for seed in (0, 1)] + [record("folora", 0.1, 0, target=0.9)]
    arms = compare("x", BASE, records, "lora").arms
    assert arms["folora"].matches == arms["lora"].matches == {}
    assert arms["folora"].figures["target"] == pytest.approx(0.9)


def test_a_seed_at_other_rates_only_does_not_count() -> None:
    records = [record("lora", 0.1, seed, target=0.5) for seed in (0, 1)]
    records += [record("folora", 0.1, 0, validation=0.9), record("folora", 0.2, 1, validation=0.1)]
    found = compare("x", BASE, records, "lora")
    assert (found.seeds, found.complete) == ([0, 1], ["lora"])
    assert found.arms["folora"].matches == {}


def test_one_seed_has_no_interval_over_seeds() -> None:
    assert compare("x", BASE, [record("lora", 0.1, 0)], "lora").arms["lora"].half_widths == {}


def test_hypervolume_counts_from_the_base_targets_accuracy_and_is_averaged_over_seeds() -> None:
    base = BASE | {"target": 0.1}
    records = [
        record("lora", 0.1, 0, 5, target=0.3, kept=0.9),
        record("lora", 0.2, 0, target=0.6, kept=0.5),  # at another rate
        record("lora", 0.2, 0, 5, target=0.2, kept=0.6),  # beaten by the first
        record("lora", 0.1, 1, target=0.1, kept=1.0),  # learned nothing
    ]
    (arm,) = compare("x", base, records, "lora").arms.values()
    assert arm.hypervolume == pytest.approx((0.2 * 0.9 + 0.3 * 0.5) / 2)
