"""Do one thing wrong, as a user might: the case is named on the command line."""

import os
import sys
from pathlib import Path

from accelerate_unsloth import FastLanguageModel, SFTConfig, SFTTrainer

# isort: split
import datasets

CASE, MODEL, OUT = sys.argv[1], sys.argv[2], Path(sys.argv[3])
RANK = int(os.environ["RANK"])

loading = {
    "wrong model path": {"model_name": "/nowhere/model"},
    "4-bit on a CPU": {"load_in_4bit": True},
    "model over several devices": {"device_map": "auto"},
    "wrong path on one rank": {"model_name": "/nowhere/model"} if RANK == 1 else {},
}
model, tokenizer = FastLanguageModel.from_pretrained(
    **{"model_name": MODEL, "max_seq_length": 64} | loading.get(CASE, {})
)
model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)

rows = [{"prompt": "a rank ", "completion": "sends its gradient"}] * 8
if CASE == "empty dataset":
    rows = []
elif CASE == "missing column":
    rows = [{"question": "a rank", "answer": "sends"}] * 8
elif CASE == "all labels masked":
    rows = [{"input_ids": [3, 4, 5], "labels": [-100, -100, -100]}] * 8
elif CASE == "only first tokens":
    rows = [{"input_ids": [3], "labels": [3]}] * 8
elif CASE == "missing text":
    rows[3:5] = [{"prompt": "a rank ", "completion": None}] * 2
elif CASE == "rows of its own on each rank":
    rows = rows[: 8 - 4 * RANK]
elif CASE == "order of its own on each rank":
    rows = [{"prompt": "a rank ", "completion": f"sends {number} gradients"} for number in range(8)][:: 1 - 2 * RANK]
elif CASE == "broken sample":
    rows = [{"messages": [{"role": "user"}]}] * 8
data = datasets.Dataset.from_list(rows)

arguments = {
    "learning_rate": 2e-4 if CASE == "other settings on one rank" and RANK == 1 else 1e-4,
    "max_steps": 4,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
}
plugin = {"report": False} if CASE == "plugin of another type" else None
trainer = SFTTrainer(
    model, SFTConfig(str(OUT), **arguments), train_dataset=data, processing_class=tokenizer, plugin=plugin
)

if CASE == "error in a step of one rank" and RANK == 1:
    step = trainer.training_step

    def failing(*args, **kwargs):
        if trainer.state.global_step == 2:
            raise RuntimeError("the third step of rank 1 failed")
        return step(*args, **kwargs)

    trainer.training_step = failing
if CASE == "a rank that leaves before" and RANK == 1:
    sys.exit(0)
trainer.train()
if CASE == "folder not writable":
    trainer.save_model("/proc/no/such/folder")
