"""Energy that this machine has taken, where it counts it: processors by RAPL, GPUs by NVML."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")  # Linux's view of RAPL; the kernel shows it to root only


class EnergyMeter:
    """Joules since it was made, of the whole machine: of stages that run at once each counts them all."""

    def __init__(self) -> None:
        self._begun = _counters()

    def joules(self) -> float | None:
        """None where nothing is counted, or a counter has begun anew."""
        now = _counters()
        spent = [now[name] - begun for name, begun in self._begun.items() if name in now]
        return sum(spent) if spent and min(spent) >= 0 else None


def _counters() -> dict[str, float]:
    """Joules by what counts them."""
    found = {}
    for package in POWERCAP.glob("intel-rapl:[0-9]*"):
        if package.name.count(":") == 1:  # the others are parts of a package
            with suppress(OSError, ValueError):
                found[package.name] = int((package / "energy_uj").read_text()) / 1e6
    return found | _gpus()


def _gpus() -> dict[str, float]:
    try:
        import pynvml
    except ImportError:
        return {}
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        return {f"gpu {n}": pynvml.nvmlDeviceGetTotalEnergyConsumption(one) / 1e3 for n, one in enumerate(handles)}
    return {}
