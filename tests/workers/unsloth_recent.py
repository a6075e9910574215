import accelerate_unsloth

accelerate_unsloth.enable_multi_gpu()
from unsloth import FastLanguageModel
from trl import SFTTrainer, SFTConfig
from datasets import load_dataset
import sys

model_folder, data_file, out = sys.argv[1:4]

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=model_folder,
    max_seq_length=128,
    load_in_4bit=False,
    full_finetuning=False,
)

model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    max_seq_length=128,
)

prompt_style = """### Instruction:
{}

### Response:
{}"""


def to_text(example):
    return {"summary": prompt_style.format(example["prompt"], example["completion"]) + tokenizer.eos_token}


dataset = load_dataset("json", data_files=data_file, split="train")
dataset = dataset.map(to_text, remove_columns=dataset.column_names)

trainer = SFTTrainer(
    model=model,
    train_dataset=dataset,
    processing_class=tokenizer,
    args=SFTConfig(
        dataset_text_field="summary",
        max_length=128,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        warmup_steps=2,
        max_steps=6,
        learning_rate=2e-3,
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir=out,
        report_to="none",
    ),
)
trainer.train()

model.save_pretrained(out + "/lora_model")
tokenizer.save_pretrained(out + "/lora_model")
