"""A fake libnvidia-ml.so.1, as ctypes sees it: what pynvml loads in its place, with GPUs that fail as told.

    library = FakeNvml(FakeGpu(), FakeGpu(power=NOT_SUPPORTED))
    library.stand_in(monkeypatch)      # from here on the real pynvml speaks to it

A value that is an `Errno` is what the call answers instead. Nothing of pynvml is patched but the place where it opens
the library.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pynvml  # type: ignore[import-untyped]
import pytest


class Errno(NamedTuple):
    """A return code of NVML's."""

    code: int


OK = 0  # NVML_SUCCESS
INVALID = Errno(pynvml.NVML_ERROR_INVALID_ARGUMENT)
LOST = Errno(pynvml.NVML_ERROR_GPU_IS_LOST)
NOT_SUPPORTED = Errno(pynvml.NVML_ERROR_NOT_SUPPORTED)
NOT_FOUND = Errno(pynvml.NVML_ERROR_NOT_FOUND)
NOT_LOADED = Errno(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
UNKNOWN = Errno(pynvml.NVML_ERROR_UNKNOWN)
_MIB = 1024 * 1024


@dataclass
class FakeGpu:
    """One GPU; a fault of `handle` is met before anything can be asked of it."""

    name: bytes | Errno = b"NVIDIA H100 80GB HBM3"
    total_mib: int | Errno = 81559
    used_mib: int = 1024
    busy: int | Errno = 42
    celsius: int | Errno = 37
    milliwatts: int | Errno = 71_500
    handle: Errno | None = None
    uuid: bytes = b"GPU-0"
    has_mig: bool = False
    slices: list[FakeGpu | None] = field(default_factory=list)  # None: a place without a slice
    ids: tuple[int, int] = (0, 0)  # a slice's GPU instance and compute instance
    total_bytes: int | None = None  # in place of total_mib
    used_bytes: int | None = None

    def fall_off_the_bus(self) -> None:
        """Return everything with NVML_ERROR_GPU_IS_LOST."""
        self.name = self.total_mib = self.busy = self.celsius = self.milliwatts = LOST


@dataclass
class FakeNvml:
    """The library. `refusal` is what nvmlInit answers; `hangs` is what every call waits for."""

    gpus: list[FakeGpu] = field(default_factory=lambda: [FakeGpu()])
    refusal: Errno | None = None
    inits: int = 0
    shutdowns: int = 0
    hangs: threading.Event | None = None
    _devices: list[FakeGpu] = field(default_factory=list)

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be what pynvml opens, until the test ends."""
        monkeypatch.setattr(pynvml, "CDLL", lambda _: self)
        for name, value in (("nvmlLib", None), ("_nvmlGetFunctionPointer_cache", {}), ("_nvmlLib_refcount", 0)):
            monkeypatch.setattr(pynvml, name, value)

    def nvmlInitWithFlags(self, _flags: int) -> int:  # noqa: N802 - NVML's name, as all below
        self._hang()
        self.inits += 1
        return self.refusal.code if self.refusal else OK

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.shutdowns += 1
        return OK

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        return _answer(count, len(self.gpus))

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, device: Any) -> int:  # noqa: N802
        if index.value >= len(self.gpus):
            return INVALID.code
        if (fault := self.gpus[index.value].handle) is not None:
            return fault.code
        return self._hand_out(device, self.gpus[index.value])

    def nvmlDeviceGetMigMode(self, device: Any, current: Any, pending: Any) -> int:  # noqa: N802
        if not self._gpu(device).has_mig:
            return NOT_SUPPORTED.code
        pending._obj.value = 1
        return _answer(current, 1)

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Any, count: Any) -> int:  # noqa: N802
        return _answer(count, 7 if self._gpu(device).has_mig else 0)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Any, place: ctypes.c_uint, mig: Any) -> int:  # noqa: N802
        slices = self._gpu(device).slices
        found = slices[place.value] if place.value < len(slices) else None
        return NOT_FOUND.code if found is None else self._hand_out(mig, found)

    def nvmlDeviceGetUUID(self, device: Any, uuid: Any, _length: Any) -> int:  # noqa: N802
        uuid.value = self._gpu(device).uuid
        return OK

    def nvmlDeviceGetGpuInstanceId(self, device: Any, number: Any) -> int:  # noqa: N802
        return _answer(number, self._gpu(device).ids[0])

    def nvmlDeviceGetComputeInstanceId(self, device: Any, number: Any) -> int:  # noqa: N802
        return _answer(number, self._gpu(device).ids[1])

    def nvmlDeviceGetName(self, device: Any, name: Any, _length: ctypes.c_uint) -> int:  # noqa: N802
        value = self._gpu(device).name
        if isinstance(value, Errno):
            return value.code
        name.value = value
        return OK

    def nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> int:  # noqa: N802
        gpu = self._gpu(device)
        if isinstance(gpu.total_mib, Errno):
            return gpu.total_mib.code
        total = gpu.total_mib * _MIB if gpu.total_bytes is None else gpu.total_bytes
        used = gpu.used_mib * _MIB if gpu.used_bytes is None else gpu.used_bytes
        memory._obj.total, memory._obj.used = total, used
        return OK

    def nvmlDeviceGetUtilizationRates(self, device: Any, rates: Any) -> int:  # noqa: N802
        busy = self._gpu(device).busy
        if isinstance(busy, Errno):
            return busy.code
        rates._obj.gpu = busy
        return OK

    def nvmlDeviceGetTemperature(self, device: Any, _sensor: Any, celsius: Any) -> int:  # noqa: N802
        return _answer(celsius, self._gpu(device).celsius)

    def nvmlDeviceGetPowerUsage(self, device: Any, milliwatts: Any) -> int:  # noqa: N802
        return _answer(milliwatts, self._gpu(device).milliwatts)

    def _gpu(self, device: Any) -> FakeGpu:
        self._hang()
        return self._devices[(ctypes.cast(device, ctypes.c_void_p).value or 1) - 1]

    def _hand_out(self, device: Any, gpu: FakeGpu) -> int:
        """Answer a handle, which is the device's number; the same one each time."""
        numbers = [number for number, each in enumerate(self._devices) if each is gpu]
        if not numbers:
            numbers = [len(self._devices)]
            self._devices.append(gpu)
        ctypes.cast(ctypes.pointer(device._obj), ctypes.POINTER(ctypes.c_void_p))[0] = numbers[0] + 1
        return OK

    def _hang(self) -> None:
        if self.hangs is not None:
            self.hangs.wait()


def _answer(reference: Any, value: int | Errno) -> int:
    if isinstance(value, Errno):
        return value.code
    reference._obj.value = value
    return OK
