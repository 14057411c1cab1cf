"""Give every reader damaged and hostile files; each case must end in a value or a mistake that is named.

    python tests/fuzz.py --count 100000 --seed 0

Nothing else may be raised, nothing may take ``SECONDS`` or hold ``GROWTH`` more memory, no file outside of the folder
may be written, no process started and nothing connected to. A case follows from the seed, the reader and its
number alone (``--reader`` and ``--case`` run one again); the files of those that fail are kept in ``--failures``.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from conftest import ROOT, Pipeline, make_pipeline
from ruamel.yaml import YAML
from test_report import values as report_values
from test_report import write_results

from folora.errors import FoLoRAError
from folora.storage import METADATA_KEY, write_json, write_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS = 5.0  # of a processor that a case may take: of a clock, other work would count too
GROWTH = 256 * 1024 * 1024  # bytes that the process may grow by over all cases of a reader
DEEP = "deep"  # stands for nesting that json.dumps could not write

# what strangers write where something else is expected
HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e308, -1e308, 5e-324, float("nan")),
    *(float("inf"), "", " ", "a\nb", "\x00", "\ud800", "é" * 300, "x" * 100_000, "0", "NaN", "1e999", "~/x", "None"),
    *("../../../../etc/passwd", "/etc/passwd", "C:\\windows", "file:///etc/passwd", "http://127.0.0.1:9/x"),
    *("{{ 7 * 7 }}", "{% for x in range(10 ** 9) %}x{% endfor %}", "{{ ''.__class__.__mro__ }}", "__import__('os')"),
    *([], {}, [[]], [None], {"": None}, {"__class__": "x"}, DEEP),
]
WORDS = [b"\x00", b"\xff", b"\x7f", b"\x80", b"\n", b"\r\n", b"\xef\xbb\xbf", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000]
WORDS += [bytes([code]) for code in b"{}[]\",:-&*!'"] + [b"NaN", b"1e999", b"../", b"<|endoftext|>", b"- "]
WORDS += [struct.pack("<q", number) for number in (-1, 2**31, 2**40, 2**62)]
CODE = (
    r"""
{{ | }} | {% | %} | {# | #} | {{ prompt }} | {{ response.x }} | {{ prompt[0:9:0] }} | {{ 1 / 0 }} | {{ prompt * -1 }}
{{ prompt.__class__ }} | {{ prompt|upper }} | {{ prompt|nope }} | {{ prompt|tojson|safe }} | {{ '%d'|format('x') }}
{{ '{0}'.format() }} | {{ '{x}'.format(prompt) }} | {{ 'x'.encode('nope') }} | {% if prompt %} | {% else %}
{% for x in prompt %} | {% endfor %} | {{ none.x }} | {% for x in range(10 ** 9) %} | {% set a = [] %}
{% macro f(x) %}{{ f(x) }}{% endmacro %} | {{ f(1) }} | {{ range }} | {{ lipsum(1) }} | {{ messages }}
{{ a.append(a) }} | {% endif %} | {{ cycler() }} | {% include 'x' %} | {% extends 'x' %} | {% import 'x' as y %}
{{ dict(a=1).b }} | {{ 2 ** -1 }} | {{ messages[99] }}
{{ raise_exception('x') }} | {{ strftime_now('%Y') }} | {{ []|first }} | {{ []|max }} | {{ 9 ** 9 }} | {{ self }}
{{ 'x'|int(base=99) }} | {{ prompt|batch(0)|list }} | {{ 1.5|round(400) }} | {{ [1, 'a']|sort }} | {{ x[ }} | {{ 'x
""".replace("\n", " | ")
    .strip(" |")
    .split(" | ")
)


@dataclass(frozen=True)
class Reader:
    """What is fuzzed.

    Attributes:
        files: content of the files of its folder, by path.
        read: reads the folder.
        mutated: the files that are mutated.
        share: of all cases; slow readers get fewer.
    """

    files: dict[str, bytes]
    read: Callable[[Path], Any]
    mutated: list[str]
    share: float


@dataclass
class Outcome:
    """What became of the cases of one reader."""

    reader: str
    cases: int = 0
    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    growth: int = 0
    problems: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """For people."""
        rate = self.cases / max(self.seconds, 1e-9)
        return (
            f"{self.reader:<16} {self.cases:>7,} cases {self.read:>7,} read {self.refused:>7,} refused "
            f"{sum(self.problems.values()):>4} wrong {rate:>6.0f}/s slowest {self.slowest:.2f} s, "
            f"+{self.growth / 2**20:.0f} MiB"
        )


class TooLong(BaseException):
    """A case took ``SECONDS``; no reader may catch it."""


# mutation
def mutate(name: str, content: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Content that is damaged in a way that its format invites."""
    kind = name.rpartition(".")[2]
    structured: dict[str, Callable[[bytes, random.Random], bytes]] = {
        "json": json_mutated,
        "jsonl": jsonl_mutated,
        "yaml": yaml_mutated,
        "safetensors": safetensors_mutated,
        "parquet": parquet_mutated,
        "jinja": code_mutated,
    }
    if kind in structured and chance.random() < 0.7:
        content = structured[kind](content, chance)
    if kind not in structured or chance.random() < 0.35:
        content = bytes_mutated(content, others, chance)
    return content


def bytes_mutated(content: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Up to four flips, cuts, copies and splices, near the ends as often as anywhere."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        size = len(data)
        place = chance.choice([chance.randrange(size + 1), chance.randrange(min(size, 64) + 1)])
        place = chance.choice([place, size - place])
        length = chance.choice([1, 4, 8, chance.randrange(size + 1)])
        match chance.randrange(7):
            case 0:
                data[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                data[place : place + 1] = bytes(byte ^ 1 << chance.randrange(8) for byte in data[place : place + 1])
            case 2:
                del data[place:]
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + length][:10_000]
            case 5:
                data[place : place + chance.choice([0, 8])] = chance.choice(WORDS)
            case 6:
                other = chance.choice(others)
                begin = chance.randrange(len(other) + 1)
                data[place : place + length] = other[begin : begin + length]
    return bytes(data)


def json_mutated(content: bytes, chance: random.Random) -> bytes:
    """One to three values, keys or nestings of a JSON text changed."""
    return _dumped(changed(json.loads(content), chance), chance)


def jsonl_mutated(content: bytes, chance: random.Random) -> bytes:
    """The same of one of its lines."""
    lines = content.splitlines()
    place = chance.randrange(len(lines))
    lines[place] = json_mutated(lines[place], chance)
    return b"\n".join(lines)


def yaml_mutated(content: bytes, chance: random.Random) -> bytes:
    """The same of YAML, of which JSON is a part."""
    return json_mutated(json.dumps(_yaml(content)).encode(), chance)


def _yaml(content: bytes) -> Any:
    return YAML(typ="safe", pure=True).load(content)


def _dumped(value: Any, chance: random.Random) -> bytes:
    depth = chance.choice([10, 500, 5_000, 100_000])
    deep = chance.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth])
    return json.dumps(value).replace(f'"{DEEP}"', deep).encode()


def changed(value: Any, chance: random.Random) -> Any:
    """A JSON value with changes anywhere in it."""
    holder = [copy.deepcopy(value)]
    for _ in range(chance.choice([1, 1, 2, 3])):
        parent, key = chance.choice(list(_places(holder)))
        old = parent[key]
        match chance.randrange(7):
            case 0 | 1:
                parent[key] = copy.deepcopy(chance.choice(HOSTILE))
            case 2:
                if parent is not holder:
                    del parent[key]
            case 3:
                if isinstance(parent, dict):
                    parent[chance.choice(["", "x", "../x", "a.b", f"{key} ", "\ud800"])] = parent.pop(key)
            case 4:
                parent[key] = chance.choice([[old], {"x": old}, str(old)])
            case 5:
                other_parent, other = chance.choice(list(_places(holder)))
                parent[key] = copy.deepcopy(other_parent[other])
            case 6:
                if isinstance(old, bool | int | float):
                    parent[key] = chance.choice([-old, old + 1, old * 1000, old // 2, str(old)])
                elif isinstance(old, list):
                    parent[key] = chance.choice([old * 2, old[:-1], old[::-1]])
    return holder[0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def safetensors_mutated(content: bytes, chance: random.Random) -> bytes:
    """Header, manifest or numbers changed."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if chance.random() < 0.3:
        tensors = safetensors.torch.load(content)
        name = chance.choice(list(tensors))
        tensors[name] = numbers_changed(tensors[name], chance)
        return safetensors.torch.save(tensors, header.get("__metadata__"))
    manifest = header.get("__metadata__", {}).get(METADATA_KEY)
    if manifest is not None and chance.random() < 0.6:
        header["__metadata__"][METADATA_KEY] = json_mutated(manifest.encode(), chance).decode()
        written = json.dumps(header).encode()
    else:
        written = json_mutated(json.dumps(header).encode(), chance)
    return struct.pack("<Q", chance.choice([len(written)] * 9 + [2**62])) + written + data


def numbers_changed(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """A tensor with a wild number, or of another shape or type."""
    tensor = tensor.clone()
    match chance.randrange(4):
        case 0 if tensor.numel():
            wild = chance.choice([0.0, -1.0, 1e-45, 1e-30, 1e30, 3e38, float("nan"), float("inf")])
            tensor.view(-1)[chance.randrange(tensor.numel())] = wild
        case 1:
            tensor = tensor.to(
                chance.choice([torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.float8_e5m2])
            )
        case 2:
            tensor = chance.choice([tensor.flatten(), tensor[None], tensor.flatten()[:0], tensor.sum()])
        case _:
            tensor = tensor * chance.choice([0.0, -1.0, 1e-40, 1e300, 2.0])
    return tensor.contiguous()


def parquet_mutated(content: bytes, chance: random.Random) -> bytes:
    """Footer, manifest, columns or values changed."""
    table = pq.read_table(pa.BufferReader(content))
    sink = pa.BufferOutputStream()
    place = chance.randrange(table.num_columns)
    match chance.randrange(6):
        case 0:
            end = max(0, len(content) - 8 - struct.unpack("<I", content[-8:-4])[0])
            return content[:end] + bytes_mutated(content[end:], [content], chance)
        case 1:
            metadata = (table.schema.metadata or {}).items()
            table = table.replace_schema_metadata({key: json_mutated(value, chance) for key, value in metadata})
        case 2:
            table = chance.choice([table.drop_columns(table.column_names[place]), table.slice(0, 0), table.slice(1)])
        case 3:
            names = [
                chance.choice(["x", "", name]) if at == place else name for at, name in enumerate(table.column_names)
            ]
            table = table.rename_columns(names)
        case 4:
            column = chance.choice(
                [pa.nulls(len(table)), pa.array([chance.choice([1, "x", 0.5, [1], {"a": 1}])] * len(table))]
            )
            table = table.set_column(place, table.column_names[place], column)
        case _:
            rows = table.to_pylist()
            row = chance.randrange(len(rows))
            rows[row] = changed(rows[row], chance)
            with suppress(pa.ArrowException, AttributeError, TypeError, ValueError, OverflowError):  # not to be written
                table = pa.Table.from_pylist(rows, table.schema)
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def code_mutated(content: bytes, chance: random.Random) -> bytes:
    """Pieces of templates put in anywhere."""
    text = content.decode()
    for _ in range(chance.choice([1, 2, 3, 5])):
        place = chance.randrange(len(text) + 1)
        text = text[:place] + chance.choice(CODE) + text[place + chance.choice([0, 0, 1, 5]) :]
    return text.encode()


# readers
def readers(made: Pipeline, folder: Path) -> dict[str, Reader]:
    """Every reader, with files that it reads."""
    from folora.adapter import load_checkpoint
    from folora.base import check_model, open_base
    from folora.commands.forget import layer_changes, put_on
    from folora.covariance import StoredMoments
    from folora.evaluate import export_of
    from folora.params import Params, load_params
    from folora.records import read_record
    from folora.report import inputs
    from folora.resume import SEAL_FILE, last_state, seal
    from folora.rows import read_rows, render
    from folora.serving import usage_of
    from folora.spectrum import read_spectrum
    from folora.storage import check_manifest, read_json, read_table, read_tensors
    from folora.task import chat_segments
    from folora.train import TrainInputs, read_task_rows, run_manifest

    base, params, loading = made.base, made.params, made.base.loading
    model, tokenizer, spectrum = base.load_model(), base.load_tokenizer(), read_spectrum(made.spectrum)
    run_name, run = next(iter(params.runs.items()))

    def one(name: str, content: bytes | Path, read: Callable[[Path], Any], share: float = 1.0) -> Reader:
        content = content.read_bytes() if isinstance(content, Path) else content
        return Reader({name: content}, lambda place: read(place / name), [name], share)

    def several(source: Path, read: Callable[[Path], Any], share: float, *patterns: str) -> Reader:
        files = {
            str(path.relative_to(source)): path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()
        }
        mutated = [name for name in files if any(Path(name).match(pattern) for pattern in patterns or ("*",))]
        return Reader(files, read, mutated, share)

    # an adapter of strangers, and a run of ours
    adapter = folder / "adapter"
    write_adapter(made, adapter)
    (folder / "run" / "checkpoints" / "6").mkdir(parents=True)
    (folder / "run" / "checkpoints" / "6" / "x").touch()
    manifest = run_manifest(params, run_name, base, TrainInputs(made.task, made.proxy, made.heldout, made.spectra))
    write_json(folder / "run" / "manifest.json", manifest)
    history = pa.Table.from_pylist([{"step": 1, "loss": 0.5, "penalty": 0.1, "utility": 0.2, "kl": 0.01}])
    write_table(
        folder / "run" / "history.parquet", history, {"artefact": "history", "run": run_name, "gates": {"x": 0.5}}
    )
    write_results(folder / "report", ["subtraction"])
    (folder / "state" / "checkpoint-6").mkdir(parents=True)
    (folder / "state" / "checkpoint-6" / "weights").write_text("x")
    seal(folder / "state", folder / "state" / "checkpoint-6")
    of_report = Params.model_validate(report_values(["subtraction"]))
    rows = read_rows(str(made.world / "subtraction"), "x").select(range(3))
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    chat = b"{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{% endfor %}"
    chat += b"{% if add_generation_prompt %}<assistant>{% endif %}"
    table = folder / "rows"
    table.mkdir()
    rows.to_csv(str(table / "x.csv"))
    rows.to_json(str(table / "x.jsonl"))
    rows.to_parquet(str(table / "x.parquet"))

    def read_report(place: Path) -> None:
        inputs.read_inputs(of_report, place, None, None)
        for method in ("base", "lora"):
            inputs.read_answers(place / method, "subtraction", ("base", 0))
            inputs.read_tokens(place / method, ("base", 0))

    def read_moments(place: Path) -> None:
        moments = StoredMoments([(place, {})])
        for name in moments.groups:
            moments.read(name)

    def read_adapter(place: Path) -> None:
        layer_changes(put_on(copy.deepcopy(model), place), spectrum)

    def read_chat(place: Path) -> None:
        tokenizer.chat_template = place.read_bytes().decode(errors="replace")
        chat_segments(0, turns, tokenizer)

    def read_turns(place: Path) -> None:
        tokenizer.chat_template = chat.decode()
        chat_segments(0, read_json(place), tokenizer)

    def template(place: Path) -> None:
        render(rows, [place.read_bytes().decode(errors="replace")], "x")

    def task_row(place: Path) -> None:
        read_task_rows(params, run, base, place)

    def read_checkpoint(path: Path) -> None:
        load_checkpoint(copy.deepcopy(model), path.parent)

    def manifest_read(place: Path) -> None:
        check_manifest(place, read_json(place), artefact="run", run=run_name)

    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.float64)}
    small = safetensors.torch.save(tensors, {METADATA_KEY: '{"artefact": "x", "format": 1, "list": [1, {"a": null}]}'})
    tiny_yaml = json.dumps(_yaml((ROOT / "workflow" / "presets" / "tiny.yaml").read_bytes())).encode()
    weights = {name: module.weight.detach() for name, module in list(model.named_modules()) if name.endswith("q_proj")}
    saved = safetensors.torch.save(weights, {METADATA_KEY: '{"artefact": "weights", "format": 1}'})
    small_moments, small_spectrum = (_first_inputs(path) for path in (made.task_moments, made.spectrum))
    config = (adapter / "adapter_config.json").read_bytes()
    return {
        "params": one("params.yaml", tiny_yaml, load_params, 0.5),
        "json": one("x.json", json.dumps(manifest).encode(), manifest_read, 6),
        "tensors": one("x.safetensors", small, partial(read_tensors, artefact="x"), 4),
        "moments": one("x.safetensors", small_moments, read_moments, 2),
        "spectrum": one("x.safetensors", small_spectrum, read_spectrum, 2),
        "report spectrum": one("x.safetensors", small_spectrum, inputs.read_figures, 2),
        "table": one("x.parquet", made.proxy / "0.parquet", partial(read_table, artefact="proxy"), 2),
        "task rows": one("x.parquet", made.task, task_row, 0.3),
        "report": several(folder / "report", read_report, 0.5, "*.parquet"),
        "run": several(folder / "run", lambda place: read_record(place, [], {}), 2, "*.json", "*.parquet"),
        "export": one("adapter_config.json", config, lambda path: export_of(path.parent), 2),
        "serving": one("adapter_config.json", config, lambda path: usage_of("x", path.parent, "m"), 2),
        "adapter": several(adapter, read_adapter, 1),
        "checkpoint": one("weights.safetensors", saved, read_checkpoint, 0.5),
        "state": several(folder / "state", last_state, 1, f"*/{SEAL_FILE}"),
        "base": several(made.foundation, open_base, 1),
        "model folder": several(made.foundation, lambda place: check_model(place, loading), 1, "*.json"),
        "template": one("x.jinja", b"{{ prompt }} = {{ response }}", template, 2),
        "chat template": one("x.jinja", chat, read_chat, 1),
        "chat": one("x.json", json.dumps(turns).encode(), read_turns, 2),
        **{
            f"rows.{kind}": one(f"x.{kind}", table / f"x.{kind}", lambda path: read_rows(str(path), "x"), share)
            for kind, share in (("csv", 0.5), ("jsonl", 0.5), ("parquet", 0.1))
        },
    }


def _first_inputs(path: Path) -> bytes:
    """An artefact of moments or spectra with the first of its layer inputs only, for small cases."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    manifest = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][METADATA_KEY])
    name = next(iter(manifest["groups"]))
    for key in ("groups", "health", "widths"):
        if key in manifest:
            manifest[key] = {name: manifest[key][name]}
    tensors = {key: tensor for key, tensor in safetensors.torch.load(content).items() if name in key}
    return safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(manifest)})


def write_adapter(made: Pipeline, folder: Path) -> None:
    """A LoRA adapter with random weights, made by PEFT alone."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(made.base.load_model(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)


# watching
class Watch:
    """Sees by Python's audit events what a case does outside of its folder; libraries in C only read."""

    WRITES = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"})
    FORBIDDEN = frozenset(
        {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.bind"}
    )

    def __init__(self) -> None:
        self.allowed: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event in self.FORBIDDEN:
            self.seen.append(f"{event} {arguments[0]!r}")
        elif event in self.WRITES or (event == "open" and self._writes(arguments)):
            path = arguments[0]
            if isinstance(path, str | bytes | os.PathLike):
                place = os.path.realpath(os.fsdecode(path))
                if not place.startswith(f"{self.allowed}{os.sep}") and place not in (str(self.allowed), os.devnull):
                    self.seen.append(f"{event} {place}")

    @staticmethod
    def _writes(arguments: tuple[Any, ...]) -> bool:
        _, mode, flags = arguments
        return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Within the block nothing outside of the folder may be touched."""
        self.allowed, self.seen = Path(os.path.realpath(folder)), []
        try:
            yield
        finally:
            self.allowed = None


WATCH = Watch()


def too_long(*_: Any) -> None:
    """The handler of the alarm."""
    raise TooLong


# the loop
def fuzz(name: str, reader: Reader, cases: range, seed: int, folder: Path, failures: Path | None = None) -> Outcome:
    """Run cases of one reader in a folder of their own."""
    outcome = Outcome(name)
    place = folder / "case"
    others = list(reader.files.values())
    before = signal.signal(signal.SIGPROF, too_long)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.monotonic()
    with chdir(folder):
        write_missing(reader, place)
        reader.read(place)  # as long as nothing is wrong with it
        for number in cases:
            chance = random.Random(f"{seed} {name} {number}")
            write_missing(reader, place)
            chosen = chance.choice(reader.mutated)
            (place / chosen).write_bytes(mutate(chosen, reader.files[chosen], others, chance))
            problem = attempt(reader, place, folder, outcome)
            if problem:
                if problem not in outcome.problems and failures is not None:
                    kept = failures / f"{name} {number}".replace(" ", "-")
                    shutil.copytree(place, kept, dirs_exist_ok=True)
                    print(f"{name} {number}: {problem}\n  {chosen} in {kept}", flush=True)
                outcome.problems[problem] += 1
            if (place / chosen).exists():
                (place / chosen).write_bytes(reader.files[chosen])
    signal.signal(signal.SIGPROF, before)
    shutil.rmtree(place, ignore_errors=True)
    outcome.seconds = time.monotonic() - begun
    outcome.growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    if outcome.growth > GROWTH:
        outcome.problems[f"memory grew by {outcome.growth / 2**20:.0f} MiB"] += 1
    return outcome


def write_missing(reader: Reader, place: Path) -> None:
    """Write the files that are not there: readers of folders may remove what is damaged."""
    for path, content in reader.files.items():
        if not (place / path).exists():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_bytes(content)


def attempt(reader: Reader, place: Path, folder: Path, outcome: Outcome) -> str | None:
    """Run one case; returns what is wrong with how it ended."""
    begun = time.monotonic()
    problem = None
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with WATCH.over(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(place)
        outcome.read += 1
    except FoLoRAError:
        outcome.refused += 1
    except TooLong:
        problem = f"took more than {SECONDS:g} s"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of Rust are no Exception
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "folora" in Path(f.filename).parts] or frames
        problem = f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}: {str(error)[:150]!r}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    outcome.cases += 1
    outcome.slowest = max(outcome.slowest, time.monotonic() - begun)
    return problem or (WATCH.seen[0] if WATCH.seen else None)


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries that talk of what they read are silenced, and kept from the network."""
    before = os.environ.copy()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    sys.dont_write_bytecode, kept = True, sys.dont_write_bytecode
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        sys.dont_write_bytecode = kept
        os.environ.clear()
        os.environ.update(before)


def counts(chosen: dict[str, Reader], count: int) -> dict[str, int]:
    """How many of so many cases each reader gets."""
    whole = sum(reader.share for reader in chosen.values())
    return {name: max(1, round(count * reader.share / whole)) for name, reader in chosen.items()}


def fuzz_all(made: Pipeline, folder: Path, count: int, seed: int) -> list[Outcome]:
    """Share cases among all readers."""
    with quiet():
        chosen = readers(made, folder)
        shares = counts(chosen, count)
        return [fuzz(name, reader, range(shares[name]), seed, folder) for name, reader in chosen.items()]


def main() -> None:
    """Fuzz as often as asked; the exit code says whether a case ended badly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", help="this one only")
    parser.add_argument("--case", type=int, help="this one only, of --reader")
    parser.add_argument(
        "--failures", type=Path, default=Path("fuzz-failures"), help="where files of bad cases are kept"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    with quiet(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        chosen = readers(made_pipeline(folder / "pipeline"), folder)
        if options.reader:
            chosen = {options.reader: chosen[options.reader]}
        outcomes = []
        for reader, share in counts(chosen, options.count).items():
            cases = range(share) if options.case is None else range(options.case, options.case + 1)
            outcomes.append(run_apart(reader, chosen[reader], cases, options.seed, folder, options.failures.absolute()))
            print(outcomes[-1].line(), flush=True)
    total, wrong = (sum(each) for each in zip(*((o.cases, sum(o.problems.values())) for o in outcomes), strict=True))
    print(f"{total:,} cases, {wrong} of them ended badly")
    sys.exit(bool(wrong))


def run_apart(name: str, reader: Reader, cases: range, seed: int, folder: Path, failures: Path) -> Outcome:
    """The cases of one reader in a process of their own, which a fault in a library may end."""
    answer, ask = os.pipe()
    child = os.fork()
    if not child:
        try:
            outcome = fuzz(name, reader, cases, seed, folder, failures)
            with os.fdopen(ask, "w") as pipe:
                json.dump(vars(outcome), pipe)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)  # the folder is the parent's to remove
    os.close(ask)
    with os.fdopen(answer) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if said:
        return Outcome(**(values := json.loads(said)) | {"problems": Counter(values["problems"])})
    kept = failures / f"{name}-ended"
    with suppress(FileNotFoundError):
        shutil.copytree(folder / "case", kept, dirs_exist_ok=True)
    return Outcome(name, problems=Counter([f"the process ended with {status}; the files are in {kept}"]))


def made_pipeline(folder: Path) -> Pipeline:
    """All stages before training, of the tiny preset."""
    from folora.foundation import train_foundation
    from folora.params import Params
    from folora.world import write_world

    values = dict(_yaml((ROOT / "workflow" / "presets" / "tiny.yaml").read_bytes()))
    params = Params.model_validate(values)
    train_foundation(params.foundation, params.world, folder / "foundation")
    write_world(params.world, folder / "world")
    with chdir(folder):
        return make_pipeline(folder, values)


if __name__ == "__main__":
    main()
