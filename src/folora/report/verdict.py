"""The verdict: who keeps more at the same target accuracy, ties included, in a few sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from folora.comparison import Match
    from folora.paired import Difference
    from folora.report.study import Study

FEW = 4  # so many methods are named; of more, their number and the extremes


def verdict(study: Study) -> str:
    """One to three sentences on the subject of a study."""
    subject, reference = study.subject, study.reference
    matches = study.comparison.arms[subject].matches
    gains = {other: study.pairs[subject, other].gain for other in matches}
    if not gains:
        return f"{subject} cannot be compared: no other method has the seeds of {reference}."
    sentences = []
    if reference in gains:
        sentences.append(_against_reference(subject, reference, matches[reference], gains.pop(reference)))
    wins = [other for other, gain in gains.items() if gain.significant and gain.value > 0]
    losses = [other for other, gain in gains.items() if gain.significant and gain.value < 0]
    ties = [other for other, gain in gains.items() if not gain.significant]
    clauses = [
        f"{verb} {_named(others, matches)}"
        for verb, others in (("keeps more than", wins), ("ties with", ties))
        if others
    ]
    if clauses:
        sentences.append(f"It {' and '.join(clauses)}.")
    if losses:
        sentences.append(f"It loses to {_named(losses, matches)}.")
    return " ".join(sentences)


def _against_reference(subject: str, reference: str, match: Match, gain: Difference) -> str:
    interval = f"95 % interval {gain.low:z.2f} to {gain.high:z.2f}"
    more = f"{abs(gain.value):.2f} {'more' if gain.value >= 0 else 'less'}"
    kl = f", at a KL {_times(match.kl_ratio)}" if match.kl_ratio else ""
    if gain.significant:
        return f"{subject} keeps {more} than {reference} at the target accuracy {match.target:.2f} ({interval}){kl}."
    return (
        f"{subject} ties with {reference} at the target accuracy {match.target:.2f}: it keeps {more} ({interval}){kl}."
    )


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times smaller" if ratio >= 1 else f"{1 / ratio:.1f} times greater"


def _named(methods: list[str], matches: dict[str, Match]) -> str:
    """Methods with what the subject gains over them and where; of many only their number and the extremes."""
    ordered = sorted(methods, key=lambda method: -matches[method].kept_gain)
    if len(ordered) <= FEW:
        return _listed(_gained(method, matches[method]) for method in ordered)
    first, last = (_gained(method, matches[method]) for method in (ordered[0], ordered[-1]))
    return f"{len(ordered)} methods, from {first} to {last}"


def _gained(method: str, match: Match) -> str:
    return f"{method} ({match.kept_gain:+z.2f} at {match.target:.2f})"


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
