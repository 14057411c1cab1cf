"""FoLoRA: fine-tune a language model with LoRA without losing what it already knew (arXiv 2606.00132).

For a training loop of your own: ``second_moments``, ``solve_spectrum``, ``gated_adam`` and ``forgetting_meter``, from
``library``. The mathematics stands in ``moments``, ``pencil``, ``gate``, ``optimizer`` and ``meter``; a stage of the
pipeline in the module of its name; the command line in ``cli``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from folora.library import forgetting_meter, gated_adam, second_moments, solve_spectrum

__all__ = ["forgetting_meter", "gated_adam", "second_moments", "solve_spectrum"]


def __getattr__(name: str) -> Any:
    """Import the library when it is asked for: torch takes seconds, and most commands need none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from folora import library

    return getattr(library, name)
