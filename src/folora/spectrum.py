"""The spectrum stage: solve the pencil of every layer input, and read the result back for training.

The layer inputs are shared out among parts, so that several jobs can solve them. Tensors of an artefact, for each layer
input named after its first layer: ``NAME.basis`` (d, q) float32, the columns of V̂; ``NAME.eigenvalues`` (q,) float64;
``NAME.penalty`` and ``NAME.utility`` (d, d) float32, the raw second moments.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from folora.covariance import StoredMoments
from folora.errors import FoLoRAError
from folora.health import (
    ROUNDING_TOLERANCE,
    STORAGE_TOLERANCE,
    SpectrumManifest,
    breaches,
    too_few_tokens,
    too_many_loops,
    too_top_heavy,
)
from folora.pencil import LayerSpectrum, Spectrum, input_spectrum
from folora.scratch import scratch
from folora.stability import stability
from folora.storage import TensorFiles, fields_of, read_tensors, write_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from folora.base import Base
    from folora.layers import Groups
    from folora.params import Params, SpectrumSection

logger = logging.getLogger(__name__)

COMMON = ("task", "proxy", "spectrum", "parts", "proxy_tokens", "task_tokens")  # what the parts have alike
FIELDS = ("basis", "eigenvalues", "penalty", "utility")  # the tensors of each layer input
SOLVED = "solved"  # the artefact of one layer input
SAMPLED = 8  # directions of a layer input that are checked when it is read


def compute_spectrum(
    params: Params, task: str, source: str, part: int, base: Base, proxy_folder: Path, task_path: Path, output: Path
) -> None:
    """Reduce a source's shards, solve the pencils of a part's layer inputs against the task and write their spectra.

    Moments and solutions of one layer input at a time are in memory.

    Raises:
        FoLoRAError: a shard is missing, damaged, or from another model or parameter set; a pencil is not solvable, or
            not well enough to be trusted.
    """
    proxy_settings = params.proxy.sampling(source)
    paths = [proxy_folder / f"{shard}.safetensors" for shard in params.proxy.shards]
    proxy = StoredMoments(
        [(path, {"shard": str(shard)}) for path, shard in zip(paths, params.proxy.shards, strict=True)],
        **base.identity,
        proxy=proxy_settings,
        positions=params.covariance.proxy_positions,
    )
    target = StoredMoments(
        [(task_path, {})],
        **base.identity,
        task=params.tasks[task].model_dump(),
        positions=params.covariance.task_positions,
        task_rows=params.covariance.task_rows,
        groups=proxy.groups,
    )
    groups = part_of(proxy.groups, params.spectrum.parts, part)
    about: dict[str, Any] = {
        "artefact": "spectrum",
        **base.identity,
        "task": params.tasks[task].model_dump(),
        "proxy": proxy_settings,
        "spectrum": params.spectrum.solving(),
        "parts": params.spectrum.parts,
        "part": part,
        "groups": groups,
    }
    # their manifests and times stand for their content, which every part would have to read whole
    moments = [*proxy.manifests, *target.manifests, *(path.stat().st_mtime_ns for path in (*paths, task_path))]
    with scratch(**about, moments=moments) as unfinished:
        solved = [unfinished / f"{number}.safetensors" for number in range(len(groups))]
        for path, name in zip(solved, tqdm(groups, "spectrum", unit="input", disable=None), strict=True):
            try:
                TensorFiles(path, artefact=SOLVED)
            except FoLoRAError:  # not solved yet, or a power cut has damaged it
                _solve_input(proxy, target, name, params.spectrum, path)
        files = TensorFiles(*solved, artefact=SOLVED)
        records = {name: one["health"] for name, one in zip(groups, files.manifests, strict=True)}
        text = {field: sum(one[field] for one in proxy.manifests) for field in ("sequences", "loops")}
        manifest = about | {"proxy_tokens": proxy.tokens, "task_tokens": target.tokens, "health": records, **text}
        health = fields_of(output, SpectrumManifest, manifest).health
        for warning in (too_top_heavy(health), too_few_tokens(health, proxy.tokens), too_many_loops(**text)):
            if warning:
                logger.warning("%s, %s: %s", task, source, warning)
        write_tensors(output, files, manifest)


def _solve_input(proxy: StoredMoments, target: StoredMoments, name: str, settings: SpectrumSection, path: Path) -> None:
    """Write the spectrum of one layer input, with its health as manifest."""
    half = len(proxy.manifests) // 2
    first = proxy.read(name, half) if half else None
    total = proxy.read(name)
    one = input_spectrum(total, target.read(name), name, **settings.solving())
    health = {**one.health.model_dump(), "proxy_fourth": one.proxy_fourth, **stability(total, first, name, one)}
    tensors = {f"{name}.{field}": getattr(one, field) for field in FIELDS}
    write_tensors(path, tensors, {"artefact": SOLVED, "health": health})


def part_of(groups: Groups, parts: list[int], part: int) -> Groups:
    """The layer inputs that one of the parts solves: neighbours, as many in each part as can be.

    Raises:
        FoLoRAError: there are more parts than layer inputs.
    """
    names, number = list(groups), parts.index(part)
    if len(parts) > len(names):
        raise FoLoRAError(f"spectrum.parts: {len(parts)} of them share {len(names)} layer inputs: name fewer")
    start, end = (len(names) * edge // len(parts) for edge in (number, number + 1))
    return {name: groups[name] for name in names[start:end]}


def read_spectrum(*paths: Path, **expected: object) -> Spectrum:
    """Read the artefacts of the spectrum stage of one task and source, all of their parts.

    Raises:
        FoLoRAError: missing, damaged, beyond the limits of ``health``, a manifest field differs from ``expected`` or
            between the parts, or a part is not there.
    """
    whole, missing = Spectrum({}, {}), None
    for path in paths:
        part, manifest = _read_part(path, **expected)
        whole = Spectrum(whole.inputs | part.inputs, whole.groups | part.groups)
        missing = set(manifest["parts"] if missing is None else missing) - {manifest["part"]}
        expected |= {field: manifest[field] for field in COMMON}
    if missing:
        raise FoLoRAError(f"{paths[0].parent}: part {min(missing)} is missing: run the stage that makes it")
    return whole


def _read_part(path: Path, **expected: object) -> tuple[Spectrum, dict[str, Any]]:
    """One artefact of the spectrum stage, and its manifest."""
    tensors, manifest = read_tensors(path, artefact="spectrum", **expected)
    about = fields_of(path, SpectrumManifest, manifest)
    if found := breaches(about.health):
        raise FoLoRAError(f"{path}: {found[0]}")
    absent = [name for name in (f"{name}.{field}" for name in about.groups for field in FIELDS) if name not in tensors]
    if absent:
        raise FoLoRAError(f"{path}: lacks {absent[0]}: delete it and run its stage again")
    inputs = {
        name: LayerSpectrum(
            **{field: tensors[f"{name}.{field}"] for field in FIELDS},
            shrinkage=record.shrinkage,
            proxy_tokens=about.proxy_tokens,
            proxy_fourth=record.proxy_fourth,
            health=record,
        )
        for name, record in about.health.items()
    }
    for name, one in inputs.items():
        if wrong := defect(one):
            raise FoLoRAError(f"{path}: {name}: {wrong}: delete it and run its stage again")
    return Spectrum(inputs, about.groups), manifest


def defect(one: LayerSpectrum) -> str | None:
    """What is wrong with the tensors of a layer input, as far as ``SAMPLED`` of its directions show."""
    d = one.health.width
    matrices = (one.basis, one.penalty, one.utility)
    shapes = [(d, one.eigenvalues.numel()), (d, d), (d, d)]
    if [tuple(matrix.shape) for matrix in matrices] != shapes or one.eigenvalues.ndim != 1 or not shapes[0][1]:
        return f"its tensors are not of width {d}"
    if not {tensor.dtype for tensor in (*matrices, one.eigenvalues)} <= {torch.float32, torch.float64}:
        return "its tensors are not float32 or float64"
    if one.eigenvalues[0] < 0 or (one.eigenvalues.diff() < 0).any():
        return "its eigenvalues are negative or out of order"
    traces = [C.diagonal().double().sum() for C in matrices[1:]]
    if min(traces) <= 0:
        return "a moment of it has no energy"
    q = len(one.eigenvalues)
    chosen = torch.linspace(0, q - 1, min(q, SAMPLED)).round().long()
    V, eigenvalues = one.basis[:, chosen].double(), one.eigenvalues[chosen]
    quadratic = [V.mT @ (d / trace * (C.double() @ V)) for C, trace in zip(matrices[1:], traces, strict=True)]
    penalty = (1 - one.shrinkage) * quadratic[0] + one.shrinkage * V.mT @ V
    scale = penalty.diagonal().mean()  # c² of the basis
    limit = STORAGE_TOLERANCE + ROUNDING_TOLERANCE * one.health.condition
    deviation = (penalty / scale - torch.eye(len(chosen), dtype=V.dtype)).abs().max()
    if not deviation <= limit:
        return f"its basis deviates from C_p-orthonormality by {float(deviation):.0e}"
    if not ((quadratic[1].diagonal() / scale - eigenvalues).abs() <= limit * one.eigenvalues[-1]).all():
        return "its eigenvalues are not those of its moments"
    return None
