"""The Trainer's checkpoints, written by several processes and complete or invisible; resume from the newest."""

import functools
import shutil
import uuid
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import transformers.trainer
from peft import PeftModel
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, sort_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..launch.channel import channel
from ..patches import patched
from ..reliability import checkpoints, rank0_writes, stock_checkpoints
from .guards import check_weights_are_equal
from .resume import check_effective_batch, newest_checkpoint, say_if_finished

logger = logging.get_logger(__name__)


class CheckpointMixin:
    """Saving and resuming, for [`DistributedTrainerMixin`]."""

    _staging: Path | None = None
    _run: str | None = None

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        Train as the Trainer does. `resume_from_checkpoint="auto"` resumes from the newest complete checkpoint if there is
        one, whether this trainer or the stock one wrote it.

        Raises:
            ValueError: for `resume_from_checkpoint=True` without a complete checkpoint.
        """
        if resume_from_checkpoint in ("auto", True):
            found = newest_checkpoint(Path(self.args.output_dir))
            if found is None and resume_from_checkpoint is True:
                raise ValueError(
                    f"resume_from_checkpoint=True, but {self.args.output_dir} holds no complete checkpoint. Use 'auto' "
                    "to start from the beginning in that case."
                )
            resume_from_checkpoint = found
        if resume_from_checkpoint and not self.args.ignore_data_skip:  # False is as None, as with the Trainer
            check_effective_batch(
                Path(resume_from_checkpoint),
                self.effective_batch,
                self.args.gradient_accumulation_steps,
                len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
                self.args.dataloader_drop_last,
            )
        self._run = self._run_resumed_from(resume_from_checkpoint) or self._run or uuid.uuid4().hex
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint:
            say_if_finished(Path(resume_from_checkpoint), self.state.max_steps)
        return output

    def _run_resumed_from(self, checkpoint: str | None) -> str | None:
        """Return the id of the run that goes on in its own `output_dir`, whose checkpoints `save_total_limit` counts."""
        if not checkpoint or Path(checkpoint).resolve().parent != Path(self.args.output_dir).resolve():
            return None
        return checkpoints.run_of(Path(checkpoint))

    @property
    def effective_batch(self) -> int:
        """Samples of an optimizer step, over all ranks."""
        samples = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return samples * self.accelerator.num_processes

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        with self._adapters_loaded_here():
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
            # With a second adapter, such as DPO's "ref", the Trainer loads those in sub-folders only, and the one that is
            # trained starts anew (transformers 5.17, `Trainer._load_from_checkpoint`). Delete this when it loads both.
            if isinstance(self.model, PeftModel) and len(self.model.peft_config) > 1:
                for name in self.model.active_adapters:
                    if not (Path(resume_from_checkpoint) / name).is_dir():
                        self.model.load_adapter(resume_from_checkpoint, name, is_trainable=True)

    def _load_best_model(self):
        with self._adapters_loaded_here():
            super()._load_best_model()

    def _adapters_loaded_here(self) -> AbstractContextManager:
        """PEFT loads adapters onto the first GPU unless told otherwise (peft 0.21, `infer_device`)."""
        if not isinstance(self.model, PeftModel):
            return nullcontext()
        here = functools.partial(self.model.load_adapter, torch_device=str(self.args.device))
        return patched(self.model, load_adapter=here)

    def _save_checkpoint(self, model, trial):
        run_folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        check_weights_are_equal(self.model, self.state.global_step)
        self._staging = run_folder / checkpoints.STAGING
        try:
            shares_disk = checkpoints.prepare_staging(self._staging)
            super()._save_checkpoint(model, trial)
            required = checkpoints.gather_required(self._random_states_names(), shares_disk)
            rank0_writes.write_once("publish", functools.partial(self._publish, run_folder, name, required))
            # Only the rank that publishes knows the name under which the best checkpoint lies now.
            self.state.best_model_checkpoint = channel().gather("best", self.state.best_model_checkpoint)[0]
        except Exception as error:
            if not checkpoints.has_disk_refused(error):
                raise
            raise OSError(
                f"{name} could not be written to {run_folder} ({error}). Earlier checkpoints are as they were. Free "
                "some space or choose another output_dir, and resume with resume_from_checkpoint='auto'."
            ) from error
        finally:
            self._staging = None
        if self.args.push_to_hub:
            push = functools.partial(super()._push_from_checkpoint, str(run_folder / name))
            rank0_writes.write_once("push", push)

    def _random_states_names(self) -> list[str]:
        """Return what the Trainer calls the random states of this rank."""
        if self.args.save_only_model:
            return []
        return [f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"]

    def _names_of_main(self, written: Path) -> list[str]:
        """Return the files that rank 0 has to have written, beside its random states."""
        names = [TRAINER_STATE_NAME, *(stock_checkpoints.weights(written) or [SAFE_WEIGHTS_NAME])]
        if not self.args.save_only_model:
            names += [OPTIMIZER_NAME, SCHEDULER_NAME]
            names += [] if self.accelerator.scaler is None else [SCALER_NAME]
        return names

    def _publish(self, run_folder: Path, name: str, required: list[str]) -> None:
        written = self._staging / name
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(run_folder / name)
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        checkpoints.write_facts(written, {"effective_batch": self.effective_batch, "run": self._run})
        checkpoints.publish(written, run_folder / name, [*required, *self._names_of_main(written)])
        shutil.rmtree(self._staging, ignore_errors=True)
        keep = {run_folder / name, Path(self.state.best_model_checkpoint or run_folder / name)}
        checkpoints.rotate(run_folder, self.args.save_total_limit, keep, self._run)

    def _finalize_training(self, *args, **kwargs):
        """
        As the Trainer's, which with `save_total_limit=1` leaves only the best checkpoint at the end: of those of this run, and
        not after a signal, when the newest is the one to resume from.
        """
        with patched(transformers.trainer, sort_checkpoints=self._sort_own_checkpoints):
            return super()._finalize_training(*args, **kwargs)

    def _sort_own_checkpoints(self, *args, **kwargs) -> list[str]:
        found = [] if self.was_stopped else sort_checkpoints(*args, **kwargs)
        return [path for path in found if checkpoints.run_of(Path(path)) == self._run]

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Later, when the checkpoint has its name."""

    def save_model(self, output_dir=None, _internal_call=False):
        """Write the model on rank 0, while the others wait."""
        save_model, folder = super().save_model, output_dir or self.args.output_dir

        def save():
            save_model(output_dir, _internal_call=_internal_call)
            rank0_writes.follow_umask(folder)

        rank0_writes.write_once("model", save)

    def push_to_hub(self, *args, **kwargs):
        """Push from rank 0, while the others wait."""
        return rank0_writes.write_once("push_to_hub", functools.partial(super().push_to_hub, *args, **kwargs))
