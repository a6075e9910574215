"""What only GPUs can show: Unsloth's kernels under two processes, NCCL, and who holds memory where."""

import json
import os

import pytest
import torch

from ..launching import WORKERS, launch, result

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu, pytest.mark.launch]

# 20 steps in bfloat16: losses agree to its rounding, about three significant digits.
BF16_ROUNDING = 1e-2


@pytest.fixture
def run(real_model, tmp_path, uneven_gpu_data):
    def start(name, processes, accumulation=1, model=real_model, **options):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        options["args"] = {"gradient_accumulation_steps": accumulation} | options.get("args", {})
        finished = launch(
            WORKERS / "gpu_train.py",
            [model, uneven_gpu_data, folder, json.dumps(options)],
            processes,
            environment={
                "CUDA_VISIBLE_DEVICES": os.environ.get("GPUS", "0,1") if processes > 1 else "0",
                "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled"),
                "HF_HOME": str(folder / "cache"),
            },
            timeout_s=400,
            config="unsloth_ddp",
        )
        assert finished.status == 0, finished.output[-6000:]
        (folder / "output.txt").write_text(finished.output)
        return folder

    return start


@pytest.fixture(scope="session")
def uneven_gpu_data(tmp_path_factory):
    from .. import tiny

    return tiny.make_data(tmp_path_factory.mktemp("data") / "uneven.jsonl", samples=90)


@pytest.fixture(scope="session")
def mixture_of_experts(real_model, tmp_path_factory):
    """A small Qwen3-MoE with random weights and the real model's tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("moe")
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_model)
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def vision_language_model(real_model, tmp_path_factory):
    """A small Qwen2.5-VL with random weights, its vision tower included, and the real model's tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("vision")
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_model)
    vision_words = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": vision_words})
    start, end, image, video = tokenizer.convert_tokens_to_ids(vision_words)
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 256,
            "fullatt_block_indexes": [1],
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    transformers.Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["16-bit", "4-bit"])
def test_two_gpus_give_the_loss_curve_of_one(load_in_4bit, run):
    load = {"load_in_4bit": load_in_4bit}
    one, two = run("one", 1, accumulation=2, load=load), run("two", 2, accumulation=1, load=load)
    assert result(two)["losses"] == pytest.approx(result(one)["losses"], rel=BF16_ROUNDING)


def test_each_process_holds_memory_on_its_own_gpu_only(run):
    folder = run("memory", 2)
    for rank in (0, 1):
        assert result(folder, rank)["processes_by_gpu"][:2] == [1, 1]  # on GPUs that nobody else uses
        assert result(folder, rank)["devices"] == [f"cuda:{rank}"]


@pytest.mark.parametrize(
    "options",
    [
        {"lora": {"modules_to_save": ["lm_head"]}},
        {"lora": {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}},
        {"load": {"full_finetuning": True}},
    ],
    ids=["modules_to_save", "embedding LoRA", "full fine-tuning"],
)
def test_cases_that_break_under_plain_ddp_train(options, run):
    before, after = result(run("case", 2, evaluate=True, **options))["eval_losses"]
    assert after < before


def test_a_rank_short_of_memory_cuts_its_micro_batches_with_the_same_losses(run):
    args = {"per_device_train_batch_size": 8, "max_steps": 8}
    free = run("free", 2, args=args)
    pressed = run("pressed", 2, args=args, fill_memory_of_rank=1)
    assert "cut in two" in (pressed / "output.txt").read_text()
    assert result(pressed)["losses"] == pytest.approx(result(free)["losses"], rel=BF16_ROUNDING)


def test_a_mixture_of_experts_trains_though_experts_are_skipped(run, mixture_of_experts):
    losses = result(run("moe", 2, model=mixture_of_experts))["losses"]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_text_alone_trains_a_model_with_a_vision_tower(run, vision_language_model):
    options = {"model": vision_language_model, "loader": "FastModel", "lora": {"finetune_vision_layers": True}}
    losses = result(run("vision", 2, **options))["losses"]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_whole_life(run, real_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = {"save_strategy": "steps", "save_steps": 10}
    folder = run("life", 2, args=args, lifecycle=True)
    resumed = run("resumed", 2, args=args, resume=str(folder / "run" / "checkpoint-10"))
    assert result(resumed)["losses"] == pytest.approx(result(folder)["losses"], rel=BF16_ROUNDING)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    ids = tokenizer("a rank sends", return_tensors="pt").input_ids
    assert merged.generate(ids, max_new_tokens=4).shape[1] > ids.shape[1]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(real_model), folder / "adapter")
