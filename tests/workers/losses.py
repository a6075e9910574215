"""
Train one model after another with another loss each, by plain TRL or by ours, and write down losses and weights.

    losses.py MODELS DATA OUT '{"plain": true, "kinds": [...], "args": SFTConfig arguments, "plugin": {...}}'

MODELS holds the folders `dense` and `experts`. A kind that is rejected leaves its error instead.
"""

import json
import sys
from pathlib import Path

from accelerate_unsloth import FastLanguageModel, SFTConfig, SFTTrainer, UnslothPlugin

# isort: split
import datasets
import torch
import torch.nn.functional as F
import trl
from accelerate import PartialState
from safetensors.torch import save_file

from accelerate_unsloth import DistributedTrainerMixin
from tests.workers.provoke import limit_memory
from tests.workers.train import ARGUMENTS


def token_losses(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def mean_func(outputs, labels, num_items_in_batch=None):
    return token_losses(outputs.logits, labels) / labels[:, 1:].ne(-100).sum()


def dividing_func(outputs, labels, num_items_in_batch=None):
    return token_losses(outputs.logits, labels) / num_items_in_batch


class Mean:
    """As most overrides are: without `super()`, and without the count."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Scaled:
    def compute_loss(self, *args, **kwargs):
        self._metrics["train"]["doubled"].append(2.0)  # a metric of the user's own, as TRL notes its own
        return 2 * super().compute_loss(*args, **kwargs)


class Mixed:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        value = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return value + sum(p.square().sum() for p in model.parameters() if p.requires_grad)


# kind: (override, arguments of SFTConfig, arguments of the trainer)
KINDS = {
    "nll": (None, {}, {}),
    "smoothed": (None, {"label_smoothing_factor": 0.1}, {}),
    "dft": (None, {"loss_type": "dft"}, {}),
    "mean": (Mean, {}, {}),
    "scaled": (Scaled, {}, {}),
    "mixed": (Mixed, {}, {}),
    "mean function": (None, {}, {"compute_loss_func": mean_func}),
    "dividing function": (None, {}, {"compute_loss_func": dividing_func}),
    "experts": (None, {"router_aux_loss_coef": 0.5}, {}),
    "experts, scaled": (Scaled, {"router_aux_loss_coef": 0.5}, {}),
    "experts, not balanced": (None, {"router_aux_loss_coef": 0.0}, {}),
}


def train(kind: str, models: str, data: str, out: Path, options: dict) -> dict:
    override, arguments, further = KINDS[kind]
    experts = kind.startswith("experts")
    folder = Path(models) / ("experts" if experts else "dense")
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, full_finetuning=experts)
    if not experts:
        model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    rows = datasets.Dataset.from_json(data, cache_dir=str(out / "json_cache"))
    settings = ARGUMENTS | {"max_length": 128, "learning_rate": 1e-2 if not experts else 1e-3}
    if options.get("evaluate"):
        settings |= {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "eval_mean_token_accuracy"}
    bases = (trl.SFTTrainer,) if options.get("plain") else (SFTTrainer,)
    if options.get("mixin over trl"):
        bases = (DistributedTrainerMixin, trl.SFTTrainer)
    if override is not None:
        bases = (override, *bases)
    plugin = {} if options.get("plain") else {"plugin": UnslothPlugin(report=False, **options.get("plugin", {}))}
    trainer = type("Trainer", bases, {})(
        model=model,
        args=SFTConfig(str(out / "run"), **settings | options.get("args", {}) | arguments),
        train_dataset=rows,
        eval_dataset=rows.select(range(7)) if options.get("evaluate") else None,
        processing_class=tokenizer,
        **plugin,
        **further,
    )
    if "memory_tokens" in options:
        limit_memory(model, options["memory_tokens"])
    trainer.train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    save_file(weights, out / f"{kind}-{PartialState().process_index}.safetensors")
    decisions = {row[0]: row[2] for row in trainer.decisions()} if hasattr(trainer, "decisions") else {}
    return {"log": trainer.state.log_history, "loss": decisions.get("loss")}


def main(models: str, data: str, out: str, options: dict) -> None:
    out = Path(out)
    seen = {kind: train_or_explain(kind, models, data, out, options) for kind in options["kinds"]}
    (out / f"result{PartialState().process_index}.json").write_text(json.dumps(seen))


def train_or_explain(kind, *arguments) -> dict:
    try:
        return train(kind, *arguments)
    except ValueError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
