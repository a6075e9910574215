"""
Options from what the machine has: read the GPUs, work the options out, change one by hand, keep them in a file.

    python examples/advanced_config.py
    accelerate launch --config_file "$(accelerate-unsloth config path unsloth_ddp)" examples/advanced_config.py
    torchrun --nproc_per_node=2 examples/advanced_config.py

MODEL (hub id or folder) and OUT (folder of the adapter and the options) may follow. By default the demo's model is
trained, and made when it is missing. Without GPUs this is a dry run with transformers and PEFT; `accelerate launch`
then takes `unsloth_ddp_cpu`.
"""

from _arguments import read_arguments

model_name, output_dir = read_arguments(__doc__)

# isort: split
from dataclasses import replace

from accelerate_unsloth import ConfigManager, DeviceManager, enable_multi_gpu, get_multi_gpu_status

devices = DeviceManager()
manager = ConfigManager(devices)
processes = get_multi_gpu_status()["world_size"]  # of this launch; 1 without a launcher
if devices.get_available_devices():
    config = manager.get_optimal_config(
        model_name, num_gpus=processes, max_seq_length=128, load_in_4bit=False, r=8, optim="adamw_torch"
    )
else:
    config = manager.templates()["cpu_dry_run"]
    config["num_gpus"], config.assumptions["processes"] = processes, f"{processes} on the CPU"
config["plugin"] = replace(config["plugin"], watchdog_timeout_s=600)  # any option of UnslothPlugin
enable_multi_gpu(**config)

if get_multi_gpu_status()["rank"] == 0:
    print(config.explain())
    output_dir.mkdir(parents=True, exist_ok=True)
    manager.save(config, output_dir / "multi_gpu.yaml")  # for enable_multi_gpu(**ConfigManager().load(...))

# isort: split
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(model_name, max_seq_length=128, load_in_4bit=False)
trainer = SFTTrainer(
    model=FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16),
    processing_class=tokenizer,
    train_dataset=Dataset.from_list([{"text": f"{a} times 7 is {7 * a}."} for a in range(1, 33)]),
    args=SFTConfig(
        output_dir,
        max_steps=4,
        optim="adamw_torch",
        bf16=torch.cuda.is_available(),  # most CPUs emulate bfloat16, which takes several times as long
        save_strategy="no",
        report_to="none",
    ),
)
trainer.train()
trainer.save_model()
if trainer.is_world_process_zero():
    print(f"The adapter is in {output_dir}.")
