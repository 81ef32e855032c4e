"""GPUs as NVML reports them: https://docs.nvidia.com/deploy/nvml-api. The only file that imports pynvml."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pynvml  # type: ignore[import-untyped]

from lucid_compute.registry.domain.node_state import GpuReading

REOPEN_SECONDS = 60.0
_BYTES_PER_MB = 1024 * 1024
_MAX_GPUS = 64
_HIGHEST_INDEX = 1023
NO_DRIVER = "no NVIDIA driver is installed here (libnvidia-ml.so.1 is missing); models are taken to use main memory"


class GpuState(NamedTuple):
    """What NVML reports now. `gpus` None means unknown; `detail` is the reason, in a sentence.

    `main_memory_mb` is the machine's memory. It is set only where no driver is installed, because models run there
    then.
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


class GpuReader:
    """Reads the GPUs repeatedly. A failed reading is None; NVML is reopened a while later.

    A call may block for as long as the driver likes. `ThreadedCall` keeps it away from the event loop.
    """

    def __init__(self, indices: Sequence[int] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the GPUs of `indices`; None reads all of them."""
        self._indices = None if indices is None else tuple(indices)
        self._clock = clock
        self._is_open = False
        self._reopen_at: float | None = None
        self._refusal: str | None = None
        self._names: dict[int, str] = {}

    def read(self) -> GpuState:
        """Return what is known of each GPU now. Never raises."""
        if self._reopen_at is not None and self._clock() >= self._reopen_at:
            self._close()
        if not self._is_open and not self._open():
            return GpuState(None, self._refusal, _main_memory_mb() if self._refusal == NO_DRIVER else None)
        indices = self._indices if self._indices is not None else range(self._count())
        return GpuState(tuple(self._read_one(index) for index in tuple(indices)[:_MAX_GPUS]), self._refusal)

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

    def _count(self) -> int:
        count = self._ask(pynvml.nvmlDeviceGetCount)
        return min(int(count or 0), _MAX_GPUS)

    def _read_one(self, index: int) -> GpuReading:
        index = min(index, _HIGHEST_INDEX)
        gpu = self._ask(pynvml.nvmlDeviceGetHandleByIndex, index)
        if gpu is None:
            return GpuReading(index=index, name=self._names.get(index))
        if name := self._ask(pynvml.nvmlDeviceGetName, gpu):
            self._names[index] = _as_label(name)
        used = self._ask(pynvml.nvmlDeviceGetMemoryInfo, gpu)
        busy = self._ask(pynvml.nvmlDeviceGetUtilizationRates, gpu)
        milliwatts = self._ask(pynvml.nvmlDeviceGetPowerUsage, gpu)
        celsius = self._ask(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU)
        # By the wire's names: a GpuReading is validated from them.
        return GpuReading.model_validate(
            {
                "index": index,
                "name": self._names.get(index),
                "utilization": None if busy is None else min(busy.gpu / 100, 1.0),
                "memoryUsedMb": None if used is None else float(used.used // _BYTES_PER_MB),
                "memoryTotalMb": None if used is None else float(used.total // _BYTES_PER_MB),
                "temperatureC": None if celsius is None or celsius > 1000 else float(celsius),  # noqa: PLR2004 - absurd
                "powerW": None if milliwatts is None else milliwatts / 1000,
            }
        )

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
        if error.value not in {pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}:
            self._reopen_at = self._reopen_at or self._clock() + REOPEN_SECONDS
            self._refusal = _sentence(error)


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
