"""
One rank of one measured fine-tune, with a clock at every phase. Started by `runs.py` as a script.

    worker.py plain|ours|trl MODEL DATA OUT '{"batch": 16, ...}'

Nothing of accelerate_unsloth is imported unless it is measured, so what is at the top is the standard library.
"""

import json
import os
import sys
import time
from dataclasses import astuple
from importlib import import_module
from pathlib import Path

PHASES = {"launched": float(os.environ.get("BENCH_LAUNCHED_S", "nan")), "python": time.time()}
EXPERIMENTAL = ("orpo",)  # in trl 1.15.0
# TRL demands it for its KL divergence; its order is then that of the data.
FURTHER = {"kto": {"train_sampling_strategy": "sequential"}}


def stamp(phase: str) -> None:
    PHASES[phase] = time.time()


def load(how: str, model_folder: str, options: dict):
    """
    Model, tokenizer, config and trainer classes of one way to fine-tune.

    Unsloth's notebooks also call `PatchDPOTrainer`, which does nothing any more (unsloth 2026.10.9, `models/dpo.py`).
    """
    if how == "trl":
        return load_trl(model_folder, options)
    if how == "plain":
        from unsloth import FastLanguageModel
    else:
        from accelerate_unsloth import FastLanguageModel
    classes = trainer_classes(how, options["trainer"])
    stamp("imported")
    limit_memory(options["gpu_gib"])
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_folder, max_seq_length=options["max_length"], load_in_4bit=options["load_in_4bit"]
    )
    stamp("loaded")
    adapters = {"r": 16, "lora_alpha": 16, "random_state": 0} | options.get("lora", {})
    return FastLanguageModel.get_peft_model(model, **adapters), tokenizer, *classes


def limit_memory(gpu_gib: float | None) -> None:
    """Let PyTorch use so much of this process's GPU."""
    if gpu_gib is None:
        return
    import torch

    torch.cuda.set_per_process_memory_fraction(gpu_gib * 2**30 / torch.cuda.mem_get_info()[1])


def trainer_classes(how: str, trainer: str) -> tuple[type, type]:
    """Ours or TRL's config and trainer, which Unsloth has replaced by its own if it was imported."""
    home = f"trl.experimental.{trainer}" if trainer in EXPERIMENTAL else "trl"
    module = import_module("accelerate_unsloth" if how == "ours" else home)
    return tuple(getattr(module, trainer.upper() + kind) for kind in ("Config", "Trainer"))


def tokens_of(row: dict, trainer: str, max_length: int) -> int:
    """
    Count the tokens of a prepared sample that are trained on or attended to, without padding.

    A pair is two rows. The rows of DPO and KTO are truncated by their collators, so that is counted here. What the reference
    and KTO's KL divergence run is not counted.
    """
    if trainer == "sft":
        return len(row["input_ids"])
    if trainer == "orpo":
        return len(row["chosen_input_ids"]) + len(row["rejected_input_ids"])
    answers = ("completion_ids",) if trainer == "kto" else ("chosen_ids", "rejected_ids")
    return sum(min(max_length, len(row["prompt_ids"]) + len(row[name])) for name in answers)


def load_trl(model_folder: str, options: dict):
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    classes = trainer_classes("trl", options["trainer"])
    stamp("imported")
    limit_memory(options["gpu_gib"])
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    quantized = {}
    if options["load_in_4bit"]:
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bfloat16",
        )
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype, device_map={"": device}, **quantized)
    stamp("loaded")
    if options["load_in_4bit"]:
        model = prepare_model_for_kbit_training(model)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    return model, AutoTokenizer.from_pretrained(model_folder), *classes


def attention_of(model) -> str:
    """Which library runs rows of uneven length: as Unsloth's dispatch decides (unsloth 2026.10.6), or transformers."""
    dispatch = sys.modules.get("unsloth.utils.attention_dispatch")
    if dispatch is None:
        return str(getattr(model.config, "_attn_implementation", "unknown"))
    if getattr(dispatch, "HAS_FLASH_ATTENTION", False):
        return "flash-attn"
    if getattr(dispatch, "HAS_XFORMERS", False):
        return "xformers"
    return "varlen" if getattr(dispatch, "_TORCH_VARLEN_ATTN", None) is not None else "sdpa, row by row"


def main(how: str, model_folder: str, data_file: str, out: str, options: dict) -> None:
    model, tokenizer, config, trainer_class = load(how, model_folder, options)
    stamp("adapters")
    import datasets
    import torch
    from transformers import TrainerCallback

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()

    class Clock(TrainerCallback):
        """When each step ended, and how many tokens this rank had collated by then."""

        def __init__(self):
            self.ends, self.begins, self.attention = [], [], None

        def on_step_begin(self, args, state, control, **kwargs):
            self.begins.append(time.time())
            self.attention = self.attention or attention_of(model)  # while training, where ours is in force

        def on_step_end(self, args, state, control, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            self.ends.append((time.time(), counter.tokens))
            if len(self.ends) == 1:
                stamp("first step")

    class Counter:
        """The trainer's collator, counting what it collates, padding left out."""

        def __init__(self, collate):
            self.collate, self.tokens = collate, 0

        def __call__(self, rows):
            self.tokens += sum(tokens_of(row, options["trainer"], options["max_length"]) for row in rows)
            return self.collate(rows)

        def __getattr__(self, name):
            return getattr(self.collate, name)

    accumulation = options["effective_batch"] // (options["batch"] * world_size)
    arguments = config(
        str(Path(out) / "run"),
        per_device_train_batch_size=options["batch"],
        gradient_accumulation_steps=accumulation,
        max_steps=options["steps"],
        max_length=options["max_length"],
        learning_rate=1e-4,
        optim=options["optim"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=cuda,
        use_cpu=not cuda,
        seed=3,
        ddp_find_unused_parameters=False,
        dataset_num_proc=4 if cuda else 1,
        **FURTHER.get(options["trainer"], {}),
        **options.get("args", {}),
    )
    rows = datasets.Dataset.from_json(data_file, cache_dir=str(Path(out) / "json"))
    trainer = trainer_class(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    counter, clock = Counter(trainer.data_collator), Clock()
    trainer.data_collator = counter
    trainer.add_callback(clock)
    stamp("trainer")
    trainer.train()
    stamp("trained")
    trainer.save_model(str(Path(out) / "adapter"))
    stamp("saved")
    plan, chosen = getattr(trainer, "plan", None), {}  # of ours alone
    if plan is not None:
        chosen = {"micro_batch": plan.micro_batch, "checkpointing": plan.checkpointing, "attention": trainer.attention}
    report = {
        "phases": PHASES,
        "begins": clock.begins,
        "ends": clock.ends,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "attention": clock.attention,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "decisions": {name: astuple(choice) for name, choice in chosen.items()},
    }
    (Path(out) / f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:5], json.loads(sys.argv[5]))
