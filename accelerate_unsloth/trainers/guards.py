"""What ends a run before its last step: signals, a stand-still, numbers gone bad."""

import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..launch.channel import channel
from ..launch.topology import topology
from ..reduction import are_finite
from ..reliability.checksum import bit_sums
from ..reliability.stop_signals import StopRequest
from ..reliability.watchdog import Watchdog, resolve_timeout
from ..reporting.verbosity import muted_prints, without_training_banner

logger = logging.get_logger(__name__)


class GuardMixin:
    """Stopping in order, for [`DistributedTrainerMixin`]."""

    def __init__(self, *args, **kwargs):
        self._stop, self._stop_agreed, self._watchdog = StopRequest(), False, None
        super().__init__(*args, **kwargs)
        self._watchdog_timeout_s = resolve_timeout(
            self.plugin.watchdog_timeout_s, self.args.ddp_timeout, topology().world_size
        )
        self.add_callback(_GuardCallback(self))

    def train(self, *args, **kwargs):
        """
        As the Trainer's. SIGTERM and Ctrl-C finish the step and save one checkpoint.

        Raises:
            SystemExit: with 128 + the signal's number, after such a stop.
        """
        with self._stop.listening(), self._watched(), muted_prints(), without_training_banner():
            output = super().train(*args, **kwargs)
        if self._stop_agreed:
            # All ranks end with the status of one signal, so that the launcher reports it whichever rank ends first.
            signals = [number for number in channel().gather("signal", self._stop.signal) if number]
            if self.is_world_process_zero():
                print(
                    f"Stopped by a signal after step {self.state.global_step}; the checkpoint is in "
                    f"{self.args.output_dir}. Go on with resume_from_checkpoint='auto'.",
                    file=sys.stderr,
                )
            sys.exit(128 + (signals[0] if signals else signal.SIGTERM))
        return output

    @property
    def was_stopped(self) -> bool:
        """Whether a signal ended the training, on any rank."""
        return self._stop_agreed

    @contextmanager
    def _watched(self):
        """A watchdog around the training loop, unless it is switched off or a debugger may hold the process."""
        if self._watchdog_timeout_s and sys.gettrace() is None:
            self._watchdog = Watchdog(self._watchdog_timeout_s, Path(self.args.output_dir))
            self._watchdog.start()
        try:
            yield
        finally:
            if self._watchdog is not None:
                self._watchdog.stop()
                self._watchdog = None

    def _note_end_of_step(self, stop_votes: int, nonfinite_ranks: list[int]) -> None:
        """What all ranks agreed on in this step, the same on each of them."""
        self._in_step = False
        if self._balance is not None:
            self._balance.end_step()
        self._stop_agreed = self._stop_agreed or stop_votes > 0
        if nonfinite_ranks:
            self._handle_nonfinite(nonfinite_ranks)

    def _handle_nonfinite(self, ranks: list[int]) -> None:
        step = self.state.global_step
        samples = channel().gather("samples", self._step_samples)
        where = "; ".join(f"rank {rank}{f' (samples {samples[rank]})' if samples[rank] else ''}" for rank in ranks)
        message = f"The loss or a gradient of step {step + 1} is not finite on {where}."
        if self.plugin.on_nonfinite == "stop":
            raise FloatingPointError(
                f"{message} Look at these samples, lower learning_rate, or set on_nonfinite='skip' to pass over such steps."
            )
        if self.is_world_process_zero():
            logger.warning(f"{message} The step is skipped on all ranks.")
        if self.accelerator.scaler is None:  # a GradScaler skips by itself, and wants to see the gradients for it
            for parameter in self.model.parameters():
                parameter.grad = None

    def _own_numbers_are_finite(self, loss: torch.Tensor) -> bool:
        """Where no reduction of ours looks at them: this process's loss, and its gradients unless a GradScaler does."""
        scales = self.accelerator.scaler is not None
        gradients = [] if scales else [p.grad for p in self.model.parameters() if p.grad is not None]
        return are_finite(loss, gradients)

    def _check_weights_are_equal(self) -> None:
        """
        Compare the trainable weights of all ranks, bit for bit, by a checksum of 8 bytes.

        Raises:
            RuntimeError: naming the ranks that differ from rank 0.
        """
        if topology().world_size == 1:
            return
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        checksum = sum(bit_sums(trained).values())
        checksums = channel().gather("weights", checksum)
        others = [rank for rank, value in enumerate(checksums) if value != checksums[0]]
        if others:
            raise RuntimeError(
                f"The trainable weights of rank(s) {', '.join(map(str, others))} differ from rank 0's at step "
                f"{self.state.global_step}, so the ranks no longer train one model. Nothing was saved; resume from the "
                "last checkpoint, and look for code that changes weights or gradients on some ranks only."
            )


class _GuardCallback(TrainerCallback):
    """Feeds the watchdog, and turns an agreed stop into the Trainer's own controls."""

    def __init__(self, trainer: GuardMixin):
        self._trainer = trainer

    def _beat(self, args, state, control, **kwargs):
        if self._trainer._watchdog is not None:
            self._trainer._watchdog.beat(state.global_step)

    on_substep_end = on_prediction_step = on_save = on_evaluate = on_log = _beat

    def on_step_end(self, args, state, control, **kwargs):
        self._beat(args, state, control)
        if self._trainer._stop_agreed:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._trainer._stop_agreed:  # the checkpoint is written already, and time is short
            control.should_save = control.should_evaluate = False
        return control
