"""What a device tells about itself: how busy, how full, how warm, how hungry. NVML, jtop or sysfs, whichever answers.

Integrated GPUs (Jetson) have no NVML memory figures: there the memory is the machine's own, and the rest comes from
jtop's daemon where it runs, else from sysfs (devfreq load in per mille, thermal zones in m°C, INA3221 rails in mV, mA).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at a device; None for what the platform does not tell."""

    utilization_ratio: float | None = None
    """0 to 1."""
    used_bytes: int | None = None
    """In use on the whole device, by every program."""
    own_bytes: int | None = None
    """Of that, by this process and its children."""
    temperature_celsius: float | None = None
    power_watts: float | None = None

    def completed(self, other: Reading) -> Reading:
        """With the other's figures where this one has none."""
        pairs = {each.name: (getattr(self, each.name), getattr(other, each.name)) for each in fields(self)}
        return Reading(**{name: other if mine is None else mine for name, (mine, other) in pairs.items()})


Source = Callable[[], Reading]


class Sensors:
    """The last look at a device."""

    def __init__(self, found: Iterable[Source]) -> None:
        self._sources = list(found)
        self.latest = Reading()

    def look(self) -> Reading:
        """Look again. Takes up to a second, so not on the event loop; what fails tells nothing. Never raises."""
        reading = Reading()
        for source in self._sources:
            with suppress(Exception):
                reading = reading.completed(source())
        self.latest = reading
        return reading


def sources(device: str, *, shared: bool, sysfs: Path = Path("/sys")) -> list[Source]:
    """Where the figures of a device come from, best first.

    Args:
        device: torch device.
        shared: whether it has no memory of its own.
        sysfs: for tests.
    """
    if device == "cpu":
        return [machine]
    if not shared:
        return [lambda: nvml(device)]
    return [jtop, lambda: from_sysfs(sysfs), machine_memory]


def machine() -> Reading:
    """The CPU of this machine as a device."""
    return Reading(utilization_ratio=psutil.cpu_percent() / 100).completed(machine_memory())


def machine_memory() -> Reading:
    """Memory that is not available, and what our processes hold of it."""
    memory = psutil.virtual_memory()
    return Reading(used_bytes=memory.total - memory.available, own_bytes=sum(each.rss for each in _ours()))


def _ours() -> Iterable[Any]:
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.Error):
            yield process.memory_info()


def nvml(device: str) -> Reading:
    """A discrete NVIDIA GPU, the one of CUDA_VISIBLE_DEVICES.

    Raises:
        Exception: NVML or its bindings are not there.
    """
    import pynvml  # noqa: PLC0415 - only GPU hosts need it

    pynvml.nvmlInit()
    try:
        handle = _handle(pynvml, device)
        mine = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
        processes = [each for each in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if each.pid in mine]
        return Reading(
            utilization_ratio=pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            used_bytes=pynvml.nvmlDeviceGetMemoryInfo(handle).used,
            own_bytes=sum(each.usedGpuMemory or 0 for each in processes),
            temperature_celsius=float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
            power_watts=pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        )
    finally:
        pynvml.nvmlShutdown()


def _handle(pynvml: Any, device: str) -> Any:
    index = int(device.partition(":")[2] or 0)
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    wanted = named[index] if index < len(named) else str(index)
    if wanted.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(wanted))
    return pynvml.nvmlDeviceGetHandleByUUID(wanted)


def jtop() -> Reading:
    """What jtop's daemon tells of a Jetson.

    Raises:
        Exception: its client is not installed, or the daemon does not answer.
    """
    from jtop import jtop as client  # noqa: PLC0415 - part of a board's own software

    with client() as board:
        return from_jtop(board.gpu, board.temperature, board.power)


def from_jtop(gpu: dict[str, Any], temperature: dict[str, Any], power: dict[str, Any]) -> Reading:
    """Jtop's own dicts: load in per cent, °C, mW."""
    loads = [each["status"]["load"] for each in gpu.values() if "load" in each.get("status", {})]
    warm = [each["temp"] for name, each in temperature.items() if name.lower() == "gpu" and each.get("online", True)]
    total = power.get("tot", {}).get("power")
    return Reading(
        utilization_ratio=max(loads) / 100 if loads else None,
        temperature_celsius=warm[0] if warm else None,
        power_watts=total / 1000 if total is not None else None,
    )


def from_sysfs(root: Path) -> Reading:
    """A Jetson without jtop.

    Args:
        root: /sys.
    """
    loads = [*root.glob("class/devfreq/*gpu*/device/load"), *root.glob("class/devfreq/*.g[pa]*/device/load")]
    load = _number(loads)
    zones = [
        zone / "temp" for zone in root.glob("class/thermal/thermal_zone*") if "gpu" in _text(zone / "type").lower()
    ]
    warm = _number(zones)
    return Reading(
        utilization_ratio=None if load is None else load / 1000,
        temperature_celsius=None if warm is None else warm / 1000,
        power_watts=_rail(root, "VDD_IN"),
    )


def _rail(root: Path, wanted: str) -> float | None:
    """Watts of one INA3221 channel, by its label."""
    for label in sorted(root.glob("class/hwmon/hwmon*/in*_label")):
        if _text(label) == wanted:
            channel = label.name[2:].partition("_")[0]
            volts = _number([label.with_name(f"in{channel}_input")])
            amperes = _number([label.with_name(f"curr{channel}_input")])
            return None if volts is None or amperes is None else volts * amperes / 1e6
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _number(files: Iterable[Path]) -> int | None:
    for file in files:
        if (text := _text(file)).lstrip("-").isdigit():
            return int(text)
    return None
