"""
Models and data of the cases, made by plain transformers on the CPU in a process beside the tests.

    python -m tests.gpu.materials FOLDER NAME...

Each name is printed when it is made. `real` is a link to the folder in MODEL or to what `make demo` makes, SmolLM2-135M-Instruct;
without either it is a Llama of the same size with random weights.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from ..launching import ROOT, clean_environment

# In the order in which they are made: later ones may read earlier ones, and the largest comes last.
NAMES = ("real", "uneven", "moe", "vision", "long", "1b")


class Materials:
    """Those of one test session, which are made while launches run that need no others."""

    def __init__(self, folder: Path, names: set[str]):
        folder.mkdir(parents=True)
        self._log, self._made = folder / "log.txt", set()
        ordered = [name for name in NAMES if name in names | {"real"}]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.gpu.materials", str(folder), *ordered],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=clean_environment({"OMP_NUM_THREADS": "8", "TOKENIZERS_PARALLELISM": "true"}),
                cwd=ROOT,
            )

    def wait_for(self, names: set[str]) -> None:
        while not names <= self._made:
            line = self._process.stdout.readline()
            assert line, f"materials were not made:\n{self._log.read_text()[-3000:]}"
            self._made.add(line.strip())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def make(name: str, folder: Path) -> None:
    from accelerate_unsloth.testing import tiny_model

    if name == "real":
        found = os.environ.get("MODEL", str(ROOT / ".demo" / "model"))
        if os.path.isdir(found):
            (folder / "real").symlink_to(os.path.abspath(found))
        else:
            tiny_model.make_model("135m", folder / "real")
    elif name == "1b":
        tiny_model.make_model("1b", folder / "1b")
    elif name == "long":
        tiny_model.make_data(folder / "long.jsonl", samples=256)
    elif name == "uneven":
        split_into_prompts(tiny_model.make_data(folder / "uneven.jsonl", samples=90, mean_log=5.0))
    else:
        {"moe": make_moe, "vision": make_vision}[name](folder / name, folder / "real")


def split_into_prompts(file: Path) -> None:
    """
    Make a prompt of a half, a third or a quarter of each text, and a completion of the rest.

    Texts of a few words only would do for speed, but not for comparisons: a step with a handful of tokens that a model has
    never seen has a gradient so steep that rounding alone moves the loss by 1%.
    """
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    cut = [(text, len(text) // (2 + number % 3)) for number, text in enumerate(texts)]
    rows = [{"prompt": text[:at], "completion": text[at:]} for text, at in cut]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_moe(folder: Path, tokenizer_folder: Path) -> None:
    """A small Qwen3-MoE with random weights."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=2,  # compiling them is most of a case
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_vision(folder: Path, tokenizer_folder: Path) -> None:
    """A small Qwen2.5-VL with random weights, its vision tower included."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
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
    torch.manual_seed(0)
    transformers.Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)


if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        make(wanted, Path(sys.argv[1]))
        print(wanted, flush=True)
