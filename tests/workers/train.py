"""
Fine-tune the tiny model and write down what happened: losses, weights, and what each rank saw.

Options are JSON on the command line: `{"args": SFTConfig arguments, "lora": ..., "plugin": ..., "then": [...]}`.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from accelerate_unsloth import (
    FastLanguageModel,
    SFTConfig,
    SFTTrainer,
    UnslothPlugin,
    UnslothTrainer,
    UnslothTrainingArguments,
)

# isort: split
import datasets
import peft
import torch
import transformers
from accelerate import PartialState
from safetensors.torch import save_file

from accelerate_unsloth.engines import kernels
from accelerate_unsloth.launch.channel import channel
from accelerate_unsloth.policies import activation_checkpointing
from accelerate_unsloth.weights import loading, placed_weights, placement
from tests.stores import WatchedStore
from tests.workers.provoke import Provoke

ARGUMENTS = {
    "per_device_train_batch_size": 1,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "seed": 3,
}


def main(model_folder: str, data_file: str, out: str, options: dict) -> None:
    out = Path(out)
    saves = count_saves()
    if options.get("fetch"):
        fetch_layers()
    model, tokenizer = FastLanguageModel.from_pretrained(model_folder, max_seq_length=128, **options.get("load", {}))
    if not options.get("load", {}).get("full_finetuning"):
        model = FastLanguageModel.get_peft_model(
            model, **{"r": 4, "use_gradient_checkpointing": False} | options.get("lora", {})
        )
    cache = Path(os.environ.get("HF_HOME", out)) / "json_cache"  # of this machine, where it has one of its own
    rows = datasets.Dataset.from_json(data_file, cache_dir=str(cache))
    evaluation = rows.select(range(7)) if options.get("evaluate") else None
    rows = rows.to_iterable_dataset() if options.get("stream") else rows
    rows = datasets.Dataset.from_list(rows.to_list()) if options.get("in_memory") else rows
    maps = count_mapped_rows()
    kinds = SFTTrainer, SFTConfig
    if "embedding_learning_rate" in options.get("args", {}):
        kinds = UnslothTrainer, UnslothTrainingArguments
    trainer = kinds[0](
        model,
        kinds[1](str(out / "run"), **ARGUMENTS | options.get("args", {})),
        train_dataset=rows,
        eval_dataset=evaluation,
        tokenizer=tokenizer,  # the old spelling, which Unsloth scripts use
        # Drawing takes two seconds, which the tests of the report alone ask for.
        plugin=UnslothPlugin(**{"report": False} | options.get("plugin", {})),
    )
    sabotage(options.get("sabotage"))
    if "memory_tokens" in options:
        limit_memory(model, options["memory_tokens"], options.get("kept_tokens", options["memory_tokens"]))
    if "provoke" in options:
        trainer.add_callback(Provoke(**options["provoke"]))
    requests = NoteStoreRequests()
    if options.get("note_store_requests"):
        trainer.add_callback(requests)
    before = trainer.evaluate() if evaluation is not None else {}
    trainer.train(resume_from_checkpoint=options.get("resume"))
    if options.get("save"):
        trainer.save_model(str(out / "adapter"))
        model.save_pretrained_merged(str(out / "merged"), tokenizer)
    rank = PartialState().process_index
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    seen = {
        "losses": [entry["loss"] for entry in history],
        "learning_rates": [entry["learning_rate"] for entry in history],
        "grad_norms": [entry["grad_norm"] for entry in history],
        "num_tokens": [entry.get("num_tokens") for entry in history],
        "micro_batch_tokens": trainer.plan.micro_batch.token_budget,
        "samples_dealt": "balanced" if trainer.balances_tokens else "planned",
        "mapped_rows": maps,
        "data_files": [file["filename"] for file in getattr(trainer.train_dataset, "cache_files", [])],
        "saves": saves,
        "store_requests": requests.noted,
        "skipped_samples": trainer.skipped_samples,
        "eval_losses": [before.get("eval_loss")]
        + [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e],
        "wrapper": type(trainer.model_wrapped).__name__,
        "log_history": trainer.state.log_history,
        "decisions": trainer.decisions(),
        "shared": shared_memory_used(placed_weights(model)),
    }
    (out / f"result{rank}.json").write_text(json.dumps(seen))
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    save_file(weights, out / f"weights{rank}.safetensors")


def shared_memory_used(placed) -> list[bool]:
    """Whether each shared weight that is there all the time is in the shared memory itself: of `sharded` those of this rank."""
    stays = placed.shared
    if placed.fetcher is not None:
        away = {id(t.parameter) for layer in placed.fetcher.layers if not layer.stays for t in layer.tensors}
        stays = [tensor for tensor in placed.shared if id(tensor.parameter) not in away]
        assert placed.choice.mode == "host" or all(tensor.is_own for tensor in stays)
    return [tensor.parameter.data_ptr() == tensor.stored.data_ptr() for tensor in stays]


def fetch_layers() -> None:
    """Copy layers that are shared before they run, as on a GPU, and let `sharded` be possible."""
    loading.computes_with_shared_copy = lambda device: False
    loading.why_no_copies = placement._why_not_sharded = lambda *_: ""


def count_saves() -> list[str]:
    """Folders that models of this process are written to."""
    written = []
    for kind in (peft.PeftModel, transformers.PreTrainedModel):

        def counting(self, folder, *args, _save=kind.save_pretrained, **kwargs):
            written.append(Path(folder).name)
            return _save(self, folder, *args, **kwargs)

        kind.save_pretrained = counting
    return written


def sabotage(how: str | None) -> None:
    """Break the reduction in a known way, for tests that show that the comparison would notice."""
    from accelerate_unsloth import reduction

    if how == "no all-reduce":
        reduction.dist = SimpleNamespace(
            **vars(reduction.dist) | {"all_reduce": lambda *args, **options: SimpleNamespace(wait=lambda: None)}
        )
    elif how == "mean of rank means":
        reduce = reduction.ChunkedReducer.reduce
        reduction.ChunkedReducer.reduce = lambda self, loss, items, tokens, **options: reduce(
            self, loss, torch.ones_like(items), tokens, **options
        )


class NoteStoreRequests(transformers.TrainerCallback):
    """What the steps ask the store of the channel for, from one log to the next."""

    def __init__(self):
        self.noted = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._channel = channel()
        self._channel._store = WatchedStore(self._channel._store)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.noted.append(list(self._channel._store.requests))
            self._channel._store.requests.clear()


def limit_memory(model, tokens: int, kept_tokens: int) -> None:
    """
    As on a GPU whose memory holds micro-batches of so many tokens, padding included, and fewer if activations are kept.
    Where that makes a difference, they are kept by our choice.
    """
    if kept_tokens != tokens:
        activation_checkpointing.resolve = lambda *args, **kwargs: activation_checkpointing.CheckpointingChoice(
            "none", "simulated", True
        )

    def check(module, args, kwargs):
        most = tokens if kernels.recomputes(module) else kept_tokens
        if module.training and kwargs["input_ids"].numel() > most:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Simulated above {most} tokens")

    model.register_forward_pre_hook(check, with_kwargs=True)


def count_mapped_rows() -> list[int]:
    """Rows that this process really maps; what comes out of a cache is not counted."""
    counted = []
    original = datasets.Dataset._map_single

    def counting(shard, *args, **kwargs):
        counted.append(len(shard))
        yield from original(shard, *args, **kwargs)

    datasets.Dataset._map_single = staticmethod(counting)
    return counted


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
