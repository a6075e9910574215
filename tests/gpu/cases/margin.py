"""
Fine-tunes that fill the GPU: activations are kept where they fit, and nothing may run out of memory that recomputing them
would not have run out of.

The model has the dimensions of Llama-3.2-1B, 4-bit weights, and samples of up to 2,048 tokens, 64 of them in a step. All
cases train on the same samples, so their losses are comparable.
"""

import subprocess
import sys
from contextlib import contextmanager

from accelerate_unsloth.engines import select  # noqa: F401  # Unsloth comes before transformers

# isort: split
import torch
from transformers import TrainerCallback

from accelerate_unsloth.engines import kernels

from . import training

GIB = 2**30
_ARGUMENTS = {"per_device_train_batch_size": 64, "max_steps": 4, "max_length": 2048, "learning_rate": 2e-4}
_EVALUATION = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
_EVALUATED = 16

# Reads how many bytes to leave free, and takes all others of its GPU, until its input ends.
_NEIGHBOUR = """
import sys, torch
held = [torch.zeros(1, device="cuda")]
print("started", flush=True)
for line in sys.stdin:
    taken = torch.cuda.mem_get_info()[0] - int(line)
    held.append(torch.empty(max(taken, 0), dtype=torch.uint8, device="cuda"))
    print("taken", flush=True)
"""


def fine_tune(
    case,
    model="1b",
    plugin=None,
    evaluate=False,
    generate=False,
    cap_gib=None,
    neighbour_leaves_gib=None,
    neighbour_grows_at_step=0,
):
    """
    Train with `use_gradient_checkpointing="unsloth"`, as nearly every Unsloth script does.

    Args:
        evaluate (`bool`): Whether to evaluate the longest samples after the second step and after the last.
        generate (`bool`): Whether to generate text after the second step.
        cap_gib (`float`): What PyTorch may allocate beside the loaded model, once the steps have been planned without it.
        neighbour_leaves_gib (`float`): What another process leaves of the GPU.
        neighbour_grows_at_step (`int`): Steps before it takes that; `0` is before the model is loaded.
    """
    with neighbour(case, neighbour_leaves_gib) as take:
        if not neighbour_grows_at_step:
            take()
        loaded, tokenizer = training.load(
            case,
            model,
            load={"load_in_4bit": True, "max_seq_length": 2048},
            lora={"r": 16, "use_gradient_checkpointing": "unsloth"},
        )
        rows = training.rows_of(case, "long")
        longest = sorted(range(len(rows)), key=lambda index: -len(rows[index]["text"]))[:_EVALUATED]
        watch = Watch(take if neighbour_grows_at_step else None, neighbour_grows_at_step, generate, cap_gib)
        arguments = _ARGUMENTS | (_EVALUATION if evaluate else {})
        trainer = training.make_trainer(
            case, loaded, tokenizer, rows, arguments, plugin, [watch], evaluated=rows.select(longest)
        )
        trainer.train()
        evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        return training.describe(trainer) | {
            "eval_losses": evaluations,
            "generated": watch.generated,
            "recomputes_at_end": watch.recomputes,
            "peak_gib": watch.peak_gib,
            "total_gib": torch.cuda.mem_get_info()[1] / GIB if case.on_gpu else 0,
        }


def cap_allocations(gib: float) -> None:
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + gib * GIB
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])


@contextmanager
def neighbour(case, leaves_gib: float | None):
    """Another process on this GPU, and the function that makes it take all but so much of what is free then."""
    if not leaves_gib or not case.on_gpu:
        yield lambda: None
        return
    process = subprocess.Popen(
        [sys.executable, "-c", _NEIGHBOUR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def answers(word):
        line = process.stdout.readline().strip()
        assert line == word, f"the neighbour said {line!r} instead of {word!r}"

    def take():
        torch.cuda.empty_cache()  # what PyTorch only keeps for later is free to the neighbour
        process.stdin.write(f"{int(leaves_gib * GIB)}\n")
        process.stdin.flush()
        answers("taken")

    try:
        answers("started")
        yield take
    finally:
        process.kill()
        process.communicate()


class Watch(TrainerCallback):
    """Measures the peak of training, and does in its middle what a case asks for."""

    def __init__(self, take, take_at_step: int, generate: bool, cap_gib: float | None):
        self._cap_gib = cap_gib
        self._take, self._take_at_step, self._generate = take, take_at_step, generate
        self.generated, self.recomputes, self.peak_gib = 0, None, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            if self._cap_gib:
                cap_allocations(self._cap_gib)

    def on_step_begin(self, args, state, control, **kwargs):
        if self._take is not None and state.global_step == self._take_at_step:
            self._take()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self._generate and state.global_step == 2:
            self.generated = generate(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.recomputes = kernels.recomputes(model)
        if torch.cuda.is_available():
            self.peak_gib = torch.cuda.max_memory_allocated() / GIB


@torch.no_grad()
def generate(model, prompt_tokens: int = 512, new_tokens: int = 64) -> int:
    """Return how many tokens came."""
    with training.generated(model, prompt_tokens, new_tokens) as output:
        return output.shape[1] - prompt_tokens
