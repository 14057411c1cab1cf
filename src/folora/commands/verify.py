"""Whether the outputs of this folder are those of another run: bit by bit (level 1), or within tolerances (level 2).

Level 1 needs no more than hashes, which git has in ``dvc.lock``; level 2 needs the other run's files. A stage is judged
given what it reads: what the last bits differ by is nothing in a sum, and grows with every step of a training.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ruamel.yaml import YAML

from folora.dag import output_hashes, resolve_stages
from folora.errors import FoLoRAError
from folora.git import git
from folora.storage import MADE_WITH, METADATA_KEY, SNAKEMAKE_STAMP, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa
    from torch import Tensor

    from folora.dag import Stage

EQUAL, WITHIN, DIFFERS, MISSING = STATES = ("equal", "within", "differs", "missing")
LEVELS = {EQUAL: 1, WITHIN: 2}

# what other threads or another processor may change, by kind of artefact; docs/reliability.md says what was measured
TRAINED = "trained"  # model, adapters and their curves
TOLERANCES = {
    "covariance": 1e-5,  # of a sum's norm: float32 activations, summed in float64
    "spectrum": 1e-3,  # of a matrix's norm: the penalty's condition multiplies what the moments differ by
    "proxy": 1e-4,  # nats, or a share of more than one: log-probabilities of float32 logits
    "tokens": 1e-4,  # the same: KL and loss of every token
    "metrics": 0.02,  # scores between 0 and 1: two answers in a hundred
    TRAINED: 1e-2,  # of a tensor's norm
}
ROWS = {"proxy": 0.01, "answers": 0.01}  # share that may differ: a rounding tips a draw, or which token is best
CONDITIONS = {MADE_WITH, "threads", "device", "transformers_version"}  # what level 2 is about
MEASURED = {"health", "gates", "rounding"}  # in manifests: figures that follow from the tensors
DIGEST = re.compile(r"[0-9a-f]{64}")  # of what an artefact was made from, which has its own stage
DRAWN = {".html", ".png", ".csv", ".md", ".txt"}  # the report's page, figures and tables show its metrics.json


@dataclass(frozen=True)
class Deviation:
    """How far something is off, and how far it may be."""

    where: str
    size: float
    tolerance: float = 0.0

    @property
    def excess(self) -> float:
        """Size in units of the tolerance: up to 1 is within."""
        return self.size / self.tolerance if self.tolerance else math.inf * self.size if self.size else 0.0


@dataclass(frozen=True)
class Verdict:
    """How one stage compares.

    Attributes:
        stage: DVC's address.
        state: one of ``STATES``.
        inputs: the worst state of the stages that it reads.
        deviation: the largest there is, relative to its tolerance; None where there is nothing to measure.
        tolerance: what it may be.
        where: the file and what in it.
    """

    HEAD: ClassVar = ["stage", "state", "inputs", "deviation", "of", "where"]

    stage: str
    state: str
    inputs: str
    deviation: float | None = None
    tolerance: float | None = None
    where: str = ""

    def cells(self) -> list[str]:
        """Cells of a table."""
        numbers = ["" if one is None else f"{one:.0e}" if one else "0" for one in (self.deviation, self.tolerance)]
        return [self.stage, self.state, self.inputs, *numbers, self.where]


def verify_hashes(root: Path, revision: str) -> list[Verdict]:
    """Compare what lies here with the hashes in a commit's ``dvc.lock``.

    Raises:
        FoLoRAError: git has no such file.
    """
    text = git("show", f"{revision}:./dvc.lock")
    if text is None:
        raise FoLoRAError(f"{revision}: git has no dvc.lock there: name another --revision, or a folder: --against")
    recorded = YAML(typ="safe", pure=True).load(text)["stages"]
    found = output_hashes(root)

    def off(stage: Stage) -> Iterator[Deviation]:
        known = {out["path"]: out["md5"] for out in recorded.get(stage.name, {}).get("outs", [])}
        for path, value in found[stage.name].items():
            if value is None or path not in known:
                raise FileNotFoundError(path if value is None else f"{path}, in {revision}")
            if value != known[path]:
                yield Deviation(path, math.inf)

    return _judge(resolve_stages(root), off)


def verify_files(root: Path, other: Path) -> list[Verdict]:
    """Compare what lies here with the outputs of another folder, file by file."""

    def off(stage: Stage) -> Iterator[Deviation]:
        for output in stage.outputs:
            names = {
                str(path.relative_to(folder))
                for folder in (root, other)
                for path in ((folder / output).rglob("*") if (folder / output).is_dir() else [folder / output])
                if not path.is_dir() and path.name != SNAKEMAKE_STAMP
            }
            for name in sorted(names):
                for one in deviations(root / name, other / name):
                    if stage.name != "report" or Path(name).suffix not in DRAWN:
                        yield one

    return _judge(resolve_stages(root), off)


def level_of(verdicts: list[Verdict]) -> int | None:
    """The level at which all stages agree; None if some do not."""
    return LEVELS.get(max((one.state for one in verdicts), key=STATES.index))


def summary(verdicts: list[Verdict]) -> str:
    """The level in a line, or which stages to look at first: they are off, and what they read is not."""
    level, count = level_of(verdicts), len(verdicts)
    if level is not None:
        return f"level {level}: {count} stages agree, {'bit by bit' if level == 1 else 'within tolerances'}"
    off = [one for one in verdicts if one.state not in LEVELS]
    first = ", ".join(one.stage for one in off if one.inputs in LEVELS)
    return f"no level: {len(off)} of {count} stages differ or are missing; first: {first}"


def _judge(stages: dict[str, Stage], off: Any) -> list[Verdict]:
    """Verdicts in the order of the graph; ``off`` yields what is off in a stage, or finds a file missing."""
    found: dict[str, tuple[str, Deviation | None]] = {}
    for name, stage in stages.items():
        try:
            worst = max(off(stage), key=lambda one: one.excess, default=None)
            found[name] = (EQUAL if worst is None else WITHIN if worst.excess <= 1 else DIFFERS, worst)
        except FileNotFoundError as error:
            found[name] = (MISSING, Deviation(str(error.args[-1]), math.inf))
    makes = {output: name for name, stage in stages.items() for output in stage.outputs}
    verdicts = []
    for name, (state, worst) in found.items():
        inputs = max((found[makes[path]][0] for path in stages[name].inputs), key=STATES.index, default=EQUAL)
        known = worst is not None and math.isfinite(worst.size)
        size, tolerance = (worst.size, worst.tolerance) if worst is not None and known else (None, None)
        verdicts.append(Verdict(name, state, inputs, size, tolerance, worst.where if worst else ""))
    return verdicts


def deviations(here: Path, there: Path) -> Iterator[Deviation]:
    """What is off between two files of one name.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    from safetensors import SafetensorError

    for path in (here, there):
        if not path.exists():
            raise FileNotFoundError(str(path))
    if cmp(here, there, shallow=False):
        return
    yield Deviation(here.name, 0.0)  # the bytes differ, if nothing else does
    compare = {".safetensors": _tensors, ".parquet": _tables, ".json": _values}.get(here.suffix)
    if compare is None:
        yield Deviation(here.name, math.inf)
        return
    try:
        yield from (Deviation(f"{here.name}: {one.where}", one.size, one.tolerance) for one in compare(here, there))
    except (ValueError, SafetensorError, FoLoRAError) as error:
        yield Deviation(f"{here.name}: cannot be read: {error}", math.inf)


