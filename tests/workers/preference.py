"""
Train on preferences by plain TRL or by ours, one trainer after the other, and write down what is logged and the weights.

    preference.py MODEL DATA OUT '{"trainers": ["dpo"], "plain": true, "args": arguments, "plugin": {...}}'
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import accelerate_unsloth
from accelerate_unsloth import FastModel, UnslothPlugin

# isort: split
import datasets
import torch
import trl
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from accelerate_unsloth.trainers import log_probs  # plain TRL needs it on a CPU too
from tests.workers.provoke import Provoke, limit_memory
from tests.workers.train import ARGUMENTS, fetch_layers

log_probs.install()

CLASSES = {"dpo": "DPO", "reward": "Reward", "orpo": "ORPO", "cpo": "CPO", "kto": "KTO"}
# Larger than the rounding of a gradient, which Adam's first steps would otherwise raise to the learning rate.
COMMON = {"max_length": 96, "adam_epsilon": 1e-5}
FURTHER = {"kto": {"train_sampling_strategy": "sequential"}}


def load(which: str, folder: str):
    head = {"auto_model": AutoModelForSequenceClassification, "num_labels": 1} if which == "reward" else {}
    model, tokenizer = FastModel.from_pretrained(folder, max_seq_length=96, **head)
    return FastModel.get_peft_model(model, r=4, use_gradient_checkpointing=False), tokenizer


def unpaired(row: dict, index: int) -> dict:
    good = index % 3 > 0
    return {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}


def train(which: str, model_folder: str, data: str, out: Path, options: dict):
    home = accelerate_unsloth
    if options.get("plain"):
        home = import_module(f"trl.experimental.{which}") if which in ("orpo", "cpo") else trl
    trainer_class, config_class = (getattr(home, CLASSES[which] + kind) for kind in ("Trainer", "Config"))
    model, tokenizer = load(which, model_folder)
    rows = datasets.Dataset.from_json(data, cache_dir=str(out / "json_cache"))
    if which == "kto":
        rows = rows.map(unpaired, with_indices=True, remove_columns=rows.column_names)
    plugin = {} if options.get("plain") else {"plugin": UnslothPlugin(report=False, **options.get("plugin", {}))}
    trainer = trainer_class(
        model=model,
        args=config_class(str(out / "run"), **ARGUMENTS | COMMON | FURTHER.get(which, {}) | options.get("args", {})),
        train_dataset=rows.remove_columns(options.get("without", [])).rename_columns(options.get("renamed", {})),
        eval_dataset=rows.select(range(7)) if options.get("evaluate") else None,
        processing_class=tokenizer,
        **plugin,
    )
    if "memory_tokens" in options:
        limit_memory(model, options["memory_tokens"])
    if "provoke" in options:
        trainer.add_callback(Provoke(**options["provoke"]))
    trainer.before = trainer.evaluate() if options.get("evaluate") else {}
    resume = options.get("resume")
    trainer.train(resume_from_checkpoint=resume and resume.format(trainer=which))
    return trainer


def main(model: str, data: str, out: str, options: dict) -> None:
    if options.get("fetch"):
        fetch_layers()
    for which in options["trainers"]:
        folder = Path(out) / which
        folder.mkdir(exist_ok=True)
        trainer = train(which, model, data, folder, options)
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        save_file(weights, folder / f"weights{PartialState().process_index}.safetensors")
        decisions = [] if options.get("plain") else trainer.decisions()
        seen = {"log": trainer.state.log_history, "before": trainer.before, "decisions": decisions}
        (folder / f"result{PartialState().process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
