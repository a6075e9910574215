"""
Load models twice, replicated and shared, and compare what transformers makes of their weights: in 4 bits, and with a weight
that the checkpoint lacks and one that the model does not know. Then compare gradients of 4-bit models, whose layers are fetched.

    shared_loading.py MODEL_FOLDER DEEP_MODEL_FOLDER WORK_FOLDER
"""

import shutil
import sys
from pathlib import Path

from accelerate_unsloth.engines.select import choice

# isort: split
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

from accelerate_unsloth.launch.channel import channel
from accelerate_unsloth.launch.topology import topology
from accelerate_unsloth.patches import patched
from accelerate_unsloth.reliability.checksum import bit_sums
from accelerate_unsloth.weights import loading, placed_weights
from accelerate_unsloth.weights.loading import placing

LAYER = "model.layers.1"
ROTARY = (torch.ones(1, 4, 8, dtype=torch.bfloat16), torch.zeros(1, 4, 8, dtype=torch.bfloat16))
NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)


def load(folder: str, placement: str, **options):
    with placing(placement, "cpu"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **options)


def dequantized(model) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        weights[name] = parameter.data if state is None else dequantize_4bit(parameter.data, state)
    return weights


def compare_incomplete(folder: str) -> None:
    """The missing weight is drawn at random, from the same state, and both loads report the same."""
    found = []
    for placement in ("replicated", "host"):
        torch.manual_seed(7)
        model, report = load(folder, placement, output_loading_info=True)
        found.append((bit_sums(dict(model.named_parameters())), report))
    assert found[0] == found[1], found
    assert found[1][1]["missing_keys"] == {f"{LAYER}.mlp.up_proj.weight"}
    assert found[1][1]["unexpected_keys"] == {f"{LAYER}.extra.weight"}


def compare(folder: str, **options) -> None:
    replicated, shared = load(folder, "replicated", **options), load(folder, "host", **options)
    placed = placed_weights(shared)
    assert placed.choice.mode == "host"
    assert sum(hasattr(tensor.parameter, "quant_state") for tensor in placed.shared) == 14  # 7 in each of 2 layers
    assert bit_sums(dequantized(shared)) == bit_sums(dequantized(replicated))
    assert shared.state_dict().keys() == replicated.state_dict().keys()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(shared.train()(ids).logits, replicated.train()(ids).logits)


def gradients(model, recomputes: bool) -> list[torch.Tensor]:
    """Those of LoRA with dropout, which runs bitsandbytes' own products; another forward in between moves the slots."""
    set_seed(0)
    model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear"))
    model.train()
    if recomputes:
        model.gradient_checkpointing_enable()
    ids, found = torch.arange(8)[None], []
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        with torch.no_grad():
            model(input_ids=ids[:, :4])
            model.base_model.model.model.layers[4](
                torch.zeros(1, 4, 32, dtype=torch.bfloat16), position_embeddings=ROTARY
            )
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        with torch.no_grad():  # or the gradients of half of the adapters would be zero
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter += 0.01
    return found


def compare_training(folder: str) -> None:
    for recomputes in (False, True):
        replicated = gradients(load(folder, "replicated", quantization_config=NF4), recomputes)
        with patched(loading, computes_with_shared_copy=lambda device: False):
            fetched = load(folder, "host", quantization_config=NF4)
        for one, other in zip(replicated, gradients(fetched, recomputes), strict=True):
            assert len(one) == len(other) > 0
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def main(model: str, deep_model: str, out: str) -> None:
    assert choice.name == "reference"
    compare(model, quantization_config=NF4)
    quantized, incomplete = (str(Path(out) / name) for name in ("quantized", "incomplete"))
    if topology().is_main:
        load(model, "replicated", quantization_config=NF4).save_pretrained(quantized)
        shutil.copytree(model, incomplete)
        file = Path(incomplete) / "model.safetensors"
        tensors = load_file(file)
        tensors[f"{LAYER}.extra.weight"] = tensors.pop(f"{LAYER}.mlp.up_proj.weight")
        save_file(tensors, file, metadata={"format": "pt"})
    channel().gather("written", True)
    compare(quantized)
    compare_incomplete(incomplete)
    compare_training(deep_model)


if __name__ == "__main__":
    main(*sys.argv[1:4])
