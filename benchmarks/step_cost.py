"""
What one optimizer step costs: peak memory and seconds by micro-batch, gradient checkpointing and attention kernel.

These are the measurements behind `accelerate_unsloth/memory.py` and the policies' estimates. One process, one GPU, one
model; a step is one micro-batch of rows without padding.

    python benchmarks/step_cost.py MODEL --bits 4 --out step_cost.json
    python benchmarks/step_cost.py MODEL --bits 4 --cases attention --out attention.json
"""

import argparse
import gc
import json
import random

from accelerate_unsloth import FastLanguageModel, SFTConfig, SFTTrainer, UnslothPlugin

# isort: split
import datasets
import torch
from timing import Stopwatch
from transformers.utils import logging

STEPS = 5
KERNELS = ("cudnn", "flash", "varlen")


class Meter(Stopwatch):
    """The peak of the steps after the first, which also makes the optimizer's state."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            torch.cuda.reset_peak_memory_stats()
            self.resting_gib = torch.cuda.memory_allocated() / 2**30
        super().on_step_begin(args, state, control, **kwargs)


def lengths_of(kind: str, tokens: int, generator: random.Random) -> list[int]:
    """
    Lengths that sum to `tokens`: `"lognormal"` around 400, a fixed or roughly fixed number such as `"~2048"`, or some of a few
    such as `"384,512"`.
    """
    lengths = []
    while sum(lengths) < tokens:
        if kind == "lognormal":
            length = min(2048, max(8, int(generator.lognormvariate(5.7, 0.8))))
        elif "," in kind:
            length = int(generator.choice(kind.split(",")))
        elif kind.startswith("~"):
            length = int(int(kind[1:]) * generator.uniform(0.7, 1.0))
        else:
            length = int(kind)
        lengths.append(min(length, tokens - sum(lengths)))
    return lengths


def measure(
    model,
    tokenizer,
    kind: str,
    tokens: int,
    checkpointing: str,
    kernel: str,
    steps: int = STEPS,
    optim: str = "adamw_8bit",
) -> dict:
    generator = random.Random(0)
    rows = []
    per_step = [lengths_of(kind, tokens, generator) for _ in range(steps)]
    samples = max(map(len, per_step))
    for lengths in per_step:
        lengths += [2] * (samples - len(lengths))
        rows += [{"input_ids": [generator.randrange(100, 40_000) for _ in range(n)]} for n in lengths]
    arguments = SFTConfig(
        "/tmp/step_cost",
        per_device_train_batch_size=samples,
        gradient_accumulation_steps=1,
        max_steps=steps,
        max_length=8192,
        optim=optim,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=True,
        train_sampling_strategy="sequential",
    )
    plugin = UnslothPlugin(
        micro_batch="fixed", gradient_checkpointing=checkpointing, attention=kernel, report=False, monitor=False
    )
    meter = Meter()
    case = {"lengths": kind, "tokens": tokens, "checkpointing": checkpointing, "kernel": kernel}
    try:
        trainer = SFTTrainer(
            model, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, plugin=plugin
        )
        trainer.add_callback(meter)
        trainer.train()
    except torch.OutOfMemoryError:
        return case | {"out_of_memory": True}
    finally:
        trainer = None
        gc.collect()
        torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    settled = sorted(meter.step_s[2:])
    return case | {
        "samples": samples,
        "step_s": settled[len(settled) // 2],
        "tokens_per_second": round(tokens / settled[len(settled) // 2]),
        "first_step_s": meter.step_s[0],
        "resting_gib": meter.resting_gib,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "outside_of_torch_gib": (total - free - torch.cuda.memory_reserved()) / 2**30,
    }


def cases(which: str, sizes: list[int]) -> list[tuple]:
    if which == "memory":
        return [("lognormal", tokens, mode, "auto") for mode in ("none", "unsloth") for tokens in sizes]
    return [
        (kind, tokens, "unsloth", kernel)
        for kind, tokens in (
            ("512", 8192),
            ("~512", 8192),
            ("256,384,512,896", 8192),
            ("2048", 8192),
            ("~2048", 8192),
            ("1280,1536,1792,2048", 8192),
            ("8192", 8192),
            ("~8192", 8192),
        )
        for kernel in KERNELS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 16))
    parser.add_argument("--cases", default="memory", choices=("memory", "attention"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    logging.set_verbosity_error()
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model, max_seq_length=8192, load_in_4bit=options.bits == 4
    )
    weights_gib = torch.cuda.memory_allocated() / 2**30
    model = FastLanguageModel.get_peft_model(model, r=options.r, lora_alpha=16)
    measured = {"gpu": torch.cuda.get_device_name(), "model": options.model, "bits": options.bits}
    measured |= {"r": options.r, "optim": options.optim, "weights_gib": weights_gib, "cases": []}
    for case in cases(options.cases, options.tokens):
        measured["cases"].append(measure(model, tokenizer, *case, optim=options.optim))
        print(json.dumps(measured["cases"][-1]), flush=True)
        with open(options.out, "w") as file:
            json.dump(measured, file, indent=1)


if __name__ == "__main__":
    main()
