"""
An Unsloth script that stays as it is, on all GPUs: only the import and call of `accelerate_unsloth` are new.

    python examples/quick_start.py
    accelerate launch --config_file "$(accelerate-unsloth config path unsloth_ddp)" examples/quick_start.py
    torchrun --nproc_per_node=2 examples/quick_start.py

MODEL (hub id or folder) and OUT (folder of the adapter) may follow. By default the demo's model is trained, and made
when it is missing. Without GPUs this is a dry run with transformers and PEFT; `accelerate launch` then takes
`unsloth_ddp_cpu`.
"""

from _arguments import read_arguments

model_name, output_dir = read_arguments(__doc__)

# isort: split
import accelerate_unsloth

accelerate_unsloth.enable_multi_gpu()  # before unsloth and trl are imported

# isort: split
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(model_name, max_seq_length=128, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
questions = [(a, b) for a in range(1, 9) for b in range(1, 5)]
dataset = Dataset.from_list(
    [{"prompt": f"What is {a} times {b}? ", "completion": f"{a} times {b} is {a * b}."} for a, b in questions]
)
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=dataset,
    args=SFTConfig(
        output_dir,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-3,
        bf16=torch.cuda.is_available(),  # most CPUs emulate bfloat16, which takes several times as long
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
)
trainer.train()
trainer.save_model()
if trainer.is_world_process_zero():
    print(f"The adapter is in {output_dir}.")
