"""The spectrum stage: solve the pencil of every layer input, and read the result back for training.

Artefact tensors, for each layer input named after its first layer: ``NAME.basis`` (d, q) float32, the columns of V̂;
``NAME.eigenvalues`` (q,) float64; ``NAME.penalty`` and ``NAME.utility`` (d, d) float32, the raw second moments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from folora.covariance import read_moments
from folora.pencil import LayerSpectrum, Spectrum, solve_spectrum
from folora.storage import read_tensors, write_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from folora.base import Base
    from folora.params import Params


STORED = ("basis", "eigenvalues", "penalty", "utility")  # the tensors of each layer input


def compute_spectrum(
    params: Params, task: str, source: str, base: Base, proxy_folder: Path, task_path: Path, output: Path
) -> None:
    """Reduce a source's shards, solve the pencil of every layer input against the task and write the spectrum.

    Raises:
        FoLoRAError: a shard is missing, damaged, or from another model or parameter set; a pencil is not solvable.
    """
    proxy_settings = params.proxy.sampling(source)
    shards = [(proxy_folder / f"{shard}.safetensors", {"shard": str(shard)}) for shard in params.proxy.shards]
    proxy, groups = read_moments(
        shards, **base.identity, proxy=proxy_settings, positions=params.covariance.proxy_positions
    )
    target, _ = read_moments(
        [(task_path, {})],
        **base.identity,
        task=params.tasks[task].model_dump(),
        positions=params.covariance.task_positions,
        task_rows=params.covariance.task_rows,
        groups=groups,
    )
    spectrum = solve_spectrum(proxy, target, groups, **params.spectrum.model_dump())
    tensors = {f"{name}.{field}": getattr(one, field) for name, one in spectrum.inputs.items() for field in STORED}
    health = {name: {**one.health, "proxy_fourth": one.proxy_fourth} for name, one in spectrum.inputs.items()}
    manifest = {
        "artefact": "spectrum",
        **base.identity,
        "task": params.tasks[task].model_dump(),
        "proxy": proxy_settings,
        "spectrum": params.spectrum.model_dump(),
        "groups": groups,
        "proxy_tokens": proxy.tokens,
        "task_tokens": target.tokens,
        "health": health,
    }
    write_tensors(output, tensors, manifest)


def read_spectrum(path: Path, **expected: object) -> Spectrum:
    """Read the artefact of the spectrum stage.

    Raises:
        FoLoRAError: missing, damaged, or a manifest field differs from ``expected``.
    """
    tensors, manifest = read_tensors(path, artefact="spectrum", **expected)
    inputs = {
        name: LayerSpectrum(
            **{field: tensors[f"{name}.{field}"] for field in STORED},
            shrinkage=manifest["health"][name]["shrinkage"],
            proxy_tokens=manifest["proxy_tokens"],
            proxy_fourth=manifest["health"][name]["proxy_fourth"],
            health=manifest["health"][name],
        )
        for name in manifest["groups"]
    }
    return Spectrum(inputs, manifest["groups"])
