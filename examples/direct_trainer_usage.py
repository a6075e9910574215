"""
A custom training loop on all GPUs: the model, its loss and the DataLoader are plain PyTorch.

    python examples/direct_trainer_usage.py
    accelerate launch --config_file "$(accelerate-unsloth config path unsloth_ddp)" examples/direct_trainer_usage.py
    torchrun --nproc_per_node=2 examples/direct_trainer_usage.py

MODEL (hub id or folder) and OUT (folder of the adapter and a checkpoint) may follow. By default the demo's model is
trained, and made when it is missing. Without GPUs this is a dry run with transformers and PEFT; `accelerate launch`
then takes `unsloth_ddp_cpu`.
"""

from _arguments import read_arguments

model_name, output_dir = read_arguments(__doc__)

# isort: split
from accelerate_unsloth import AggregationMethod, FastLanguageModel, MultiGPUTrainer

# isort: split
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

model, tokenizer = FastLanguageModel.from_pretrained(model_name, max_seq_length=128, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)

texts = [f"{a} times {b} is {a * b}." for a in range(1, 9) for b in range(1, 5)]
rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in tokenizer(texts)["input_ids"]])
# Of the whole data set, on every rank: the trainer assigns its samples to ranks.
loader = DataLoader(rows, batch_size=2, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))

trainer = MultiGPUTrainer(
    model=model,
    aggregation_method=AggregationMethod.TOKEN_MEAN,
    optimizer_config={"class": torch.optim.AdamW, "kwargs": {"lr": 1e-3, "weight_decay": 0.01}},
    gradient_accumulation_steps=2,
    max_grad_norm=1.0,
    callbacks=[lambda logs, step: print(f"step {step}: loss {logs['loss']:.4f}")],
)
trainer.setup()
before = trainer.evaluate(loader)["eval_loss"]
stats = trainer.train_epoch(loader)
after = trainer.evaluate(loader)["eval_loss"]
if trainer.accelerator.is_main_process:
    print(
        f"evaluation loss {before:.4f} before and {after:.4f} after {stats.num_steps} steps, {stats.num_tokens} tokens in all"
    )
    print(f"{stats.tokens_per_second:.0f} tokens/s on {len(stats.ranks)} process(es)")
    print(f"token imbalance {stats.token_imbalance:.3f}")
trainer.save_checkpoint(output_dir / "checkpoint")
model.save_pretrained(output_dir)
if trainer.accelerator.is_main_process:
    print(f"The adapter and the checkpoint are in {output_dir}.")
