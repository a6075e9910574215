"""
Fine-tune with Unsloth on this launch's GPUs and write down losses, memory and placement.

    gpu_train.py MODEL DATA OUT '{"load": ..., "lora": ..., "args": ..., "loader": ..., "lifecycle": true}'
"""

import json
import os
import sys
from pathlib import Path

import accelerate_unsloth
from accelerate_unsloth import SFTConfig, SFTTrainer

# isort: split
import datasets
import pynvml
import torch
from transformers import TrainerCallback


def processes_by_gpu() -> list[int]:
    """How many processes hold memory on each GPU, from NVML, whose process ids mean nothing inside a container."""
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return [len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) for handle in handles]


class FillMemory(TrainerCallback):
    """From the third step on, leave this rank a little more memory than half of what its step has needed."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            need = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            self.filling = torch.empty(max(free - int(0.6 * need), 0), dtype=torch.uint8, device="cuda")


def main(model_folder: str, data_file: str, out: str, options: dict) -> None:
    out, rank = Path(out), int(os.environ.get("RANK", 0))
    loading = {"load_in_4bit": False} | options.get("load", {})
    loader = getattr(accelerate_unsloth, options.get("loader", "FastLanguageModel"))
    model, tokenizer = loader.from_pretrained(model_folder, max_seq_length=512, **loading)
    if not loading.get("full_finetuning"):
        model = loader.get_peft_model(model, **{"r": 8, "random_state": 0} | options.get("lora", {}))
    rows = datasets.Dataset.from_json(data_file, cache_dir=str(out / "json_cache"))
    arguments = {
        "per_device_train_batch_size": 2,
        "max_steps": 20,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    trainer = SFTTrainer(
        model,
        SFTConfig(str(out / "run"), **arguments | options.get("args", {})),
        train_dataset=rows,
        eval_dataset=rows.select(range(15)),
        processing_class=tokenizer,
    )
    if options.get("fill_memory_of_rank") == rank:
        trainer.add_callback(FillMemory())
    before = trainer.evaluate()["eval_loss"] if options.get("evaluate") else None
    trainer.train(resume_from_checkpoint=options.get("resume"))
    report = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "gradient_sync": trainer.gradient_sync.mode,
        "devices": sorted({str(p.device) for p in model.parameters()}),
        "processes_by_gpu": processes_by_gpu(),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    if options.get("evaluate"):
        report["eval_losses"] = [before, trainer.evaluate()["eval_loss"]]
    if options.get("lifecycle"):
        report["eval_loss"] = trainer.evaluate()["eval_loss"]
        trainer.save_model(str(out / "adapter"))
        model.save_pretrained_merged(str(out / "merged"), tokenizer, save_method="merged_16bit")
    (out / f"result{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
