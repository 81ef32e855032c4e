"""What the agent says of GPUs, by the real pynvml on a library that fails as told."""

from __future__ import annotations

import pytest

from lucid_compute.agent.gpu import REOPEN_SECONDS, GpuReader
from tests.fake_nvml import LOST, NOT_LOADED, NOT_SUPPORTED, UNKNOWN, FakeGpu, FakeNvml


class Clock:
    """Stands still until it is moved."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A library of one GPU."""
    library = FakeNvml()
    library.stand_in(monkeypatch)
    return library


def test_a_gpu_is_read_in_the_units_of_the_wire(nvml: FakeNvml) -> None:
    state = GpuReader().read()
    assert state.detail is None
    assert state.gpus is not None
    assert [gpu.model_dump(by_alias=True) for gpu in state.gpus] == [
        {
            "index": 0,
            "name": "NVIDIA H100 80GB HBM3",
            "utilization": 0.42,
            "memoryUsedMb": 1024.0,
            "memoryTotalMb": 81559.0,
            "temperatureC": 37.0,
            "powerW": 71.5,
        }
    ]
    assert (state.vram_mb, state.names, state.utilization) == (81559, "NVIDIA H100 80GB HBM3", 0.42)


def test_the_gpus_of_an_inference_server_can_be_chosen(nvml: FakeNvml) -> None:
    nvml.gpus = [FakeGpu(total_mib=1), FakeGpu(total_mib=20, name=b"B", busy=100), FakeGpu(total_mib=300, name=b"A")]
    state = GpuReader([1, 2]).read()
    assert [gpu.index for gpu in state.gpus or ()] == [1, 2]
    assert (state.vram_mb, state.names, state.utilization) == (320, "A + B", 0.71)
    (missing,) = GpuReader([7]).read().gpus or ()
    assert missing.memory_total_mb is None


def test_without_a_library_nothing_is_known_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNvml()
    library.stand_in(monkeypatch)

    def missing(_: str) -> FakeNvml:
        raise OSError

    monkeypatch.setattr("pynvml.CDLL", missing)
    state = GpuReader().read()
    assert state.gpus is None
    assert state.vram_mb is None
    assert "no NVIDIA driver is installed here" in (state.detail or "")


def test_a_driver_that_is_loaded_later_is_found(nvml: FakeNvml) -> None:
    clock = Clock()
    reader = GpuReader(clock=clock)
    nvml.refusal = NOT_LOADED
    assert reader.read().gpus is None
    nvml.refusal = None
    assert (reader.read().detail, nvml.inits) == ("the NVIDIA driver is not loaded", 1)
    clock.seconds = REOPEN_SECONDS
    state = reader.read()
    assert (state.vram_mb, state.detail) == (81559, None)


def test_what_a_gpu_does_not_offer_is_unknown_and_no_fault(nvml: FakeNvml) -> None:
    nvml.gpus = [FakeGpu(busy=NOT_SUPPORTED, milliwatts=NOT_SUPPORTED)]
    state = GpuReader().read()
    (gpu,) = state.gpus or ()
    assert (gpu.utilization, gpu.power_w, gpu.temperature_c, state.detail) == (None, None, 37, None)
    assert state.utilization is None


def test_a_gpu_that_falls_off_the_bus_is_unknown_while_the_others_go_on(nvml: FakeNvml) -> None:
    nvml.gpus = [FakeGpu(), FakeGpu()]
    clock = Clock()
    reader = GpuReader(clock=clock)
    reader.read()
    nvml.gpus[1].fall_off_the_bus()
    state = reader.read()
    healthy, lost = state.gpus or ()
    assert healthy.utilization == 0.42
    assert (lost.name, lost.utilization, lost.memory_total_mb, lost.power_w) == (healthy.name, None, None, None)
    assert state.detail == "a GPU fell off the bus; reboot, or reset it"
    assert state.vram_mb is None  # never the rest, which would be too little, or 0
    clock.seconds = REOPEN_SECONDS
    nvml.gpus[1] = FakeGpu()
    assert reader.read().vram_mb == 2 * 81559
    assert (nvml.inits, nvml.shutdowns) == (2, 1)


def test_a_gpu_without_a_handle_is_unknown(nvml: FakeNvml) -> None:
    nvml.gpus = [FakeGpu(handle=LOST)]
    (gpu,) = GpuReader().read().gpus or ()
    assert (gpu.name, gpu.memory_total_mb) == (None, None)


def test_names_and_numbers_that_no_gpu_has_are_not_passed_on(nvml: FakeNvml) -> None:
    nvml.gpus = [
        FakeGpu(name=b"\xff\xfe", celsius=2**31, busy=4000),
        FakeGpu(name=b"A\n\x1b[31mB"),
        FakeGpu(name=UNKNOWN),
    ]
    first, second, third = GpuReader().read().gpus or ()
    assert (first.name, first.temperature_c, first.utilization) == (None, None, 1.0)
    assert second.name == "A[31mB"
    assert third.name is None
