"""
Load a model in 4 bits twice, replicated and shared, and compare what transformers makes of the weights.

    shared_4bit.py MODEL_FOLDER WORK_FOLDER
"""

import sys
from pathlib import Path

from accelerate_unsloth.engines.select import choice

# isort: split
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from accelerate_unsloth.launch.channel import channel
from accelerate_unsloth.launch.topology import topology
from accelerate_unsloth.reliability.checksum import bit_sums
from accelerate_unsloth.weights import placed_weights
from accelerate_unsloth.weights.loading import placing

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


def main(model: str, out: str) -> None:
    assert choice.name == "reference"
    compare(model, quantization_config=NF4)
    quantized = str(Path(out) / "quantized")
    if topology().is_main:
        load(model, "replicated", quantization_config=NF4).save_pretrained(quantized)
    channel().gather("quantized", True)
    compare(quantized)


if __name__ == "__main__":
    main(*sys.argv[1:3])
