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
    """One or two sentences on the subject of a study: against the reference, and against all others."""
    subject, reference = study.subject, study.reference
    matches = study.comparison.arms[subject].matches
    gains = {other: study.pairs[subject, other].gain for other in matches}
    if not gains:
        lacking = "no other method has" if subject in study.comparison.complete else "it lacks some of"
        return f"{subject} cannot be compared: {lacking} the seeds of {reference}."
    sentences = []
    if reference in gains:
        sentences.append(_against_reference(subject, reference, matches[reference], gains.pop(reference)))
    told_apart = {other: gain.value for other, gain in gains.items() if gain.significant}
    groups = {
        "keeps more than": [other for other, value in told_apart.items() if value > 0],
        "ties with": [other for other in gains if other not in told_apart],
        "loses to": [other for other, value in told_apart.items() if value < 0],
    }
    claims = [f"{verb} {_named(others, matches)}" for verb, others in groups.items() if others]
    if claims:
        sentences.append(f"{'It' if sentences else subject} {'; it '.join(claims)}.")
    return " ".join(sentences)


def _against_reference(subject: str, reference: str, match: Match, gain: Difference) -> str:
    interval = f"95 % interval {gain.low:z.2f} to {gain.high:z.2f}"
    more = f"{abs(gain.value):.2f} {'more' if gain.value >= 0 else 'less'}"
    kl = _kl(match.kl_ratio)
    if gain.significant:
        return f"{subject} keeps {more} than {reference} at the target accuracy {match.target:.2f} ({interval}){kl}."
    return (
        f"{subject} ties with {reference} at the target accuracy {match.target:.2f}: it keeps {more} ({interval}){kl}."
    )


def _kl(ratio: float | None) -> str:
    if ratio is None or ratio == 0:
        return ""
    if f"{max(ratio, 1 / ratio):.1f}" == "1.0":
        return ", at the same KL"
    return f", at a KL {ratio:.1f} times smaller" if ratio > 1 else f", at a KL {1 / ratio:.1f} times greater"


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
