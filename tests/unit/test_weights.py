"""Frozen weights once per node: the choice, the memory, and the layers that are found."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, LlavaConfig

from accelerate_unsloth.reliability import agreement
from accelerate_unsloth.weights import PlacedWeights, SharedTensor, attach, copying, loading, placement
from accelerate_unsloth.weights.decoder import find_layers
from accelerate_unsloth.weights.layout import Piece, as_bytes, from_bytes
from accelerate_unsloth.weights.loading import _facts, _why_not_shared
from accelerate_unsloth.weights.placement import Facts, resolve
from accelerate_unsloth.weights.shared_memory import SharedMemory, mapped

GIB = 2**30
FACTS = Facts(layers=(GIB,) * 30, other_bytes=2 * GIB, local_world_size=2, host_bytes=128 * GIB)
SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8, "num_hidden_layers": 2}


# ---- The choice ----


@pytest.mark.parametrize(
    ("facts", "mode"),
    [
        (FACTS, "replicated"),
        (replace(FACTS, local_world_size=4), "host"),
        (replace(FACTS, host_bytes=40 * GIB), "host"),
        (replace(FACTS, host_bytes=40 * GIB, cannot_share="no layers were found"), "replicated"),
        (replace(FACTS, host_bytes=40 * GIB, device_bytes=80 * GIB), "replicated"),
        (replace(FACTS, device_bytes=40 * GIB), "sharded"),
        (replace(FACTS, device_bytes=40 * GIB, no_peer_copies="no peer access"), "replicated"),
        (replace(FACTS, device_bytes=28 * GIB), "sharded"),
        (replace(FACTS, device_bytes=24 * GIB, no_peer_copies="no peer access"), "host"),
        (replace(FACTS, device_bytes=16 * GIB), "host"),
        (replace(FACTS, device_bytes=24 * GIB, local_world_size=1), "host"),
        (replace(FACTS, device_bytes=24 * GIB, cannot_share="no layers were found"), "replicated"),
        (replace(FACTS, host_bytes=40 * GIB, local_world_size=1), "replicated"),
    ],
)
def test_weights_are_shared_where_copies_do_not_fit(facts, mode):
    assert resolve("auto", facts).mode == mode
    assert resolve("replicated", facts).mode == "replicated"


ON_CPU = r"30\.0 GiB of decoder layers once and 2 x 2\.0 GiB of other weights are 34\.0 GiB, .* has 33\.0 GiB"
SHARDED = (
    r"15\.0 GiB of decoder layers, 3\.0 GiB for 3 layers that are copied and 2\.0 GiB of other weights are 20\.0 GiB"
)
FROM_HOST = r"machine: 3\.0 GiB for 3 layers that are copied and 2\.0 GiB of other weights are 5\.0 GiB on each GPU, which has 4\.0 GiB, 0\.9"


@pytest.mark.parametrize(
    ("requested", "facts", "message"),
    [
        ("auto", replace(FACTS, host_bytes=33 * GIB), ON_CPU),
        ("host", replace(FACTS, host_bytes=33 * GIB), ON_CPU),
        ("sharded", replace(FACTS, device_bytes=22 * GIB), SHARDED),
        ("host", replace(FACTS, device_bytes=4 * GIB), FROM_HOST),
        (
            "auto",
            replace(FACTS, device_bytes=22 * GIB, host_bytes=29 * GIB),
            rf"{SHARDED}.* 0\.75 of .*{SHARDED}.* 0\.9",
        ),
        (
            "auto",
            replace(FACTS, device_bytes=22 * GIB, host_bytes=33 * GIB),
            r"30\.0 GiB of decoder layers once are 30\.0 GiB, .* has 33\.0 GiB, 0\.9 of it for weights",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_rejected_with_the_arithmetic(requested, facts, message):
    with pytest.raises(MemoryError, match=message):
        resolve(requested, facts)


@pytest.mark.parametrize(
    ("requested", "facts", "why"),
    [
        ("sharded", FACTS, "there are no GPUs"),
        ("sharded", replace(FACTS, device_bytes=40 * GIB, local_world_size=1), "one process has one GPU"),
        ("sharded", replace(FACTS, device_bytes=40 * GIB, no_peer_copies="no peer access"), "no peer access"),
        ("sharded", replace(FACTS, device_bytes=40 * GIB, cannot_share="no layers"), "no layers"),
        ("host", replace(FACTS, cannot_share="no layers were found"), "no layers were found"),
    ],
)
def test_an_impossible_placement_is_rejected_with_the_reason(requested, facts, why):
    with pytest.raises(ValueError, match=rf"frozen_weights='{requested}' is not possible: .*{why}"):
        resolve(requested, facts)


def test_the_limit_of_a_container_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(placement, "_CGROUP_LIMIT", tmp_path / "memory.max")
    whole = placement.host_bytes()
    for text, expected in (("max\n", whole), ("1048576\n", 2**20), (f"{whole * 2}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        assert placement.host_bytes() == expected
    monkeypatch.setattr(copying, "_pinned", [torch.empty(24, dtype=torch.uint8)] * 2)
    assert placement.host_bytes() == whole - 48


# ---- The memory ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.bool])
def test_bytes_of_every_type_come_back(dtype):
    written = [
        torch.randint(0, 255, (n, 16), dtype=torch.uint8).clamp(max=1 if dtype is torch.bool else 255) for n in (3, 1)
    ]
    written = [value.view(dtype) for value in written]
    with SharedMemory() as memory:
        pieces = [Piece.of(str(i), str(i), memory.append(value), value, 0) for i, value in enumerate(written)]
        seen = mapped(memory.address())
    assert from_bytes(as_bytes(pieces)) == pieces
    for piece, value in zip(pieces, written, strict=True):
        found = piece.view(seen)
        assert (found.shape, found.dtype) == (value.shape, dtype)
        assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))
        assert found.data_ptr() % 256 == seen.data_ptr() % 256


def test_what_one_process_writes_is_not_seen_by_another():
    with SharedMemory() as memory:
        memory.append(torch.zeros(4))
        one, other = mapped(memory.address()), mapped(memory.address())
    one[:] = 7
    assert not other.any()


def test_a_change_of_one_tensor_leaves_others_usable_in_a_backward():
    """Views of one tensor share the counter by which autograd notices changes."""
    with SharedMemory() as memory:
        pieces = [Piece.of(name, name, memory.append(torch.ones(2, 2)), torch.ones(2, 2), 0) for name in ("a", "b")]
        weight, changed = (piece.view(mapped(memory.address())) for piece in pieces)
    inputs = torch.ones(2, 2, requires_grad=True)
    output = inputs @ weight
    changed.mul_(2)
    output.sum().backward()
    assert torch.equal(inputs.grad, torch.full((2, 2), 2.0))


@pytest.mark.parametrize("broken", [{"name": "accelerate_unsloth-other"}, {"descriptor": 10_000}])
def test_memory_of_another_container_is_not_taken_for_ours(broken):
    with SharedMemory() as memory:
        memory.append(torch.zeros(4))
        with pytest.raises(RuntimeError, match=f"cannot open the memory of process {os.getpid()}.*=replicated"):
            mapped(memory.address() | broken)


# ---- The layers ----


def test_the_layers_of_a_vision_tower_are_not_those_of_the_decoder():
    text, vision = LlamaConfig(**SMALL), {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "intermediate_size": 64, **vision}, text_config=text
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert [layer.path for layer in find_layers(model)] == [f"model.language_model.layers.{i}" for i in (0, 1)]


def test_tied_weights_are_not_shared():
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.all_tied_weights_keys = {"model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"}
    assert all("mlp.up_proj.weight" not in name for layer in find_layers(model) for name in layer.parameters)


class Int8Params(torch.nn.Parameter):
    """As those of bitsandbytes, whose constants are elsewhere."""


def test_layers_are_not_shared_where_they_are_spread_or_of_an_unknown_kind():
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    layers = find_layers(model)
    assert _why_not_shared(model, layers, None, None) == _why_not_shared(model, layers, {"": "cuda:1"}, None) == ""
    assert "several devices" in _why_not_shared(model, layers, {"model.layers.0": 0, "model.layers.1": 1}, None)
    assert "were not found" in _why_not_shared(model, [], None, None)
    assert "by SimpleNamespace" in _why_not_shared(model, layers, None, SimpleNamespace())
    up_proj = model.model.layers[1].mlp.up_proj
    up_proj.weight = Int8Params(up_proj.weight.data)
    assert "of the type Int8Params" in _why_not_shared(model, layers, None, None)


def test_the_largest_part_and_the_largest_layer_count():
    """Every second layer has experts."""
    facts = Facts((GIB, 9 * GIB) * 4, GIB, 2, 128 * GIB, device_bytes=50 * GIB)
    assert facts.largest_part == 20 * GIB
    message = (
        r"20\.0 GiB of decoder layers, 27\.0 GiB for 3 layers .* are 48\.0 GiB on each GPU, which has 50\.0 GiB, 0\.9"
    )
    with pytest.raises(MemoryError, match=message):
        resolve("sharded", facts)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
def test_each_layer_has_one_owner_and_kinds_that_alternate_are_spread(processes):
    owners = [placement.owner(layer, processes) for layer in range(16 * processes)]
    for kind in (slice(None), slice(0, None, 2), slice(1, None, 2)):
        counts = [owners[kind].count(process) for process in range(processes)]
        assert max(counts) - min(counts) <= 2


@pytest.mark.parametrize("keeps_own", [False, True])
def test_processes_that_see_one_gpu_each_share_the_layers_too(keeps_own, monkeypatch):
    """Some launchers give all of them the local rank 0."""
    loaded = []
    for rank in (4, 5, 6):
        place = SimpleNamespace(rank=rank, local_rank=0, local_world_size=3, node_ranks=(4, 5, 6))
        monkeypatch.setattr(loading, "topology", lambda place=place: place)
        loaded += loading._own_layers(10, keeps_own)
    assert sorted(loaded) == [*range(10)]
    assert not keeps_own or loaded == sorted(loaded, key=lambda layer: (placement.owner(layer, 3), layer))


@pytest.mark.parametrize(("requested", "found"), [("auto", "host"), ("sharded", ValueError)])
def test_gpus_that_cannot_copy_from_one_another_are_found_before_loading(requested, found, monkeypatch):
    facts = replace(FACTS, device_bytes=28 * GIB)
    monkeypatch.setattr(loading, "why_no_copies", lambda device: "rank 1 cannot copy from the GPU of rank 0")
    if found is ValueError:
        with pytest.raises(ValueError, match=r"rank 1 cannot copy .*FROZEN_WEIGHTS=host"):
            loading._resolve(requested, facts, "cuda:0")
    else:
        choice = loading._resolve(requested, facts, "cuda:0")
        assert choice.mode == found
        assert "(rank 1 cannot copy from the GPU of rank 0)" in choice.reason
    assert loading._resolve("replicated", facts, "cuda:0").mode == "replicated"


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_embedding_counts_once(tied):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))
    other = _facts(model, find_layers(model), "cpu", "").other_bytes
    assert other == 4 * (8 * 8 * (1 if tied else 2) + 8 + 2 * 2 * 8)  # with all norms


# ---- The comparison of ranks ----


@pytest.mark.parametrize(
    ("own", "nodes", "other", "fails"),
    [(True, 2, None, False), (True, 2, 1, True), (False, 2, 1, False), (True, 1, None, False)],
)
def test_the_single_copy_is_compared_between_nodes_only(own, nodes, other, fails, monkeypatch):
    """The other rank owns no copy (`None`), or one of another node with a wrong value."""
    layer = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
    attach(
        layer,
        PlacedWeights(placement.PlacementChoice("host", ""), (SharedTensor(layer, "weight", layer.weight, own),)),
    )

    def gather(name, value):
        sums, not_compared = value
        assert not_compared == ([] if own and nodes > 1 else ["weight"])
        assert [*sums] == ([] if not_compared else ["weight"])  # nothing is read in vain: 40 GB take minutes on a CPU
        return [value, [{}, ["weight"]] if other is None else [{"weight": other}, []]]

    monkeypatch.setattr(agreement, "topology", lambda: SimpleNamespace(world_size=2, local_world_size=2 // nodes))
    monkeypatch.setattr(agreement, "channel", lambda: SimpleNamespace(gather=gather))
    if fails:
        with pytest.raises(ValueError, match=r"Frozen weights or buffers of rank\(s\) 1 .*: weight"):
            agreement.check_frozen(layer)
    else:
        agreement.check_frozen(layer)
