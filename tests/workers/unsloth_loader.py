"""Our wrappers around Unsloth's real loaders, as far as a CPU can tell; to be imported after Unsloth."""

import inspect
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace


def report() -> dict:
    from accelerate_unsloth.engines import unsloth as engine

    built = []

    class Cache:
        def _set_cos_sin_cache(self, seq_len, device, dtype):
            built.append(str(device))

    Cache._set_cos_sin_cache = engine.only_on_own_gpu(Cache._set_cos_sin_cache, own_index=1)
    for device in ("cuda:0", "cuda:1", "cuda:2", "cpu"):
        Cache()._set_cos_sin_cache(8, device, None)
    pairs = (
        (engine.FastLanguageModel, engine.unsloth.FastLanguageModel),
        (engine.FastModel, engine.unsloth.FastModel),
    )
    return {
        "built": built,
        "offloaded": offloaded(engine),
        "quantized": quantized(engine),
        "same_signature": [
            inspect.signature(getattr(ours, name)) == inspect.signature(getattr(theirs, name))
            for ours, theirs in pairs
            for name in ("from_pretrained", "get_peft_model")
        ],
        "inherited": engine.FastLanguageModel.for_inference is engine.unsloth.FastLanguageModel.for_inference,
    }


def offloaded(engine) -> dict:
    """Offload an embedding as two ranks do, with the wrapper: whether it stays readable, and what is in the model's folder."""
    import torch

    with TemporaryDirectory() as folder:
        model, weight = SimpleNamespace(config=SimpleNamespace(_name_or_path=folder)), torch.arange(6.0).view(2, 3)
        found = engine.to_own_file(engine.unsloth.models._utils.offload_to_disk)(weight, model, "input_embeddings")
        return {
            "equal": torch.equal(found, weight),
            "left": os.listdir(folder),
            "name": model.config._name_or_path == folder,
        }


def quantized(engine) -> list:
    """Quantize as the second process of a node does: what it gets, and what it computed itself."""
    own, its_own_channel = [], engine.channel
    engine.channel = lambda: SimpleNamespace(run_on_local_main=lambda name, function: "folder of the first process")
    try:
        return [engine.once_per_node(own.append)("model", fp8_mode="row"), own]
    finally:
        engine.channel = its_own_channel


def load_fetched(model_folder: str, out: Path) -> None:
    """Load with our loader, on a GPU that is only pretended, with layers that are away, and write down what Unsloth made of it."""
    import torch

    pretend_gpu(torch)
    os.environ["ACCELERATE_UNSLOTH_FROZEN_WEIGHTS"] = "host"
    from accelerate_unsloth.engines import checks
    from accelerate_unsloth.engines.unsloth import FastLanguageModel
    from accelerate_unsloth.weights import loading, placed_weights

    checks.this_device = lambda: "cpu"
    loading.computes_with_shared_copy = lambda device: False
    options = {"max_seq_length": 64, "load_in_4bit": False, "dtype": torch.float16, "device_map": {"": "cpu"}}
    model, _ = FastLanguageModel.from_pretrained(model_folder, **options)
    layers = model.model.layers
    model = FastLanguageModel.get_peft_model(model, r=4)
    FastLanguageModel.for_training(model)
    model.save_pretrained(str(out / "adapter"))
    layers._unsloth_block_swap.enter(1)
    placed = placed_weights(model)
    in_use = torch.equal(layers[1].mlp.up_proj.base_layer.weight, stored(placed, layers[1].mlp.up_proj))
    away = layers[0].mlp.up_proj
    with torch.no_grad():
        torch.nn.init.normal_(away.lora_B["default"].weight)
        merged, _ = sys.modules["unsloth.save"]._merge_lora(away, "up_proj")
        change = away.lora_B["default"].weight @ away.lora_A["default"].weight * away.scaling["default"]
    plain, _ = sys.modules["unsloth.save"]._merge_lora(away.base_layer, "up_proj")  # as of a layer without adapters
    with placed.fetcher.stopped():
        """At its end no layer is there."""
    seen = {
        "plain": torch.equal(plain, stored(placed, away)),
        "merged": torch.allclose(merged.float(), stored(placed, away).float() + change.float(), atol=1e-2),
        "mode": placed.choice.mode,
        "shared": len(placed.shared),
        "parameters": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "in_use": in_use,
    }
    (out / "fetched.json").write_text(json.dumps(seen))


def stored(placed, layer):
    return next(tensor.stored for tensor in placed.shared if tensor.module is layer.base_layer)


def pretend_gpu(torch) -> None:
    """Let Unsloth's loader find a GPU to ask for its name and memory, and put what it makes itself onto the CPU."""
    properties = SimpleNamespace(name="none", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132)
    vars(torch.cuda).update(
        get_device_properties=lambda *args: properties,
        get_device_capability=lambda *args: (9, 0),
        mem_get_info=lambda *args: (80 * 2**30, 80 * 2**30),
        max_memory_reserved=lambda *args: 0,
        current_device=lambda: 0,
        synchronize=lambda *args: None,
    )
    for name, module in list(sys.modules.items()):
        if name.startswith("unsloth") and hasattr(module, "get_current_device"):
            module.get_current_device = lambda: torch.device("cpu")
        if name.startswith("unsloth") and getattr(module, "DEVICE_TYPE_TORCH", None) == "cuda":
            module.DEVICE_TYPE_TORCH = "cpu"
