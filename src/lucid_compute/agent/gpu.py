"""GPUs as NVML reports them: https://docs.nvidia.com/deploy/nvml-api. The only file that imports pynvml."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pynvml  # type: ignore[import-untyped]

from lucid_compute.agent.gpu_selection import ALL_GPUS, GpuSelection
from lucid_compute.registry.domain.node_state import GpuReading

REOPEN_SECONDS = 60.0
_BYTES_PER_MB = 1024 * 1024
_MAX_GPUS = 64
_HIGHEST_INDEX = 1023
_HOTTEST_CELSIUS = 200
_MOST_MILLIWATTS = 100_000_000
_MOST_BYTES = 2**50
_NO_FAULT = {
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NOT_FOUND,  # a place for a MIG slice that holds none
}
NO_DRIVER = "no NVIDIA driver is found here (libnvidia-ml.so.1 is missing)"
NO_VISIBLE_GPU = "CUDA_VISIBLE_DEVICES shows no GPU of this machine"
SLICES = "the GPUs are cut into MIG slices, and a server uses one: the smallest counts; name the right one with --gpus"
NO_SLICES = "MIG is on and a GPU has no slice, so no server can use it"


class GpuState(NamedTuple):
    """What NVML reports now. `gpus` None means unknown; `detail` is the reason, in a sentence.

    `main_memory_mb` is the machine's memory. It is set only where no GPU can be used, because models run there then.
    """

    gpus: tuple[GpuReading, ...] | None
    detail: str | None = None
    main_memory_mb: int | None = None

    @property
    def vram_mb(self) -> int | None:
        """The memory of all GPUs together; None unless it is known for each GPU."""
        totals = [gpu.memory_total_mb for gpu in self.gpus or ()]
        return sum(int(total) for total in totals if total) if totals and all(totals) else None

    @property
    def names(self) -> str | None:
        """The kinds of GPU, such as `NVIDIA A100-SXM4-80GB`; None unless it is known for each GPU."""
        names = [gpu.name for gpu in self.gpus or ()]
        return " + ".join(sorted({name for name in names if name})) if names and all(names) else None

    @property
    def utilization(self) -> float | None:
        """The mean utilisation of the GPUs, 0 to 1; None when it is unknown for all GPUs."""
        known = [gpu.utilization for gpu in self.gpus or () if gpu.utilization is not None]
        return sum(known) / len(known) if known else None


class _Device(NamedTuple):
    """A GPU, or a MIG slice of one: its number, and its handle, None when NVML gives none."""

    number: int
    handle: Any


class GpuReader:
    """Reads the GPUs repeatedly. A failed reading is None; NVML is reopened a while later.

    A call may block for as long as the driver likes. `ThreadedCall` keeps it away from the event loop.
    """

    def __init__(self, selection: GpuSelection = ALL_GPUS, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the GPUs of the selection."""
        self._selection = selection
        self._clock = clock
        self._is_open = False
        self._reopen_at: float | None = None
        self._refusal: str | None = None
        self._caution: str | None = None
        self._names: dict[int, str] = {}

    def read(self) -> GpuState:
        """Return what is known of each GPU now. Never raises."""
        if self._selection.hides_all:
            return GpuState(None, NO_VISIBLE_GPU, _main_memory_mb())
        if self._reopen_at is not None and self._clock() >= self._reopen_at:
            self._close()
        if not self._is_open and not self._open():
            return GpuState(None, self._refusal, _main_memory_mb() if self._refusal == NO_DRIVER else None)
        self._caution = None
        devices = self._devices()
        if not devices and self._selection.entries is not None:
            return GpuState(None, self._refusal or NO_VISIBLE_GPU)
        return GpuState(tuple(map(self._read_one, devices)), self._refusal or self._caution)

    def _open(self) -> bool:
        """Open NVML, unless that failed a moment ago."""
        if self._reopen_at is not None:
            return False
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self._note(error)
            self._refusal = _sentence(error)
            return False
        self._is_open, self._refusal = True, None
        return True

    def _close(self) -> None:
        """Close NVML and forget the last error. Only a reopened NVML shows a lost GPU or a reloaded driver."""
        self._reopen_at = None
        if self._is_open:
            self._is_open = False
            self._ask(pynvml.nvmlShutdown)
            self._reopen_at = None

    # --- which GPUs and slices count

    def _devices(self) -> list[_Device]:
        """Return the GPUs and MIG slices that count for the inference server."""
        count = min(int(self._ask(pynvml.nvmlDeviceGetCount) or 0), _MAX_GPUS)
        if self._selection.entries is None:
            gpus = [_Device(index, self._handle(index)) for index in range(count)]
            slices = [one for gpu in gpus for one in self._slices(gpu) or ()]
            return [self._smallest(slices)] if slices else [self._usable(gpu) for gpu in gpus]
        devices: list[_Device] = []
        for entry in self._selection.entries[:_MAX_GPUS]:
            found = self._find(entry, count)
            if found is None and self._selection.is_of_cuda:
                break  # CUDA reads its list up to the first entry that it can't use
            devices.append(found or _Device(len(devices), None))
            if self._selection.is_of_cuda and entry.startswith("MIG-"):
                break  # and a process of CUDA uses one slice
        return devices

    def _find(self, entry: str, count: int) -> _Device | None:
        """Return the GPU or slice of an index, `0`, of a slice's place on its GPU, `0:1`, or of a UUID; None: none."""
        index, _, place = entry.partition(":")
        if index.isdecimal():
            if int(index) >= count:
                return None if self._selection.is_of_cuda else _Device(int(index), None)
            gpu = _Device(int(index), self._handle(int(index)))
            if not place:
                return self._usable(gpu)
            slices = self._slices(gpu) or []
            return slices[int(place)] if place.isdecimal() and int(place) < len(slices) else None
        gpus = [_Device(index, self._handle(index)) for index in range(count)]
        if entry.startswith("MIG-"):
            slices = [one for gpu in gpus for one in self._slices(gpu) or ()]
            return next((one for one in slices if self._is_named(one, entry)), None)
        found = [gpu for gpu in gpus if (self._uuid(gpu) or "").startswith(entry)]
        return self._usable(found[0]) if len(found) == 1 else None  # a beginning that names two GPUs names none

    def _slices(self, gpu: _Device) -> list[_Device] | None:
        """Return the MIG slices of a GPU; None when MIG is off, so that the GPU is used as a whole."""
        mode = None if gpu.handle is None else self._ask(pynvml.nvmlDeviceGetMigMode, gpu.handle)
        if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return None
        places = int(self._ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, gpu.handle) or 0)
        found = (self._ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu.handle, place) for place in range(places))
        return [_Device(gpu.number, handle) for handle in found if handle is not None]

    def _usable(self, gpu: _Device) -> _Device:
        """Return the GPU as a server can use it: as a whole, or one slice of it; without a handle if it has none."""
        slices = self._slices(gpu)
        if slices is None:
            return gpu
        if not slices:
            self._caution = NO_SLICES
            return _Device(gpu.number, None)
        return self._smallest(slices)

    def _smallest(self, slices: Sequence[_Device]) -> _Device:
        """Return the smallest of the slices: which of them the server has is not known."""
        if len(slices) > 1:
            self._caution = SLICES
        return min(slices, key=lambda one: self._memory(one)[1] or 0)

    def _is_named(self, one: _Device, entry: str) -> bool:
        """Return whether a slice has this name: its UUID, or `MIG-GPU-…/1/0`, as older drivers name it."""
        if (uuid := self._uuid(one)) is not None and uuid == entry:
            return True
        parent, *ids = entry.removeprefix("MIG-").split("/")
        if len(ids) != 2:  # noqa: PLR2004 - the GPU instance and the compute instance
            return False
        own = (pynvml.nvmlDeviceGetGpuInstanceId, pynvml.nvmlDeviceGetComputeInstanceId)
        is_parent = self._uuid(_Device(one.number, self._handle(one.number))) == parent
        return is_parent and [str(self._ask(question, one.handle)) for question in own] == ids

    def _handle(self, index: int) -> Any:
        return self._ask(pynvml.nvmlDeviceGetHandleByIndex, index)

    def _uuid(self, device: _Device) -> str | None:
        found = None if device.handle is None else self._ask(pynvml.nvmlDeviceGetUUID, device.handle)
        return found if isinstance(found, str) else None

    # --- what one of them reports

    def _read_one(self, device: _Device) -> GpuReading:
        index, gpu = min(device.number, _HIGHEST_INDEX), device.handle
        if gpu is None:
            return GpuReading(index=index, name=self._names.get(index))
        if name := self._ask(pynvml.nvmlDeviceGetName, gpu):
            self._names[index] = _as_label(name)
        used, total = self._memory(device)
        busy = self._ask(pynvml.nvmlDeviceGetUtilizationRates, gpu)
        celsius = self._ask(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU)
        milliwatts = _within(self._ask(pynvml.nvmlDeviceGetPowerUsage, gpu), _MOST_MILLIWATTS)
        percent = None if busy is None else _within(busy.gpu, 100)
        # By the wire's names: a GpuReading is validated from them.
        return GpuReading.model_validate(
            {
                "index": index,
                "name": self._names.get(index),
                "utilization": None if percent is None else percent / 100,
                "memoryUsedMb": used,
                "memoryTotalMb": total,
                "temperatureC": _within(celsius, _HOTTEST_CELSIUS),
                "powerW": None if milliwatts is None else milliwatts / 1000,
            }
        )

    def _memory(self, device: _Device) -> tuple[float | None, float | None]:
        """Return the used and the total memory in MiB. A total of 0 and more used than there is are unknown."""
        memory = None if device.handle is None else self._ask(pynvml.nvmlDeviceGetMemoryInfo, device.handle)
        total = None if memory is None else _within(memory.total, _MOST_BYTES)
        if memory is None or not total or total < _BYTES_PER_MB:
            return None, None
        used = _within(memory.used, total)
        return None if used is None else float(used // _BYTES_PER_MB), float(total // _BYTES_PER_MB)

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """Return NVML's result; None when it refuses, or when a name is no valid text."""
        try:
            return question(*arguments)
        except pynvml.NVMLError as error:
            self._note(error)
        except UnicodeDecodeError:
            pass
        return None

    def _note(self, error: pynvml.NVMLError) -> None:
        """Schedule reopening NVML, unless the GPU merely does not support the query."""
        if error.value not in _NO_FAULT:
            self._reopen_at = self._reopen_at or self._clock() + REOPEN_SECONDS
            self._refusal = _sentence(error)


def _within(value: int | None, highest: int) -> int | None:
    """Return the value; None if it is more than any GPU can have, as NVML's placeholders are."""
    return value if value is not None and 0 <= value <= highest else None


def _sentence(error: pynvml.NVMLError) -> str:
    sentences = {
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: NO_DRIVER,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVIDIA driver was updated; reboot, or reload its module",
        pynvml.NVML_ERROR_GPU_IS_LOST: "a GPU fell off the bus; reboot, or reset it",
    }
    return sentences.get(error.value, f"NVML answers error {error.value}")


def _as_label(name: str) -> str:
    """Return a name without the characters that the wire refuses."""
    return "".join(character for character in name if character.isprintable())[:200] or "unnamed"


def _main_memory_mb() -> int | None:
    """Return this machine's memory in MiB; None where the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _BYTES_PER_MB
    except (ValueError, OSError):
        return None
