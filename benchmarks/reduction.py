"""
Step time of full fine-tuning: our reduction after the backward against DistributedDataParallel, same model and rows.

    torchrun --nproc_per_node=2 benchmarks/reduction.py --out reduction.json

A Llama with random weights (about 1B parameters in bfloat16 by default) trains on rows of random tokens, the same number on
each rank, with SGD. `ddp` hides its buckets behind the backward; `chunked` is `ChunkedReducer`; `none` does not
communicate, so the others minus it is what the reduction costs.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from accelerate_unsloth.reduction import ChunkedReducer

SIZES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 256,
    },
}


def build(size: str, device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**SIZES[size], num_key_value_heads=4, tie_word_embeddings=True))
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)


def measure(mode: str, size: str, rows: int, tokens: int, accumulation: int, steps: int, device) -> dict:
    """Return step times in seconds, and a checksum of the weights at the end."""
    model = build(size, device)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if mode == "ddp" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    reducer = ChunkedReducer(list(model.parameters())) if mode == "chunked" else None
    generator = torch.Generator().manual_seed(dist.get_rank())
    items, seconds = torch.tensor(rows * tokens * accumulation, device=device), []
    for _ in range(steps):
        ids = torch.randint(0, model.config.vocab_size, (accumulation, rows, tokens), generator=generator).to(device)
        _wait(device)
        began_s = time.perf_counter()
        for turn, batch in enumerate(ids):
            last = turn == accumulation - 1
            with wrapped.no_sync() if mode == "ddp" and not last else torch.enable_grad():
                loss = wrapped(input_ids=batch, labels=batch).loss / accumulation
                loss.backward()
        if reducer is not None:
            reducer.reduce(loss.detach(), items, items)
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        seconds.append(time.perf_counter() - began_s)
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    return {"mode": mode, "step_s": statistics.median(seconds[2:]), "peak_gib": peak_gib, "weights": total}


def _wait(device: torch.device) -> None:
    """Let all ranks begin together, with nothing left to do on the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b", choices=SIZES)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    results = []
    for accumulation in options.accumulation:
        for mode in ("none", "ddp", "chunked", "ddp", "chunked"):
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            case = measure(mode, options.size, options.rows, options.tokens, accumulation, options.steps, device)
            results.append({"accumulation": accumulation, **case})
            if dist.get_rank() == 0:
                print(results[-1], flush=True)
                options.out.write_text(json.dumps({"options": str(vars(options)), "results": results}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
