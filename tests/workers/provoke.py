"""What can go wrong in a long run, provoked at a chosen step of a chosen rank: `{"what": ..., "rank": 1, "step": 3}`."""

import os
import resource
import signal
import subprocess
import time

import psutil
import torch
from transformers import TrainerCallback

from accelerate_unsloth.reliability import failures


def limit_memory(model, tokens: int) -> None:
    """As on a GPU whose memory holds micro-batches of so many tokens, padding included, with gradients."""

    def check(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        if torch.is_grad_enabled() and ids.numel() > tokens:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Simulated above {tokens} tokens")

    model.register_forward_pre_hook(check, with_kwargs=True)


class Provoke(TrainerCallback):
    def __init__(self, what: str, step: int, rank: int = 1, always: bool = False):
        self.always = always
        self.what, self.step = what, step
        self.here = int(os.environ.get("RANK", 0)) == rank
        self.first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.here and state.global_step == self.step and self.what == "nan":
            self.weight = next(p for p in model.parameters() if p.requires_grad)
            self.hook = self.weight.register_hook(lambda gradient: gradient * float("nan"))

        if self.here and state.global_step == self.step and self.what == "out_of_memory":
            weights = [p for p in model.parameters() if p.requires_grad]
            self.hook = weights[0].register_hook(self.run_out_of_memory)

    def run_out_of_memory(self, gradient):
        """In a backward that is nearly done, so that other weights have their gradients; once, or always."""
        if self.always:
            self.fail_alone()
        else:
            self.hook.remove()
        raise torch.OutOfMemoryError("CUDA out of memory. Provoked by a test")

    def on_save(self, args, state, control, **kwargs):
        if self.here and self.what == "type_error_on_save" and state.global_step > self.step:
            self.fail_alone()
            raise TypeError("a callback of a user is wrong")

    def fail_alone(self):
        """Rank 0 is waiting for this one, so it need not be given seconds to report the same error."""
        failures._WAIT_FOR_MAIN_S = 0.5

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.here and self.what == "kill_in_evaluation" and state.global_step >= self.step:
            self.kill()

    def kill_in_evaluation(self):
        """Provoked by `on_prediction_step`, in the first evaluation from this step on."""

    def out_of_memory(self):
        """Provoked in the backward."""

    def on_step_end(self, args, state, control, **kwargs):
        if self.here and self.first_attempt and state.global_step == self.step:
            self.weights = [p for p in kwargs["model"].parameters() if p.requires_grad]
            self.folder, self.optimizer = args.output_dir, kwargs["optimizer"]
            getattr(self, self.what)()
        if hasattr(self, "hook"):
            self.hook.remove()

    def nan(self):
        """Provoked before the step, by `on_step_begin`."""

    def drift(self):
        """A weight of this rank changes a little."""
        with torch.no_grad():
            self.weights[0].view(-1)[0] += 1e-3

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def lose_launcher(self):
        """The launcher of this machine dies without a word, and its processes are still there."""
        os.kill(os.getppid(), signal.SIGKILL)

    def lose_power(self):
        """The launcher of this machine and all its processes die at once."""
        launcher = psutil.Process(os.getppid())
        *others, here = sorted(launcher.children(recursive=True), key=lambda process: process.pid == os.getpid())
        for process in [launcher, *others, here]:
            process.kill()

    def full_disk(self):
        """No file of this process may grow beyond 4 KiB from now on."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    def type_error_on_save(self):
        """Provoked by `on_save`."""

    def type_error_in_a_checkpoint(self):
        """An optimizer of a user cannot say its state."""
        self.optimizer.state_dict = lambda: "state" + 1

    def read_only_disk(self):
        """The output folder becomes read-only, in the mount namespace that the test made for the launch."""
        subprocess.run(["mount", "--bind", self.folder, self.folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", self.folder], check=True)

    def hang(self):
        while True:
            time.sleep(60)

    def terminate_launcher(self):
        """What a scheduler does to a preempted job: the launcher is told, and tells its processes."""
        os.kill(os.getppid(), signal.SIGTERM)

    def interrupt(self):
        os.kill(os.getpid(), signal.SIGINT)
