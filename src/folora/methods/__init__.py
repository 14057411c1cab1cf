"""Methods of forgetting-aware fine-tuning, one file each, found by their ``kind``.

To add one: write a file here with a subclass of ``Method``, and name its kind under ``methods:`` in params.yaml.
Options that only some runs need have the paper's value, or none, as their default; see docs/decisions/0005.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from pydantic import ValidationError

from folora.errors import describe
from folora.methods.base import Method


def kinds() -> dict[str, type[Method]]:
    """Every method class of this package, by kind."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found: dict[str, type[Method]] = {}
    for cls in sorted(_subclasses(Method), key=lambda cls: cls.__name__):
        if cls.has_kind() and found.setdefault(cls.kind_name(), cls) is not cls:
            raise TypeError(f"two methods have the kind {cls.kind_name()!r}: {found[cls.kind_name()]} and {cls}")
    return found


def _subclasses(cls: type[Method]) -> set[type[Method]]:
    return {cls for child in cls.__subclasses__() for cls in {child, *_subclasses(child)}}


def describe_kinds() -> list[dict[str, Any]]:
    """One record a kind: ``kind``, ``name``, ``paper``, ``trains``, ``freezes``, ``export``, its own ``options``."""
    return [
        {
            "kind": kind,
            "name": cls.__name__,
            "paper": cls.paper,
            "trains": cls.trains,
            "freezes": cls.freezes,
            "export": cls.export,
            "options": [name for name in cls.model_fields if name not in Method.model_fields and name != "kind"],
        }
        for kind, cls in sorted(kinds().items())
    ]


def method_from(name: str, section: Any) -> Method:
    """Build the method of one entry of ``methods:``.

    Raises:
        ValueError: no or an unknown kind, or a parameter that the kind refuses; names the key.
    """
    known = kinds()
    kind = section.get("kind") if isinstance(section, dict) else None
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"methods.{name}.kind: {kind!r} is not one of {', '.join(known)}")
    try:
        return known[kind].model_validate(section)
    except ValidationError as error:
        raise ValueError(f"methods.{name}.{describe(error)}") from error


__all__ = ["Method", "describe_kinds", "kinds", "method_from"]
