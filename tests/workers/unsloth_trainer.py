"""
The mixin over the trainer that Unsloth generates, on the CPU with the reference engine's model.

`UNSLOTH_ALLOW_CPU=1` imports Unsloth but leaves TRL as it is, so the patches that a GPU machine gets at import and at
the first `from_pretrained` are applied here by hand. What is missing of a real run are the kernels.
"""

import json
import os
import sys
from pathlib import Path

os.environ["UNSLOTH_ALLOW_CPU"] = "1"
import unsloth  # noqa: F401

del os.environ["UNSLOTH_ALLOW_CPU"]
# isort: split
import datasets
import transformers
import trl
from safetensors.torch import save_file
from unsloth.models import rl
from unsloth.models._utils import patch_gradient_accumulation_fix
from unsloth.trainer import _patch_trl_trainer

rl.PatchFastRL()
_patch_trl_trainer()
patch_gradient_accumulation_fix(transformers.Trainer)


def train(model_folder: str, data_file: str, out: Path, accumulation: int, **arguments):
    # Here, because a rank may have been forked after Unsloth was imported, and only it knows its place.
    from accelerate_unsloth import DistributedTrainerMixin, FastLanguageModel

    class Trainer(DistributedTrainerMixin, trl.SFTTrainer):
        pass

    experts = "router_aux_loss_coef" in arguments
    model, tokenizer = FastLanguageModel.from_pretrained(model_folder, max_seq_length=128, full_finetuning=experts)
    if not experts:
        model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    rows = datasets.Dataset.from_json(data_file, cache_dir=str(out / "json_cache"))
    trainer = Trainer(
        model,
        trl.SFTConfig(
            str(out / "run"),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=1,
            learning_rate=1e-3 if experts else 1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=3,
            optim="adamw_torch",
            padding_free=False,
            dataset_num_proc=1,
            gradient_checkpointing=False,
            **arguments,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def prefer(which: str, model_folder: str, data_file: str, out: Path, accumulation: int):
    """Train on preferences with our class over the one that Unsloth generated."""
    from tests.workers import preference

    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, "optim": "adamw_torch"}
    return preference.train(which, model_folder, data_file, out, {"args": options | {"warmup_ratio": 0.0}})


def main(
    model_folder: str, experts_folder: str, data_file: str, preferences: str, out: str, accumulation: str
) -> None:
    from tests.workers.train import count_mapped_rows

    out, rank = Path(out), int(os.environ.get("RANK", 0))
    mapped = count_mapped_rows()
    report = {}
    runs = {"dense": (model_folder, {}), "experts": (experts_folder, {"router_aux_loss_coef": 0.5})}
    for name, (folder, arguments) in runs.items():
        trainer = train(folder, data_file, out, int(accumulation), **arguments)
        report[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
        trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        save_file(trained, out / f"{name}{rank}.safetensors")
    report["mapped_rows"] = list(mapped)  # the worker maps rows for KTO by itself
    for which in ("dpo", "reward", "orpo", "cpo", "kto"):
        trainer = prefer(which, model_folder, preferences, out, int(accumulation))
        report[which] = {
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "bases": [base.__name__ for base in type(trainer).__mro__],
        }
        trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        save_file(trained, out / f"{which}{rank}.safetensors")
    report["trainer"] = trl.SFTTrainer.__name__
    report["get_batch_samples"] = transformers.Trainer.get_batch_samples.__name__
    (out / f"result{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:7])
