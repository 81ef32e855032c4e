"""What the agent says of GPUs, by the real pynvml on a library that fails as told."""

from __future__ import annotations

import pytest

from lucid_compute.agent.gpu import NO_SLICES, NO_VISIBLE_GPU, REOPEN_SECONDS, SLICES, GpuReader
from lucid_compute.agent.gpu_selection import GpuSelection, read_cuda_list
from lucid_compute.agent.settings import AgentSettings
from tests.fake_nvml import LOST, NOT_LOADED, NOT_SUPPORTED, UNKNOWN, FakeGpu, FakeNvml

MIB = 1024 * 1024


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
    state = GpuReader(GpuSelection(("1", "2"))).read()
    assert [gpu.index for gpu in state.gpus or ()] == [1, 2]
    assert (state.vram_mb, state.names, state.utilization) == (320, "A + B", 0.71)
    (missing,) = GpuReader(GpuSelection(("7",))).read().gpus or ()
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
    assert "no NVIDIA driver is found here" in (state.detail or "")


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
    assert (first.name, first.temperature_c, first.utilization) == (None, None, None)
    assert second.name == "A[31mB"
    assert third.name is None


@pytest.mark.parametrize(
    ("total", "used", "wanted"),
    [
        (0, 0, (None, None)),
        (0, 5 * MIB, (None, None)),
        (80 * MIB, 81 * MIB, (None, 80.0)),
        (80 * MIB, 80 * MIB, (80.0, 80.0)),
        (80 * MIB, 2**64 - 1, (None, 80.0)),
        (2**64 - 1, 5 * MIB, (None, None)),
        (80 * MIB, 0, (0.0, 80.0)),
    ],
)
def test_memory_that_no_gpu_has_is_unknown(
    nvml: FakeNvml, total: int, used: int, wanted: tuple[float | None, float | None]
) -> None:
    nvml.gpus = [FakeGpu(total_bytes=total, used_bytes=used)]
    state = GpuReader().read()
    (gpu,) = state.gpus or ()
    assert (gpu.memory_used_mb, gpu.memory_total_mb) == wanted
    assert state.vram_mb == wanted[1]


@pytest.mark.parametrize(
    ("busy", "milliwatts", "celsius", "wanted"),
    [
        (101, 0xFFFFFFFF, 0xFFFFFFFF, (None, None, None)),
        (0xFFFFFFFF, 100_000_001, 201, (None, None, None)),
        (100, 1_200_000, 95, (1.0, 1200.0, 95.0)),
        (0, 0, 0, (0.0, 0.0, 0.0)),
    ],
)
def test_placeholders_of_nvml_are_unknown(
    nvml: FakeNvml, busy: int, milliwatts: int, celsius: int, wanted: tuple[float | None, ...]
) -> None:
    nvml.gpus = [FakeGpu(busy=busy, milliwatts=milliwatts, celsius=celsius)]
    (gpu,) = GpuReader().read().gpus or ()
    assert (gpu.utilization, gpu.power_w, gpu.temperature_c) == wanted


def a_slice(number: int, mib: int) -> FakeGpu:
    """A MIG slice: it has a name and memory of its own, and no utilisation."""
    return FakeGpu(
        name=f"NVIDIA A100 MIG {number}g".encode(), total_mib=mib, busy=NOT_SUPPORTED, uuid=f"MIG-{number}".encode(),
        ids=(number, 0),
    )  # fmt: skip


def cut(*slices: FakeGpu | None, uuid: bytes = b"GPU-0") -> FakeGpu:
    """A GPU of 80 GiB in MIG mode, with these slices."""
    return FakeGpu(total_mib=81920, has_mig=True, slices=list(slices), uuid=uuid)


def test_the_one_slice_of_a_gpu_is_what_a_server_has(nvml: FakeNvml) -> None:
    nvml.gpus = [cut(None, a_slice(1, 9856))]
    state = GpuReader().read()
    assert (state.vram_mb, state.names, len(state.gpus or ()), state.detail) == (9856, "NVIDIA A100 MIG 1g", 1, None)
    assert state.utilization is None


@pytest.mark.parametrize("selection", [None, ("0",)])
def test_of_several_slices_the_smallest_counts_and_that_is_said(
    nvml: FakeNvml, selection: tuple[str, ...] | None
) -> None:
    nvml.gpus = [cut(a_slice(3, 40448), a_slice(1, 9856))]
    state = GpuReader(GpuSelection(selection)).read()
    assert (state.vram_mb, state.detail) == (9856, SLICES)


def test_whole_gpus_beside_cut_ones_do_not_count_with_them(nvml: FakeNvml) -> None:
    """A process of CUDA uses one slice or whole GPUs; which is not known."""
    nvml.gpus = [FakeGpu(), cut(a_slice(3, 40448))]
    assert GpuReader().read().vram_mb == 40448
    assert GpuReader(GpuSelection(("0",))).read().vram_mb == 81559


def test_a_gpu_in_mig_mode_without_a_slice_has_no_memory_for_a_server(nvml: FakeNvml) -> None:
    nvml.gpus = [cut()]
    state = GpuReader().read()
    assert (state.vram_mb, state.detail) == (None, NO_SLICES)


@pytest.mark.parametrize(
    ("visible", "mib"),
    [
        ("1", 20),
        ("0,1", 30),
        ("1,1", 20),
        ("GPU-ab", 20),
        ("GPU-aa,GPU-ab", 30),
        ("0,-1,1", 10),  # CUDA stops at the first that is invalid
        ("0,7,1", 10),
        ("0,GPU-none,1", 10),
        ("MIG-2", 2),
        ("MIG-2,MIG-1", 2),  # CUDA uses one slice
        ("MIG-GPU-cut/1/0", 1),
        ("2:0", 1),
        ("2", 1),
        ("GPU-cut", 1),
        ("7", None),
        ("GPU-a", None),  # the beginning of two
        ("MIG-9", None),
    ],
)
def test_cuda_visible_devices_says_what_the_server_has(nvml: FakeNvml, visible: str, mib: int | None) -> None:
    whole = [FakeGpu(total_mib=10, uuid=b"GPU-aa"), FakeGpu(total_mib=20, uuid=b"GPU-ab")]
    nvml.gpus = [*whole, cut(a_slice(1, 1), a_slice(2, 2), uuid=b"GPU-cut")]
    state = GpuReader(read_cuda_list(visible)).read()
    assert state.vram_mb == mib
    if mib is None:
        assert (state.gpus, state.detail, state.main_memory_mb) == (None, NO_VISIBLE_GPU, None)


@pytest.mark.parametrize("visible", ["", "-1", "none", "NoDevFiles"])
def test_cuda_that_shows_no_gpu_leaves_main_memory(nvml: FakeNvml, visible: str) -> None:
    state = GpuReader(read_cuda_list(visible)).read()
    assert (state.gpus, state.vram_mb, state.detail) == (None, None, NO_VISIBLE_GPU)
    assert state.main_memory_mb
    assert nvml.inits == 0


def test_the_option_goes_before_cudas_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert AgentSettings().gpu_selection.entries is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert AgentSettings().gpu_selection.hides_all
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    assert AgentSettings().gpu_selection == GpuSelection(("2", "GPU-5"), is_of_cuda=True)
    assert AgentSettings(gpus="0, MIG-GPU-7/1/0").gpu_selection == GpuSelection(("0", "MIG-GPU-7/1/0"))
    for wrong in ("", "all", "-1", "0,,1", "GPU", "0;1"):
        with pytest.raises(ValueError, match="indices or UUIDs"):
            AgentSettings(gpus=wrong)