def _tensors(here: Path, there: Path) -> Iterator[Deviation]:
    (one, about), (other, about_other) = _read_tensors(here), _read_tensors(there)
    yield from _manifests(about, about_other)
    tolerance = TOLERANCES.get(about.get("artefact", TRAINED), TOLERANCES[TRAINED])
    if {name: tensor.shape for name, tensor in one.items()} != {name: tensor.shape for name, tensor in other.items()}:
        yield Deviation("names or shapes of tensors", math.inf)
        return
    for name, tensor in one.items():
        if not tensor.equal(other[name]):
            size = float((tensor - other[name]).norm() / other[name].norm())
            yield Deviation(name, size if math.isfinite(size) else math.inf, tolerance)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in float64; of a spectrum V Λ Vᵀ for V, whose signs and order of equal eigenvalues are the machine's."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        tensors = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118 - not a mapping
    for name in about.get("groups", []) if about.get("artefact") == "spectrum" else []:
        basis = tensors[f"{name}.basis"]
        tensors[f"{name}.basis"] = basis * tensors[f"{name}.eigenvalues"] @ basis.mT
    return tensors, about


def _tables(here: Path, there: Path) -> Iterator[Deviation]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def floating(kind: pa.DataType) -> bool:
        return pa.types.is_floating(kind.value_type if pa.types.is_list(kind) else kind)

    one, other = pq.read_table(here), pq.read_table(there)
    about, about_other = (
        json.loads((table.schema.metadata or {}).get(METADATA_KEY.encode(), "{}")) for table in (one, other)
    )
    yield from _manifests(about, about_other)
    if one.schema != other.schema or len(one) != len(other):
        yield Deviation("columns or number of rows", math.inf)
        return
    artefact = about.get("artefact", TRAINED)
    measured = [field.name for field in one.schema if floating(field.type)]
    pairs = list(zip(one.to_pylist(), other.to_pylist(), strict=True))
    exact = [name for name in one.column_names if name not in measured]
    same = [(a, b) for a, b in pairs if all(a[name] == b[name] for name in exact)]
    yield Deviation("rows", (len(pairs) - len(same)) / max(len(pairs), 1), ROWS.get(artefact, 0.0))
    tolerance = TOLERANCES.get(artefact, TOLERANCES[TRAINED])
    for name in measured:
        yield Deviation(name, max((_off(a[name], b[name]) for a, b in same), default=0.0), tolerance)


def _values(here: Path, there: Path) -> Iterator[Deviation]:
    one, other = read_json(here), read_json(there)
    if here.name == "metrics.json":
        one, other = _leaves(one), _leaves(other)
        for name in sorted(one.keys() | other.keys()):
            yield Deviation(name, _off(one.get(name), other.get(name)), TOLERANCES["metrics"])
    else:
        yield from _manifests(one, other)


def _manifests(one: Any, other: Any) -> Iterator[Deviation]:
    """Fields that differ, but for conditions, what was measured, and digests of inputs."""
    one, other = _leaves(one), _leaves(other)
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            yield Deviation(f"{name} is {one.get(name)}, not {other.get(name)}", math.inf)


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """The values of nested tables and lists that two runs must share, by dotted key."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        nested = [
            _leaves(one, f"{name}.{key}" if name else str(key))
            for key, one in items
            if key not in CONDITIONS | MEASURED
        ]
        return {key: leaf for leaves in nested for key, leaf in leaves.items()}
    return {} if isinstance(value, str) and DIGEST.fullmatch(value) else {name: value}


def _off(one: Any, other: Any) -> float:
    """Largest difference of two numbers or lists of them, of large ones the relative; infinite of other things."""
    if one == other:
        return 0.0
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max(map(_off, one, other), default=0.0)
    if isinstance(one, int | float) and isinstance(other, int | float) and math.isfinite(one) and math.isfinite(other):
        return abs(one - other) / max(1.0, abs(other))
    return math.inf
