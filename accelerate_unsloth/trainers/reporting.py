"""What is said of a run: readings with each log, warnings of memory pressure, the report at its end."""

import time
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..reliability import rank0_writes
from ..reporting import html
from ..reporting.memory_warnings import PressureWatch
from ..reporting.readings import summary

logger = logging.get_logger(__name__)


class ReportMixin:
    """Readings and the training report, for [`DistributedTrainerMixin`]."""

    def __init__(self, *args, **kwargs):
        self._clock, self._pressure = _RunClock(), PressureWatch()
        super().__init__(*args, **kwargs)
        self.add_callback(self._clock)

    def train(self, *args, **kwargs):
        """As the Trainer's; then rank 0 writes `training_report.html` into the output folder."""
        self._clock.start()
        self._pressure = PressureWatch()
        output = super().train(*args, **kwargs)
        self._clock.stop()
        if self.plugin.report:
            # All leave together: after a signal, a rank that ended would make the launcher end rank 0 over its report.
            rank0_writes.write_once("report", self._write_report)
        return output

    def _write_report(self) -> None:
        """A report that cannot be written costs a warning, not the training."""
        try:
            self._clock.spent.unlogged_s = self._monitor.unlogged_s
            record = html.collect(
                self,
                self._clock.began,
                self._clock.began_at_step,
                self._clock.spent,
                self._monitor.history,
                self._pressure.messages.values(),
            )
            html.write(record, Path(self.args.output_dir))
        except Exception as error:  # whatever a drawing library, a full disk or an odd model comes up with
            logger.warning(
                f"The training is complete, but its report was not written to {self.args.output_dir} "
                f"({type(error).__name__}: {error}). Nothing else is missing; report=False leaves it out."
            )

    def _read_ranks(self) -> dict[str, float | int]:
        """The log entries of all ranks, which come here together; rank 0 warns of memory that is about to run out."""
        ranks = self._monitor.read(self.state.global_step)
        for message in self._pressure.new_warnings(ranks):
            if self.is_world_process_zero():
                logger.warning(message)
        return summary(ranks)

    def _evaluate(self, *args, **kwargs):
        with self._clock.spending("evaluation_s"):
            release_cache_if_in_the_way(self.args.device)
            metrics = super()._evaluate(*args, **kwargs)
            release_cache_if_in_the_way(self.args.device)
        return metrics

    def _save_checkpoint(self, *args, **kwargs):
        with self._clock.spending("checkpoints_s"):
            super()._save_checkpoint(*args, **kwargs)


def cache_is_in_the_way(cached_bytes: int, free_bytes: int, total_bytes: int) -> bool:
    """Return whether PyTorch's cache is over a tenth of a GPU of which less than a quarter is free."""
    return cached_bytes > 0.1 * total_bytes and free_bytes < 0.25 * total_bytes


def release_cache_if_in_the_way(device: torch.device) -> None:
    """
    Release PyTorch's cache between training and evaluation, if it is large and the GPU is nearly full.

    Blocks of one phase rarely fit the micro-batches of the other, so the GPU would hold both sets. PyTorch frees them only
    when an allocation fails.
    """
    if device.type == "cuda":
        cached_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if cache_is_in_the_way(cached_bytes, *torch.cuda.mem_get_info(device)):
            torch.cuda.empty_cache()


class _RunClock(TrainerCallback):
    """Where the time of `train()` goes, outside of steps."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        self.began, self.began_at_step, self.spent = time.strftime("%Y-%m-%d %H:%M:%S %Z"), 0, html.PhaseSeconds()
        self._began_s = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.began_at_step = state.global_step
        self.spent.preparation_s = time.perf_counter() - self._began_s

    @contextmanager
    def spending(self, what: str):
        began_s = time.perf_counter()
        try:
            yield
        finally:
            setattr(self.spent, what, getattr(self.spent, what) + time.perf_counter() - began_s)

    def stop(self) -> None:
        self.spent.total_s = time.perf_counter() - self._began_s
