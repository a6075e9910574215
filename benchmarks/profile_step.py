"""
Where the time of an optimizer step goes: seconds on the GPU by kind of kernel, beside the seconds of the step.

One process, one GPU, the benchmark's own workload (`accelerate-unsloth bench`), each attention kernel after the other.

    python benchmarks/profile_step.py MODEL DATA --attention varlen flash --out profile.json
"""

import argparse
import gc
import json
from collections import Counter

from accelerate_unsloth import FastLanguageModel, SFTTrainer, UnslothPlugin

# isort: split
import datasets
import torch
from timing import Stopwatch, arguments, losses_and_tokens
from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging

PROFILED = 3  # the last steps, whose own seconds are not counted: the profiler slows them

# The first word that a kernel's name holds decides.
KINDS = {
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "dequantize": ("dequantize",),
    "matmul": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk"),
    "copy": ("memcpy", "memset", "copy", "cat"),
    "norm, rope, swiglu, loss": (
        "triton",
        "rms",
        "layernorm",
        "rope",
        "swiglu",
        "_kernel",
        "cross_entropy",
        "logsumexp",
    ),
    "elementwise": ("elementwise", "foreach", "reduce"),
}


class Profiler(Stopwatch):
    """A profile of the last steps, whose seconds include starting it."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps, self.profiler = steps, profile(activities=[ProfilerActivity.CUDA])

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        if state.global_step == self.steps - PROFILED:
            self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == self.steps:
            self.profiler.stop()


def kind(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def measure(model, tokenizer, rows, attention: str, options) -> dict:
    plugin = UnslothPlugin(attention=attention)
    accumulation = options.effective_batch // options.batch
    settings = arguments("/tmp/profile_step", options.batch, accumulation, options.steps, options.max_length)
    trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer, plugin=plugin)
    watch = Profiler(options.steps)
    trainer.add_callback(watch)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    losses, tokens = losses_and_tokens(trainer)
    kernels, count = Counter(), 0
    for event in watch.profiler.key_averages():
        if event.self_device_time_total and event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.key] += event.self_device_time_total / 1e6 / PROFILED
            count += event.count / PROFILED
    kinds = Counter()
    for name, busy_s in kernels.items():
        kinds[kind(name)] += busy_s
    unprofiled = range(options.steps // 3, options.steps - PROFILED)
    seconds, done = (sum(series[step] for step in unprofiled) for series in (watch.step_s, [0, *tokens]))
    return {
        "attention": [trainer.attention.backend, trainer.attention.reason],
        "micro_batch": trainer.plan.micro_batch.reason,
        "checkpointing": trainer.plan.checkpointing.mode,
        "tokens_per_second": round(done / seconds),
        "tokens_a_step": round(done / len(unprofiled)),
        "step_s": watch.step_s,
        "losses": losses,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "busy_s": {name: round(busy_s, 4) for name, busy_s in kinds.most_common()},
        "profiled_tokens_a_step": round(sum(tokens[-PROFILED:]) / PROFILED),
        "kernels_a_step": round(count),
        "longest": [[name[:90], round(busy_s, 4)] for name, busy_s in kernels.most_common(25)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--attention", nargs="+", default=["auto"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--effective-batch", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 16))
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    logging.set_verbosity_error()
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model, max_seq_length=options.max_length, load_in_4bit=options.bits == 4
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, random_state=0)
    rows, measured = datasets.Dataset.from_json(options.data), []
    for attention in options.attention:
        measured.append(measure(model, tokenizer, rows, attention, options))
        print(json.dumps(measured[-1], indent=1), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    with open(options.out, "w") as file:
        json.dump({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "runs": measured}, file, indent=1)


if __name__ == "__main__":
    main()
