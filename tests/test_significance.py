from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from folora import significance
from folora.significance import (
    RESAMPLES,
    bootstrap_p,
    holm,
    percentile_interval,
    resampled_accuracy,
    resampled_seeds,
    sign_test,
    t_half_width,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def generator() -> np.random.Generator:
    return np.random.default_rng(7)


def test_resamples_are_means_over_drawn_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "RESAMPLES", 20)
    correct = np.random.default_rng(0).random((3, 11)) < 0.4
    counts = generator().multinomial(11, [1 / 11] * 11, size=20)
    found = resampled_accuracy(correct, generator())
    for resample, checkpoint in np.ndindex(20, 3):
        items = [item for item in range(11) for _ in range(counts[resample, item])]
        assert len(items) == 11
        assert found[resample, checkpoint] == pytest.approx(np.mean([correct[checkpoint, item] for item in items]))


def test_resamples_spread_as_a_mean_of_independent_items_does() -> None:
    correct = np.arange(200)[None] < 60
    found = resampled_accuracy(correct, generator())[:, 0]
    assert len(found) == RESAMPLES
    assert found.mean() == pytest.approx(0.3, abs=0.003)
    assert found.std() == pytest.approx(np.sqrt(0.3 * 0.7 / 200), rel=0.05)
    low, high = percentile_interval(found)
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.3 * 0.7 / 200), rel=0.08)


def test_checkpoints_see_the_same_resamples() -> None:
    correct = np.random.default_rng(1).random(50) < 0.5
    found = resampled_accuracy(np.stack([correct, correct, ~correct]), generator())
    assert (found[:, 0] == found[:, 1]).all()
    assert found[:, 0] + found[:, 2] == pytest.approx(1)


def test_seeds_are_drawn_with_replacement() -> None:
    weights = resampled_seeds(3, generator())
    assert weights.shape == (RESAMPLES, 3)
    assert weights.sum(axis=1) == pytest.approx(1)
    assert weights.mean(axis=0) == pytest.approx(1 / 3, abs=0.02)
    assert (weights.max(axis=1) == 1).mean() == pytest.approx(3 / 27, abs=0.02)  # one seed three times
    assert (resampled_seeds(1, generator()) == 1).all()


@PROPERTY
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_one_seed_is_mcnemars_exact_test(more: int, fewer: int, alike: int) -> None:
    differences = np.array([[1] * more + [-1] * fewer + [0] * alike], dtype=int)
    expected = stats.binomtest(more, more + fewer).pvalue if more + fewer else 1.0
    assert sign_test(differences) == pytest.approx(expected)
    assert sign_test(-differences) == sign_test(differences)


def test_several_seeds_count_an_item_once() -> None:
    one = np.array([[1, 1, 1, 1, 1, 1, -1, 0]])
    assert sign_test(np.repeat(one, 3, axis=0)) == sign_test(one)
    assert sign_test(np.concatenate([one, -one])) == 1
    majority = np.array([[1] * 6, [1] * 6, [-1] * 6])  # two of three seeds, on every item
    assert sign_test(majority) == 2 / 2**6


def test_holm_on_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@PROPERTY
@given(P_VALUES)
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, position in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
            if (len(p_values) - rank) * p_values[position] > level:
                break
            rejected.add(position)
        assert {i for i, p in enumerate(adjusted) if p <= level} == rejected
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))


@PROPERTY
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6))
def test_t_interval_is_scipys(values: list[float]) -> None:
    if np.std(values) < 1e-6:
        return
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert t_half_width(values) == pytest.approx((high - low) / 2)


def test_one_seed_has_no_t_interval() -> None:
    assert t_half_width([0.5]) is None


def test_bootstrap_p_is_twice_the_smaller_tail() -> None:
    samples = np.array([-1.0] * 10 + [1.0] * 189)
    assert bootstrap_p(samples) == bootstrap_p(-samples) == pytest.approx(2 * 11 / 200)
    assert bootstrap_p(np.ones(199)) == pytest.approx(2 / 200)
    assert bootstrap_p(np.zeros(199)) == 1


def test_holm_keeps_the_rate_of_false_findings() -> None:
    """Among ten true null hypotheses there is a finding in no more than one family of twenty."""
    draws = np.random.default_rng(3).binomial(30, 0.5, size=(1000, 10))
    tails = np.cumsum([comb(30, k) / 2**30 for k in range(31)])
    p_values = np.minimum(1, 2 * tails[np.minimum(draws, 30 - draws)])
    assert np.mean([min(holm(list(family))) < 0.05 for family in p_values]) <= 0.06
