"""Fine-tunes of small models: each case returns losses, gradient norms, and where memory was held."""

import os
from contextlib import contextmanager

import accelerate_unsloth
from accelerate_unsloth import UnslothPlugin

# isort: split
import datasets
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from accelerate_unsloth.engines import kernels
from accelerate_unsloth.weights import placed_weights

STEPS = 20


def load(case, model="real", loader="FastLanguageModel", load=None, lora=None, compiles=True, frozen_weights="auto"):
    """The model with its adapters, unless all of it is trained, and its tokenizer."""
    os.environ["ACCELERATE_UNSLOTH_FROZEN_WEIGHTS"] = frozen_weights
    if not compiles:  # until the end of the case
        os.environ |= {"UNSLOTH_BLOCK_COMPILE": "0", "UNSLOTH_COMPILE_DISABLE": "1"}
    loader, load = getattr(accelerate_unsloth, loader), {"load_in_4bit": False, "max_seq_length": 512} | (load or {})
    load["load_in_4bit"] &= case.on_gpu  # which the reference engine rejects
    loaded, tokenizer = loader.from_pretrained(case.material(model), **load)
    del os.environ["ACCELERATE_UNSLOTH_FROZEN_WEIGHTS"]
    if not load.get("full_finetuning"):
        loaded = loader.get_peft_model(loaded, **{"r": 8, "random_state": 0} | (lora or {}))
    return loaded, tokenizer


def make_trainer(case, model, tokenizer, rows, args=None, plugin=None, callbacks=(), evaluated=None, method="SFT"):
    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,  # Unsloth's own default is 2
        "max_steps": STEPS,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataset_num_proc": 1,  # starting processes takes longer than these rows
        "seed": 3,
    }
    if not case.on_gpu:
        arguments |= {"use_cpu": True, "bf16": False}
    if method == "KTO":  # the only order that it takes
        arguments["train_sampling_strategy"] = "sequential"
    trainer_class, config_class = (getattr(accelerate_unsloth, method + kind) for kind in ("Trainer", "Config"))
    return trainer_class(
        model,
        args=config_class(str(case.out / "run"), **arguments | (args or {})),
        train_dataset=rows,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        plugin=UnslothPlugin(**plugin or {}),
        callbacks=list(callbacks),
    )


def rows_of(case, data="uneven"):
    return datasets.Dataset.from_json(case.material(f"{data}.jsonl"), cache_dir=str(case.out / "json_cache"))


def preferences_of(case, method):
    """
    Pairs whose rejected answer is another row's; for KTO one answer of each, the rejected one of every third.

    Answers begin with a space and prompts do not end with one, because ORPO needs the same tokens of a prompt before both.
    """
    rows = rows_of(case)
    prompts, chosen = [text.rstrip() for text in rows["prompt"]], [f" {text.strip()}" for text in rows["completion"]]
    rejected = chosen[-1:] + chosen[:-1]
    if method != "KTO":
        return datasets.Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})
    labels = [number % 3 > 0 for number in range(len(rows))]
    answers = [good if label else bad for good, bad, label in zip(chosen, rejected, labels, strict=True)]
    return datasets.Dataset.from_dict({"prompt": prompts, "completion": answers, "label": labels})


