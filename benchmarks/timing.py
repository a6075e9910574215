"""What the scripts in this folder share: a clock for each step, and the settings of a fine-tune that is only timed."""

import time
from itertools import pairwise

from accelerate_unsloth import SFTConfig

# isort: split
import torch
from transformers import TrainerCallback


class Stopwatch(TrainerCallback):
    """Seconds of each step, in `step_s`."""

    def __init__(self):
        self.step_s, self.begin_s = [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.begin_s = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.step_s.append(time.perf_counter() - self.begin_s)


def arguments(folder: str, batch: int, accumulation: int, steps: int, max_length: int) -> SFTConfig:
    """Return arguments that log each step and save nothing."""
    return SFTConfig(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        max_length=max_length,
        learning_rate=1e-4,
        optim="adamw_8bit",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=True,
        seed=3,
    )


def losses_and_tokens(trainer) -> tuple[list[float], list[int]]:
    """Return the loss of each step, and the tokens of each step after the first."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry["loss"] for entry in logs], [b["num_tokens"] - a["num_tokens"] for a, b in pairwise(logs)]
