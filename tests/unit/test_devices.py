"""Which GPUs are visible and which are chosen, from tables of plain values; the host as it is."""

from dataclasses import dataclass, field

import psutil
import pytest

from accelerate_unsloth import DeviceManager
from accelerate_unsloth.devices.manager import visible_gpus
from accelerate_unsloth.devices.nvml import Gpu, GpuProcess, GpuReading

UUIDS = ["GPU-aa11", "GPU-aa22", "GPU-bb33", "GPU-cc44"]
FOUR = tuple(Gpu(index, uuid, "H200", 140.0, (9, 0)) for index, uuid in enumerate(UUIDS))
UNLIKE = (Gpu(0, "GPU-aa", "T4", 15.0, (7, 5)), Gpu(1, "GPU-bb", "H200", 140.0, (9, 0)))


@dataclass
class Table:
    """A reader whose GPUs are written down."""

    gpus: tuple = FOUR
    free_gib: tuple = (10.0, 80.0, 30.0, 80.0)
    notes: tuple = ()
    driver: str = "580.1"
    read: list = field(default_factory=list)

    def reading(self, index):
        self.read.append(index)
        return GpuReading(self.gpus[index].total_gib, self.free_gib[index], 7, 40, 120.5)

    def processes(self, index):
        return (GpuProcess(100 + index, 1.0),)

    def link(self, one, other):
        return f"{one}-{other}"


def manager(visible=None, **table):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return DeviceManager(Table(**table), environment)


@pytest.mark.parametrize(
    ("value", "shown", "note"),
    [
        (None, [0, 1, 2, 3], ""),
        ("0", [0], ""),
        ("3,1", [3, 1], ""),
        (" 2 , 0 ", [2, 0], ""),
        ("+1,2abc", [1, 2], ""),
        ("", [], "hides all 4"),
        ("-1", [], "hides all 4"),
        ("NoDevFiles", [], "'NoDevFiles' names none of the 4"),
        ("2,-1,0", [2], "'-1' names none of the 4"),
        ("1,7,0", [1], "'7' names none of the 4"),
        ("1,,0", [1], "'' names none of the 4"),
        ("1,GPU-bb33", [1], "'GPU-bb33' names none of the 4"),
        ("0,1,0", [], "twice"),
        ("GPU-cc44,GPU-aa11", [3, 0], ""),
        ("GPU-b", [2], ""),
        ("GPU-aa22,GPU-aa", [1], "'GPU-aa' names none of the 4"),
        ("GPU-zz", [], "'GPU-zz' names none of the 4"),
        ("GPU-bb33,0", [2], "'0' names none of the 4"),
        ("GPU-bb33,GPU-bb", [], "twice"),
        ("MIG-0a1b", [], "slices of GPUs"),
        ("MIG-GPU-aa11/1/0", [], "slices of GPUs"),
    ],
)
def test_the_visible_gpus_are_those_that_cuda_would_show(value, shown, note):
    found, notes = visible_gpus(FOUR, value)
    assert [gpu.system_index for gpu in found] == shown
    assert note in " ".join(notes)
    assert bool(notes) is bool(note)


def test_a_gpu_in_mig_mode_is_kept_out_with_a_note():
    gpus = (FOUR[0], Gpu(1, "GPU-aa22", "H200", 140.0, (9, 0), is_split=True), FOUR[2])
    found, notes = visible_gpus(gpus, None)
    assert [gpu.system_index for gpu in found] == [0, 2]
    assert "GPU(s) 1 of nvidia-smi are in MIG mode" in notes[0]


@pytest.mark.parametrize(
    ("gpus", "value", "order", "open_order"),
    [
        (UNLIKE, None, None, True),
        (UNLIKE, "0,1", "FASTEST_FIRST", True),
        (UNLIKE, None, "PCI_BUS_ID", False),
        (UNLIKE, "GPU-bb,GPU-aa", None, False),
        (FOUR, None, None, False),
    ],
)
def test_an_order_that_only_cuda_knows_is_said_to_be_open(gpus, value, order, open_order):
    assert any("PCI_BUS_ID" in note for note in visible_gpus(gpus, value, order)[1]) is open_order


def test_a_device_is_described_by_its_number_in_cuda():
    first, second = manager("3,2").get_available_devices()
    assert (first.index, first.system_index, first.uuid, first.free_gib) == (0, 3, "GPU-cc44", 80.0)
    assert (second.index, second.system_index) == (1, 2)
    assert first.links == {1: "3-2"}
    assert first.processes == (GpuProcess(103, 1.0),)


@pytest.mark.parametrize(("capability", "bf16"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_bf16_begins_with_ampere(capability, bf16):
    gpus = (Gpu(0, "GPU-0", "any", 16.0, capability),)
    assert manager(gpus=gpus).get_available_devices()[0].bf16 is bf16


@pytest.mark.parametrize(
    ("num_gpus", "min_free_gib", "chosen"),
    [(1, 0, [1]), (2, 0, [1, 3]), (3, 0, [1, 2, 3]), (4, 0, [0, 1, 2, 3]), (2, 80.0, [1, 3])],
)
def test_the_freest_gpus_are_selected_in_their_own_order(num_gpus, min_free_gib, chosen):
    assert [gpu.index for gpu in manager().select(num_gpus, min_free_gib)] == chosen


def test_too_few_gpus_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"num_gpus=3 with min_free_gib=40 .* 2 of 4 .*cuda:0 10\.0, cuda:1 80\.0"):
        manager().select(3, min_free_gib=40)


def test_hidden_gpus_are_named_as_the_reason():
    with pytest.raises(ValueError, match=r"0 of 0 visible.*CUDA_VISIBLE_DEVICES='' hides all 4 GPU"):
        manager("").select(1)


def test_less_than_one_gpu_cannot_be_selected():
    with pytest.raises(ValueError, match="num_gpus=0"):
        manager().select(0)


def test_a_snapshot_reads_the_visible_gpus_and_the_host():
    table = Table()
    snapshot = DeviceManager(table, {"CUDA_VISIBLE_DEVICES": "2"}).snapshot()
    assert table.read == [2]
    assert snapshot.gpus == {0: GpuReading(140.0, 30.0, 7, 40, 120.5)}
    assert snapshot.host.total_gib == psutil.virtual_memory().total / 2**30
    assert 0 < snapshot.host.process_gib < snapshot.host.total_gib
    assert 0 < snapshot.host.available_gib <= snapshot.host.total_gib
    assert snapshot.host.cpu_percent >= 0


def test_this_machine_has_gpus_or_says_why_not():
    devices = DeviceManager()  # the suite hides GPUs, so there are none on any machine
    assert devices.get_available_devices() == []
    assert devices.notes
