"""What ends a run before its last step: signals, a hang, weights that differ between ranks."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainerCallback

from ..launch.channel import channel
from ..launch.topology import topology
from ..reliability.checksum import bit_sums
from ..reliability.stop_signals import StopRequest
from ..reliability.watchdog import Watchdog, resolve_timeout


class Guards(TrainerCallback):
    """
    Stops a training in order; as a callback it feeds the watchdog and turns an agreed stop into the Trainer's controls.

    Stacks are written into `output_dir`. The timeouts are those of [`resolve_timeout`].

    Attributes:
        was_stopped (`bool`): Whether a signal ended the training, on any rank.
    """

    def __init__(self, output_dir: str, watchdog_timeout_s: float | None, group_timeout_s: float):
        self._output_dir = Path(output_dir)
        self._timeout_s = resolve_timeout(watchdog_timeout_s, group_timeout_s, topology().world_size)
        self._stop, self._watchdog = StopRequest(), None
        self.was_stopped = False

    @property
    def wants_stop(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._stop.signal is not None

    @contextmanager
    def around_training(self) -> Iterator[None]:
        """Take signals as requests, and watch for a hang unless that is switched off or a debugger may hold the process."""
        if self._timeout_s and sys.gettrace() is None:
            self._watchdog = Watchdog(self._timeout_s, self._output_dir)
            self._watchdog.start()
        try:
            with self._stop.listening():
                channel().gather("training", True)  # a rank that has left would let the others hang in a collective
                yield
        finally:
            if self._watchdog is not None:
                self._watchdog.stop()
                self._watchdog = None

    def note_votes(self, stop_votes: int) -> None:
        """Take the votes of a step's reduction, the same on all ranks."""
        self.was_stopped = self.was_stopped or stop_votes > 0

    def exit_if_stopped(self, step: int) -> None:
        """
        End the process after an agreed stop; all ranks come here together.

        The status, 128 + the signal's number, is the same on all ranks: the launcher reports that of the rank that ends first.
        """
        if not self.was_stopped:
            return
        signals = [number for number in channel().gather("signal", self._stop.signal) if number]
        if topology().is_main:
            print(
                f"Stopped by a signal after step {step}; {self._output_dir}/checkpoint-{step} is complete. Go on with "
                "resume_from_checkpoint='auto'.",
                file=sys.stderr,
            )
        sys.exit(128 + (signals[0] if signals else signal.SIGTERM))

    def _beat(self, args, state, control, **kwargs):
        if self._watchdog is not None:
            self._watchdog.beat(state.global_step)

    on_substep_end = on_prediction_step = on_save = on_evaluate = on_log = _beat

    def on_step_end(self, args, state, control, **kwargs):
        self._beat(args, state, control)
        if self.was_stopped:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.was_stopped:  # the checkpoint is written already, and time is short
            control.should_save = control.should_evaluate = False
        return control


def check_weights_are_equal(model: torch.nn.Module, step: int) -> None:
    """Raise `RuntimeError` if the trainable weights of a rank, by a checksum of their bits, differ from rank 0's."""
    if topology().world_size == 1:
        return
    checksum = sum(bit_sums({name: p for name, p in model.named_parameters() if p.requires_grad}).values())
    checksums = channel().gather("weights", checksum)
    others = [str(rank) for rank, value in enumerate(checksums) if value != checksums[0]]
    if others:
        raise RuntimeError(
            f"The trainable weights of rank(s) {', '.join(others)} differ from rank 0's at step {step}, so the ranks no "
            "longer train one model. Nothing was saved; resume from the last checkpoint, and look for code that changes "
            "weights or gradients on some ranks only."
        )
