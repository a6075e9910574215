"""Memory of one GPU that others copy from, with memory of this process in its place: offsets, and why copies may not work."""

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from accelerate_unsloth.weights import cuda_ipc, peer_memory
from accelerate_unsloth.weights.peer_memory import DeviceMemory, PeerMemory, why_no_copies

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """Regions that are memory of this process: a handle is an address in hexadecimal."""
    regions = []

    def allocated(nbytes, device):
        regions.append(torch.full((nbytes,), 255, dtype=torch.uint8))
        return regions[-1]

    def copy(pointer, nbytes, target):
        ctypes.memmove(target.data_ptr(), pointer, nbytes)

    monkeypatch.setattr(cuda_ipc, "allocated", allocated)
    monkeypatch.setattr(cuda_ipc, "handle_of", lambda region: hex(region.data_ptr()))
    monkeypatch.setattr(cuda_ipc, "opened", lambda handle, device: int(handle, 16))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(cuda_ipc, "copy", copy)
    return regions


def test_tensors_of_any_type_and_region_are_found_where_they_were_put(gpu):
    torch.manual_seed(0)
    layers = [
        [torch.randint(0, 255, (3, 5), dtype=torch.uint8), torch.randn(7, 3).bfloat16()],
        [torch.randn(2**19 + 3), torch.arange(6).view(2, 3).t()],
        [torch.randn(4, 4)],
    ]
    memory = DeviceMemory(CPU)
    offsets = [memory.put(tensors) for tensors in layers]
    peer = PeerMemory(memory.address(), CPU)
    assert len(gpu) == len(layers)
    for tensors, begins in zip(layers, offsets, strict=True):
        for tensor, begin in zip(tensors, begins, strict=True):
            expected = tensor.contiguous().reshape(-1).view(torch.uint8)
            assert begin % 256 == 0
            assert torch.equal(memory.view(begin, begin + tensor.nbytes), expected)
            assert torch.equal(peer.source(begin, begin + tensor.nbytes).on_host(), expected)
        whole = begins[0], begins[-1] + tensors[-1].nbytes  # as a layer is copied
        assert torch.equal(peer.source(*whole).on_host(), memory.view(*whole))


def test_regions_are_multiples_of_what_the_driver_exports(gpu):
    memory = DeviceMemory(CPU)
    memory.put([torch.zeros(3)])
    memory.put([torch.zeros(2**19 + 1)])
    assert [region.numel() for region in gpu] == [2**21, 2**22]


@pytest.fixture
def two_ranks(monkeypatch):
    """Give what rank 1 sends in each call, in turn; return what rank 0 sent."""

    def ranks(*replies):
        left, sent = list(replies), []

        def gather(name, value, ranks):
            sent.append(value)
            assert ranks == [0, 1]
            return [value, left.pop(0)]

        monkeypatch.setattr(peer_memory, "topology", lambda: SimpleNamespace(rank=0, local_rank=0, node_ranks=[0, 1]))
        monkeypatch.setattr(peer_memory, "channel", lambda: SimpleNamespace(gather=gather))
        return sent

    return ranks


def address_of_rank_1(value):
    memory = DeviceMemory(CPU)
    memory.put([torch.full((256,), value, dtype=torch.uint8)])
    return memory, memory.address()


@pytest.mark.parametrize(
    ("written", "reply", "why"), [(1, "", ""), (3, "", "read other bytes"), (1, "no access", "no access")]
)
def test_copies_are_tried_and_every_rank_says_why_they_do_not_work(written, reply, why, gpu, two_ranks):
    memory, address = address_of_rank_1(written)
    two_ranks(address, reply)
    found = why_no_copies(CPU)
    assert why in found if why else found == ""
    assert memory


def test_a_rank_that_cannot_allocate_or_open_still_answers_both_calls(gpu, two_ranks, monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA error 217 (cudaErrorPeerAccessUnsupported)")

    _, address = address_of_rank_1(1)
    sent = two_ranks(address, "")
    monkeypatch.setattr(cuda_ipc, "opened", fails)
    assert "rank 0 cannot copy from the GPU of rank 1: CUDA error 217" in why_no_copies(CPU)
    assert len(sent) == 2
    sent = two_ranks(address, "")
    monkeypatch.setattr(cuda_ipc, "allocated", fails)
    assert "CUDA error 217" in why_no_copies(CPU)
    assert len(sent) == 2


@pytest.mark.parametrize(("limit", "left"), [(1.0, None), (0.5, 0.25), (0.1, torch.OutOfMemoryError)])
def test_memory_beside_pytorch_counts_against_its_limit(limit, left, monkeypatch):
    lowered = []
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: limit)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 400))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: lowered.append(fraction)
    )
    if left is torch.OutOfMemoryError:
        with pytest.raises(left, match="do not fit cpu"):
            cuda_ipc._lower_limit_of_pytorch(100, CPU)
    else:
        cuda_ipc._lower_limit_of_pytorch(100, CPU)
    assert lowered == ([left] if isinstance(left, float) else [])


@pytest.mark.parametrize(("error", "raised"), [(2, torch.OutOfMemoryError), (35, RuntimeError)])
def test_only_a_lack_of_memory_is_called_one(error, raised, monkeypatch):
    class Error(int):
        name = "cudaErrorOfSomeKind"

    asked = []
    runtime = SimpleNamespace(
        cudaMalloc=lambda nbytes: (Error(error), None), cudaGetLastError=lambda: asked.append("forgotten")
    )
    monkeypatch.setattr(cuda_ipc, "_runtime", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 400))
    with pytest.raises(raised) as caught:
        cuda_ipc.allocated(100, CPU)
    assert isinstance(caught.value, torch.OutOfMemoryError) == (raised is torch.OutOfMemoryError)
    assert asked == ["forgotten"]
    assert not cuda_ipc.held_bytes()


def test_handles_leave_after_the_bytes_are_complete(gpu, monkeypatch):
    memory, calls = DeviceMemory(CPU), []
    memory.put([torch.zeros(3)])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronized"))
    monkeypatch.setattr(cuda_ipc, "handle_of", lambda region: calls.append("handle"))
    memory.address()
    assert calls == ["synchronized", "handle"]
