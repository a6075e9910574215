"""
The same LoRA fine-tune with its frozen weights in different places: seconds of a step, memory of each GPU, and losses.

    accelerate launch --config_file unsloth_ddp.yaml --num_processes 2 benchmarks/placements.py MODEL DATA \
        --cases replicated:4 sharded:4 host:4 --out placements.json

A case is `PLACEMENT:BITS[:CHECKPOINTING[:GIB]]`: the value of `frozen_weights`, 4, 16 or fp8, that of `gradient_checkpointing`, and
the memory that PyTorch may use of each GPU. All cases run in the same processes, one after the other, with the settings of
Unsloth's notebooks: `--batch` 2 samples x 4 accumulation steps on each process. MODEL and DATA are as `accelerate-unsloth bench` makes
them.
"""

import argparse
import gc
import json
import os
import statistics
import time
from pathlib import Path

from accelerate_unsloth import FastLanguageModel, SFTTrainer, UnslothPlugin

# isort: split
import datasets
import torch
from timing import Stopwatch, arguments, losses_and_tokens

from accelerate_unsloth.weights import placed_weights
from accelerate_unsloth.weights.placement import VARIABLE

GIB = 2**30


def used_gib() -> float:
    """Memory of this GPU that all processes hold, by PyTorch or not."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def measure(case: str, options) -> dict:
    parts = case.split(":")
    placement, bits, checkpointing, gib = parts + ["auto", "0"][len(parts) - 2 :]
    if float(gib):
        torch.cuda.set_per_process_memory_fraction(float(gib) * GIB / torch.cuda.mem_get_info()[1])
    os.environ[VARIABLE] = placement
    before_gib, began_s = used_gib(), time.perf_counter()
    precision = {"load_in_4bit": bits == "4"} | ({"load_in_fp8": True} if bits == "fp8" else {})
    model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=options.max_length, **precision)
    load_s, weights_gib = time.perf_counter() - began_s, used_gib() - before_gib
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, random_state=0)
    clock = Stopwatch()
    trainer = SFTTrainer(
        model,
        args=arguments(str(Path(options.out).with_suffix("")), options.batch, 4, options.steps, options.max_length),
        train_dataset=datasets.Dataset.from_json(options.data),
        processing_class=tokenizer,
        plugin=UnslothPlugin(gradient_checkpointing=checkpointing),
        callbacks=[clock],
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    losses, tokens = losses_and_tokens(trainer)
    steady = clock.step_s[len(clock.step_s) // 3 :]
    return {
        "case": case,
        "placement": [placed_weights(model).choice.mode, placed_weights(model).choice.reason],
        "load_s": load_s,
        "weights_gib": weights_gib,
        "step_s": statistics.median(steady),
        "tokens_per_second": sum(tokens[-len(steady) :]) / sum(steady),
        "peak_of_pytorch_gib": torch.cuda.max_memory_allocated() / GIB,
        "checkpointing": trainer.plan.checkpointing.label,
        "micro_batch": trainer.plan.micro_batch.reason,
        "losses": losses,
        "all_step_s": clock.step_s,
    }


def clean_up() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch._dynamo.reset()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--cases", nargs="+", default=["replicated:4", "sharded:4", "host:4"])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--out", default="placements.json")
    options = parser.parse_args()
    rank, results = int(os.environ.get("RANK", 0)), []
    for case in options.cases:
        results.append(measure(case, options))
        clean_up()
        Path(options.out).with_suffix(f".rank{rank}.json").write_text(
            json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}, indent=1)
        )
        if rank == 0:
            shown = {name: value for name, value in results[-1].items() if not isinstance(value, list)}
            print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