def describe(trainer) -> dict:
    """What training did, as tests compare it."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in steps],
        "gradient_norms": [entry["grad_norm"] for entry in steps],
        "margins": [entry.get("rewards/margins") for entry in steps],
        "aux_losses": [entry.get("aux_loss") for entry in steps],
        "checkpointing": trainer.plan.checkpointing.label,
        "checkpointing_reason": trainer.plan.checkpointing.reason,
        "micro_batch_reason": trainer.plan.micro_batch.reason,
        "frozen_weights": placed_weights(trainer.model).choice.mode,
    }


def fine_tune(
    case,
    args=None,
    plugin=None,
    evaluate=False,
    save=False,
    decode=False,
    measure=False,
    resume=None,
    fill_memory_of_rank=None,
    method="SFT",
    recompute_first=None,
    **how,
):
    """
    Train.

    Args:
        evaluate (`bool`): Whether to evaluate before and after, which is returned as `eval_losses`.
        save (`bool`): Whether to write the adapter, and the merged model, into the case's folder.
        decode (`bool`): Whether to generate text at the end, and to compare it with a forward of all of it.
        measure (`bool`): Whether rank 0 writes how each trainable weight changed, to `change.safetensors`.
        resume (`str`): A checkpoint, below the folder of all launches.
        fill_memory_of_rank (`int`): A rank that runs short of GPU memory in the middle.
        method (`str`): The trainer's name.
        recompute_first (`int`): Decoder layers that recompute their activations, as if nothing fitted with fewer.
        how: What [`load`] takes.
    """
    before_mib = allocated_mib(case)  # what earlier cases left
    model, tokenizer = load(case, **how)
    weights_mib = allocated_mib(case) - before_mib
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()} if measure else {}
    callbacks = [FillMemory()] if fill_memory_of_rank == case.rank else []
    rows = rows_of(case) if method == "SFT" else preferences_of(case, method)
    evaluated = rows.select(range(15)) if evaluate else None
    trainer = make_trainer(case, model, tokenizer, rows, args, plugin, callbacks, evaluated, method)
    if recompute_first:
        fitting = len(kernels.layers_that_recompute(model)) + 1 - recompute_first
        trainer._planner._tokens_that_fit = lambda: [1] * recompute_first + [10**6] * fitting
    eval_losses = [trainer.evaluate()["eval_loss"]] if evaluate else []
    trainer.train(resume_from_checkpoint=str(case.shared / resume) if resume else None)
    if evaluate:
        eval_losses.append(trainer.evaluate()["eval_loss"])
    if measure and case.rank == 0:
        change = {name: (trained[name].detach() - before[name]).float().cpu() for name in trained}
        save_file(change, case.out / "change.safetensors")
    if save:
        trainer.save_model(str(case.out / "adapter"))
        model.save_pretrained_merged(str(case.out / "merged"), tokenizer, save_method="merged_16bit")
    devices = sorted({str(p.device) for p in model.parameters()})
    held = processes_by_gpu() if case.on_gpu else []
    return describe(trainer) | {
        "eval_losses": eval_losses,
        "decoded_alike": decoded_alike(model) if decode else None,
        "devices": devices,
        "processes_by_gpu": held,
        "weights_mib": weights_mib,
    }


@torch.no_grad()
def decoded_alike(model, prompt_tokens: int = 32, new_tokens: int = 24) -> float:
    """Part of the tokens, generated one by one, that a forward of all of them would choose too."""
    with generated(model, prompt_tokens, new_tokens) as output:
        chosen = model(input_ids=output).logits[0, prompt_tokens - 1 : -1].argmax(-1)
    return (chosen == output[0, prompt_tokens:]).float().mean().item()


@contextmanager
def generated(model, prompt_tokens: int, new_tokens: int):
    """Continue a prompt, as `examples/train.py` does: all tokens, of shape `(1, tokens)`; the body runs in inference mode."""
    accelerate_unsloth.FastLanguageModel.for_inference(model)
    ids = 10 + torch.arange(prompt_tokens, device=model.device)[None] % 200
    yield model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    accelerate_unsloth.FastLanguageModel.for_training(model)


def allocated_mib(case) -> float:
    """What the tensors of this process take of its GPU, by PyTorch or not, since no other process changes what it holds now."""
    if not case.on_gpu:
        return 0.0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def processes_by_gpu() -> list[int]:
    """How many processes hold memory on each visible GPU, from NVML, whose process ids mean nothing inside a container."""
    import pynvml

    pynvml.nvmlInit()
    names = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]
    handles = [pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]
    return [len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) for handle in handles]


class FillMemory(TrainerCallback):
    """From the third step on, leave this rank less than half of the memory that the probe and its steps have needed."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and torch.cuda.is_available():
            need = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            self.filling = torch.empty(max(free - int(0.45 * need), 0), dtype=torch.uint8, device="cuda")

    def on_train_end(self, args, state, control, **kwargs):
        self.filling = None


def change_a_frozen_weight(case, **how):
    """Flip one bit of a frozen weight on rank 1, then flip it back: what the construction of a trainer says each time."""
    model, tokenizer = load(case, **how)
    name, weight = next((n, p) for n, p in model.named_parameters() if not p.requires_grad and "layers.0" in n)
    bits = weight.data.view(torch.uint8).view(-1)[:1]
    said = []
    for _ in ("changed", "as before"):
        if case.rank == 1:
            bits ^= 1
        try:
            make_trainer(case, model, tokenizer, rows_of(case))
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return {"changed": name, "said": said}
