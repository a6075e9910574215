"""
Supervised fine-tuning with LoRA on one process or many.

    accelerate launch --config_file "$(accelerate-unsloth config path unsloth_ddp)" examples/train.py \
        --model_name_or_path unsloth/Llama-3.2-1B-Instruct --load_in_4bit \
        --dataset_name data.jsonl --eval_samples 64 --output_dir out

`--config file.yaml` reads the same options from a file; the command line wins. All options of `SFTConfig` are there.
"""

import os
import time
from dataclasses import dataclass, field

from accelerate_unsloth import FastLanguageModel, SFTConfig, SFTTrainer

# isort: split
import datasets
import torch
from trl import TrlParser

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass
class ScriptArguments:
    """What is trained, and on what."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the model."})
    dataset_name: str = field(
        metadata={"help": "Hub id, folder, or JSONL/JSON/Parquet file, in text, prompt/completion or messages form."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    eval_samples: int = field(default=0, metadata={"help": "Without a test split: samples to hold back for it."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the frozen weights to 4 bits (GPU only)."})
    full_finetuning: bool = field(default=False, metadata={"help": "Train all weights instead of LoRA adapters."})
    use_gradient_checkpointing: bool = field(default=True, metadata={"help": "Recompute activations to save memory."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapters, times lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapters."})
    resume: str | None = field(default=None, metadata={"help": "Checkpoint to go on from."})
    merge: bool = field(default=False, metadata={"help": "Also write the model with merged adapters."})
    sample_prompt: str | None = field(default=None, metadata={"help": "Answer this before and after training."})


def load_data(script: ScriptArguments):
    """Training data, and evaluation data if asked for."""
    name, extension = script.dataset_name, os.path.splitext(script.dataset_name)[1]
    if extension in FILE_FORMATS:
        data = datasets.load_dataset(FILE_FORMATS[extension], data_files=name)
    else:
        data = datasets.load_dataset(name, script.dataset_config)
    train = data[script.dataset_train_split]
    if script.dataset_test_split:
        return train, data[script.dataset_test_split]
    if script.eval_samples:
        split = train.train_test_split(test_size=script.eval_samples, seed=0)
        return split["train"], split["test"]
    return train, None


def load_model(script: ScriptArguments, max_seq_length: int):
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=script.model_name_or_path,
        max_seq_length=max_seq_length,
        load_in_4bit=script.load_in_4bit,
        full_finetuning=script.full_finetuning,
    )
    if not script.full_finetuning:
        model = FastLanguageModel.get_peft_model(
            model,
            r=script.lora_r,
            lora_alpha=script.lora_alpha,
            lora_dropout=script.lora_dropout,
            use_gradient_checkpointing="unsloth" if script.use_gradient_checkpointing else False,
        )
    return model, tokenizer


@torch.no_grad()
def answer(model, tokenizer, prompt: str) -> str:
    """The model's most likely answer to one prompt."""
    FastLanguageModel.for_inference(model)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    FastLanguageModel.for_training(model)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()


def main(script: ScriptArguments, training: SFTConfig) -> None:
    train_dataset, eval_dataset = load_data(script)
    model, tokenizer = load_model(script, training.max_length)
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    answers = script.sample_prompt is not None and trainer.is_world_process_zero()
    before = trainer.evaluate()["eval_loss"] if eval_dataset is not None else None
    answer_before = answer(model, tokenizer, script.sample_prompt) if answers else None

    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=script.resume)
    seconds = time.perf_counter() - start

    after = trainer.evaluate()["eval_loss"] if eval_dataset is not None else None
    trainer.save_model()
    if script.merge:
        model.save_pretrained_merged(os.path.join(training.output_dir, "merged"), tokenizer)
    if not trainer.is_world_process_zero():
        return
    logged = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    if before is not None:
        print(f"\nevaluation loss: {before:.4f} before, {after:.4f} after")
    if answers:
        print(f"prompt: {script.sample_prompt}")
        print(f"answer before: {answer_before}")
        print(f"answer after: {answer(model, tokenizer, script.sample_prompt)}")
    if logged and script.resume is None:  # a resumed run counts from its beginning, and its seconds from here
        print(f"tokens/s: {logged[-1] / seconds:,.0f} on {trainer.accelerator.num_processes} process(es)")
    print(f"adapter: {os.path.abspath(training.output_dir)}")
    report = os.path.join(os.path.abspath(training.output_dir), "training_report.html")
    if os.path.exists(report):
        print(f"report: {report}")


if __name__ == "__main__":
    # Instead of the usage of all 150 options, in which an error would be lost.
    usage = "%(prog)s --model_name_or_path MODEL --dataset_name DATASET [--output_dir OUT] [--config FILE] [options]"
    main(*TrlParser((ScriptArguments, SFTConfig), usage=usage).parse_args_and_config())
