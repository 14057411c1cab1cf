"""The reference of ``params.yaml``: every key, what it may be and what it means, read off the types."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ByteSize, TypeAdapter

from folora.errors import FoLoRAError
from folora.methods import Method, kinds
from folora.params import Params

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel

Schema = dict[str, Any]

HEAD = ["key", "allowed", "meaning"]
METHODS = "methods.NAME"
BOUNDS = {
    "exclusiveMinimum": "greater than {}",
    "minimum": "at least {}",
    "exclusiveMaximum": "less than {}",
    "maximum": "at most {}",
}
SIZE = TypeAdapter(ByteSize).json_schema()["anyOf"][0]["pattern"]
TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


@dataclass(frozen=True)
class Entry:
    """One key of params.yaml, with NAME for what the user names."""

    key: str
    allowed: str
    meaning: str

    def cells(self) -> list[str]:
        """Cells of a table."""
        return [self.key, self.allowed, self.meaning]


def reference(prefix: str = "") -> list[Entry]:
    """Every key, in the order of the file, or those at and below ``prefix``.

    Raises:
        FoLoRAError: there is no such key.
    """
    schema = Params.model_json_schema()
    entries: list[Entry] = []
    for entry in _table(schema, schema["$defs"], "", {}):
        entries += _methods() if entry.key == METHODS else [entry]
    found = [
        one for one in entries if not prefix or one.key == prefix or one.key.startswith((f"{prefix}.", f"{prefix} ("))
    ]
    if not found:
        raise FoLoRAError(f"{prefix}: params.yaml has no such key; `folora params` lists all, with NAME for your names")
    return found


def markdown(entries: list[Entry]) -> str:
    """A page with a section for each key of the first level."""
    lines = ["# Parameters", "", "What `params.yaml` may hold; made by `folora params --markdown`.", ""]
    lines += ["NAME stands for a name of your own. A value without a default has to be in the file."]
    section = None
    for entry in entries:
        top = re.split(r"[. ]", entry.key)[0]
        if top != section:
            section = top
            lines += ["", f"## {section}", "", f"| {' | '.join(HEAD)} |", "| --- | --- | --- |"]
        cells = [f"`{entry.key}`", entry.allowed, entry.meaning]
        lines.append("| {} |".format(" | ".join(cell.replace("|", "\\|") for cell in cells)))
    return "\n".join(lines) + "\n"


def _methods() -> Iterator[Entry]:
    """The kinds, the options that go with every kind, and each kind's own."""
    yield Entry(f"{METHODS}.kind", ", ".join(kinds()), "`folora methods` says what each is")
    yield from _options(Method, METHODS, set())
    for kind, cls in sorted(kinds().items()):
        yield from _options(cls, f"{METHODS} ({kind})", {*Method.model_fields, "kind"})


def _options(cls: type[BaseModel], prefix: str, inherited: set[str]) -> Iterator[Entry]:
    schema = cls.model_json_schema()
    schema["properties"] = {name: of for name, of in schema["properties"].items() if name not in inherited}
    meanings = {name: text for parent in reversed(cls.__mro__) for name, text in _attributes(parent).items()}
    return _table(schema, schema.get("$defs", {}), prefix, meanings)


def _attributes(cls: type) -> dict[str, str]:
    """The section ``Attributes:`` of a class's own docstring."""
    _, _, section = inspect.cleandoc(cls.__dict__.get("__doc__") or "").partition("Attributes:\n")
    joined = re.sub(r"\n {8,}", " ", section)
    return dict(re.findall(r"^ {4}(\w+): (.+)$", joined, re.MULTILINE))


def _table(schema: Schema, defs: Schema, prefix: str, meanings: dict[str, str]) -> Iterator[Entry]:
    """The entries of an object's properties."""
    for name, value in schema.get("properties", {}).items():
        key = f"{prefix}.{name}" if prefix else name
        yield from _entry(key, value, defs, meanings.get(name, ""))


def _entry(key: str, schema: Schema, defs: Schema, meaning: str) -> Iterator[Entry]:
    said = meaning or schema.get("description", "")
    schema = _resolved(schema, defs)
    if "discriminator" in schema:
        tag = schema["discriminator"]["propertyName"]
        for value, member in schema["discriminator"]["mapping"].items():
            rest = _resolved({"$ref": member}, defs)
            properties = {name: of for name, of in rest["properties"].items() if name != tag}
            yield Entry(f"{key}.{tag}", value, _plain(rest["description"]))
            yield from _table({"properties": properties}, defs, f"{key} ({value})", {})
    elif "properties" in schema and key != METHODS:
        yield from _table(schema, defs, key, {})
    elif schema.get("type") == "object" and key != METHODS:
        (of_any_name,) = schema["patternProperties"].values()
        yield from _entry(f"{key}.NAME", of_any_name, defs, "")
    else:
        default = schema.get("default", ...)
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        yield Entry(key, _allowed(schema, defs) + ("" if default is ... else f"; default {shown}"), _plain(said))


def _resolved(schema: Schema, defs: Schema) -> Schema:
    """The schema that a ``$ref`` stands for, with what is said beside it."""
    if "$ref" not in schema:
        return schema
    beside = {key: value for key, value in schema.items() if key != "$ref"}
    return defs[schema["$ref"].rpartition("/")[2]] | beside


def _plain(description: str) -> str:
    """The first line of a docstring or description, as the other meanings are written."""
    return description.partition("\n")[0].replace("``", "`").removesuffix(".")


def _allowed(schema: Schema, defs: Schema) -> str:
    """What a value may be, in words."""
    schema = _resolved(schema, defs)
    if "anyOf" in schema:
        return "; or ".join(_allowed(member, defs) for member in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return ", ".join(repr(value) if value == "" else str(value) for value in schema["enum"])
    if "properties" in schema:
        inner = (f"{name}: {_allowed(value, defs)}" for name, value in schema["properties"].items())
        return f"{{{', '.join(inner)}}}"
    if schema.get("type") == "array":
        return f"list of {_allowed(schema['items'], defs)}"
    if "pattern" in schema:
        return "size such as 2 GB" if schema["pattern"] == SIZE else "name"
    bounds = (text.format(f"{schema[bound]:,}") for bound, text in BOUNDS.items() if bound in schema)
    return ", ".join([TYPES[schema["type"]], *bounds])
