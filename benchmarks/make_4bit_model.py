"""
Write a Llama with random weights as a checkpoint in 4 bits, layer by layer, so that no more than a layer, or the embeddings
with the head, is in memory.

    python benchmarks/make_4bit_model.py 70B FOLDER      Llama-3.3-70B dims: 37 GB, for `benchmarks/placements.py`

Sizes are those of `accelerate-unsloth estimate-memory`, also by the folder of a dense model. The layers are quantized on a
GPU if there is one. All linear layers of the decoder are NF4 with nested constants, as Unsloth's checkpoints are; embeddings,
head and norms stay in bfloat16.
"""

import json
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from accelerate_unsloth.memory import model_sizes
from accelerate_unsloth.testing import tiny_model

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
SPREAD = 0.02


def make(size: str, folder: Path) -> None:
    """Write config, tokenizer and one file for each layer into a folder."""
    shape = model_sizes.resolve(size).shape
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.quantization_config = NF4.to_dict()
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    text = tiny_model.standard_library(2_000_000)
    tiny_model.make_tokenizer(min(8_192, shape.vocabulary), text).save_pretrained(folder)
    parts = [f"model.layers.{index}." for index in range(shape.layers)]
    places, nbytes = {}, 0
    for number, part in enumerate([*parts, None], 1):
        file = f"model-{number:05d}-of-{len(parts) + 1:05d}.safetensors"
        tensors = tensors_of(model, part, parts, number)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        nbytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": nbytes}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tensors_of(model, part: str | None, parts: list[str], seed: int) -> dict[str, torch.Tensor]:
    """Draw the weights whose names begin with `part`, or those of no part."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator, tensors = torch.Generator(device).manual_seed(seed), {}
    for name, like in model.named_parameters():
        if not (name.startswith(part) if part else not name.startswith(tuple(parts))):
            continue
        if like.dim() < 2:
            tensors[name] = torch.ones(like.shape, dtype=torch.bfloat16)
            continue
        drawn = torch.empty(like.shape, dtype=torch.bfloat16, device=device).normal_(0, SPREAD, generator=generator)
        if part is None:
            tensors[name] = drawn.cpu()
            continue
        packed, state = bnb.quantize_4bit(drawn, quant_type="nf4", compress_statistics=True)
        tensors[name] = packed.cpu()
        tensors |= {f"{name}.{key}": value.cpu() for key, value in state.as_dict(packed=True).items()}
    return tensors


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
