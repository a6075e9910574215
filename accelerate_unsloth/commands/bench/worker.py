"""
One rank of one measured fine-tune, with a clock at every phase. Started by `runs.py` as a script.

    worker.py plain|ours|trl MODEL DATA OUT '{"batch": 16, ...}'

Nothing of accelerate_unsloth is imported unless it is measured, so what is at the top is the standard library.
"""

import json
import os
import sys
import time
from pathlib import Path

PHASES = {"launched": float(os.environ["BENCH_LAUNCHED_S"]), "python": time.time()}


def stamp(phase: str) -> None:
    PHASES[phase] = time.time()


def load(how: str, model_folder: str, options: dict):
    """Model, tokenizer, config and trainer classes of one way to fine-tune."""
    if how == "trl":
        return load_trl(model_folder, options)
    if how == "plain":
        from unsloth import FastLanguageModel  # isort: skip
        from trl import SFTConfig, SFTTrainer
    else:
        from accelerate_unsloth import FastLanguageModel, SFTConfig, SFTTrainer
    stamp("imported")
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_folder, max_seq_length=options["max_length"], load_in_4bit=options["load_in_4bit"]
    )
    stamp("loaded")
    adapters = {"r": 16, "lora_alpha": 16, "random_state": 0} | options.get("lora", {})
    return FastLanguageModel.get_peft_model(model, **adapters), tokenizer, SFTConfig, SFTTrainer


def load_trl(model_folder: str, options: dict):
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    stamp("imported")
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
    return model, AutoTokenizer.from_pretrained(model_folder), SFTConfig, SFTTrainer


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
            self.tokens += sum(len(row["input_ids"]) for row in rows)
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
    report = {
        "phases": PHASES,
        "begins": clock.begins,
        "ends": clock.ends,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "attention": clock.attention,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "decisions": {
            name: [getattr(trainer, name).__dict__[key] for key in getattr(trainer, name).__dict__]
            for name in ("micro_batch", "checkpointing", "attention", "gradient_sync")
            if hasattr(trainer, name)
        },
    }
    (Path(out) / f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:5], json.loads(sys.argv[5]))
