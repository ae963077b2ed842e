"""What devices tell: recorded files of a Jetson, what jtop and NVML answer, and platforms that tell nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import psutil
import pytest

from services.residency.sensors import Reading, Sensors, from_jtop, from_sysfs, sources

ORIN = {
    "class/devfreq/17000000.gpu/device/load": "437",
    "class/devfreq/other/device/load": "999",
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": "51000",
    "class/thermal/thermal_zone1/type": "gpu-thermal",
    "class/thermal/thermal_zone1/temp": "48312",
    "class/hwmon/hwmon1/in1_label": "VDD_IN",
    "class/hwmon/hwmon1/in1_input": "5016",
    "class/hwmon/hwmon1/curr1_input": "1240",
    "class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV",
    "class/hwmon/hwmon1/in2_input": "5008",
    "class/hwmon/hwmon1/curr2_input": "320",
}


def board(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_a_jetsons_own_files(tmp_path: Path) -> None:
    found = from_sysfs(board(tmp_path, ORIN))
    assert (found.utilization_ratio, found.temperature_celsius) == (0.437, 48.312)
    assert found.power_watts == pytest.approx(5.016 * 1.240)


def test_files_that_are_missing_or_say_nothing_tell_nothing(tmp_path: Path) -> None:
    assert from_sysfs(tmp_path) == Reading()
    silent = board(tmp_path, {**ORIN, "class/devfreq/17000000.gpu/device/load": "N/A"})
    assert from_sysfs(silent).utilization_ratio is None


def test_what_jtop_answers() -> None:
    gpu = {"ga10b": {"type": "integrated", "status": {"load": 12.5}, "freq": {"cur": 624750}}}
    temperature = {"cpu": {"temp": 50.1, "online": True}, "gpu": {"temp": 47.9, "online": True}}
    power = {"rail": {"VDD_IN": {"power": 5100}}, "tot": {"volt": 5016, "power": 5210}}
    assert from_jtop(gpu, temperature, power) == Reading(0.125, None, None, 47.9, 5.21)
    assert from_jtop({}, {"gpu": {"temp": -256, "online": False}}, {}) == Reading()


def test_jtop_is_asked_before_sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        """A connection to the daemon."""

        gpu: ClassVar = {"ga10b": {"status": {"load": 12.5}}}
        temperature: ClassVar = {"gpu": {"temp": 47.9, "online": True}}
        power: ClassVar[dict[str, Any]] = {}

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing to close."""

    monkeypatch.setitem(sys.modules, "jtop", SimpleNamespace(jtop=Client))
    found = Sensors(sources("cuda:0", shared=True, sysfs=board(tmp_path, ORIN))).look()
    assert (found.utilization_ratio, found.temperature_celsius) == (0.125, 47.9)
    assert found.power_watts == pytest.approx(5.016 * 1.240)  # what jtop does not tell


def test_an_integrated_gpu_fills_the_gaps_of_jtop_from_sysfs_and_shares_the_machines_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jtop", None)
    memory = SimpleNamespace(total=100, available=30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    found = Sensors(sources("cuda:0", shared=True, sysfs=board(tmp_path, ORIN))).look()
    assert (found.utilization_ratio, found.temperature_celsius, found.used_bytes) == (0.437, 48.312, 70)
    assert found.own_bytes >= psutil.Process().memory_info().rss // 2


class Nvml:
    """NVML's bindings on a machine with two GPUs, of which ours is the second."""

    NVML_TEMPERATURE_GPU = 0
    nvmlInit = nvmlShutdown = staticmethod(lambda: None)  # noqa: N815
    nvmlDeviceGetHandleByIndex = nvmlDeviceGetHandleByUUID = staticmethod(lambda name: name)  # noqa: N815

    def __getattr__(self, name: str) -> Any:
        ours = SimpleNamespace(pid=os.getpid(), usedGpuMemory=7)
        found = {
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=80),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=100),
            "nvmlDeviceGetComputeRunningProcesses": [ours, SimpleNamespace(pid=1, usedGpuMemory=93)],
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetPowerUsage": 71500,
        }
        return lambda handle, *_: found[name] if handle == "GPU-b" else None


def test_nvml_tells_of_the_gpu_that_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b")
    assert Sensors(sources("cuda:0", shared=False)).look() == Reading(0.8, 100, 7, 61.0, 71.5)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Sensors(sources("cuda:0", shared=False)).look() == Reading()


def test_the_cpu_is_the_machine() -> None:
    sensors = Sensors(sources("cpu", shared=False))
    assert sensors.latest == Reading()
    found = sensors.look()
    assert found is sensors.latest
    assert 0 <= found.utilization_ratio <= 1
    assert found.own_bytes > 0
