"""
Preference training (DPO) on all GPUs, on pairs made of this machine's own Python.

    python examples/dpo.py
    accelerate launch --config_file "$(accelerate-unsloth config path unsloth_ddp)" examples/dpo.py
    torchrun --nproc_per_node=2 examples/dpo.py

A pair asks for the docstring of a function: its own is chosen, another function's is rejected. Options are TRL's, such as
`--beta 0.2` or `--config dpo.yaml`, and `--model_name_or_path`; by default the demo's model is trained, and made when it is
missing. Without GPUs this is a dry run of 4 steps with transformers and PEFT; `accelerate launch` then takes `unsloth_ddp_cpu`.
"""

import ast
import inspect
import random
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from accelerate_unsloth import DPOConfig, DPOTrainer, FastLanguageModel

# isort: split
import torch
from _arguments import DEMO, demo_model
from datasets import Dataset
from trl import TrlParser


@dataclass
class ScriptArguments:
    model_name_or_path: str | None = None
    max_seq_length: int = 512
    pairs: int = 256


def functions(wanted: int) -> list[tuple[str, str]]:
    """Return signatures of functions in the standard library, with the first sentence of their docstrings."""
    found = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = file.read_text(errors="replace")
        for node in ast.walk(ast.parse(source)):
            documented = isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
            if documented and len(text := inspect.cleandoc(documented).split("\n\n")[0]) > 20:
                signature = ast.get_source_segment(source, node).split(":\n")[0]
                found.append((" ".join(signature.split()), " ".join(text.split())))
            if len(found) == wanted:
                return found
    return found


def make_pairs(wanted: int) -> Dataset:
    """Return one pair for each function, the same on every machine with this Python."""
    generator, documented = random.Random(0), functions(wanted)
    return Dataset.from_list(
        [
            {
                "prompt": f"Write the docstring of `{signature}`.\n",
                "chosen": text,
                "rejected": generator.choice([other for _, other in documented if other != text]),
            }
            for signature, text in documented
        ]
    )


def main() -> None:
    if not any("output_dir" in word for word in sys.argv):
        sys.argv += ["--output_dir", str(DEMO / "dpo")]
    if not torch.cuda.is_available():
        sys.argv += ["--use_cpu", "True", "--bf16", "False"]
        if not any("max_steps" in word for word in sys.argv):
            sys.argv += ["--max_steps", "4"]
    usage = 'accelerate launch --config_file "$(accelerate-unsloth config path unsloth_ddp)" examples/dpo.py [options]'
    script, arguments = TrlParser((ScriptArguments, DPOConfig), usage=usage).parse_args_and_config()
    model, tokenizer = FastLanguageModel.from_pretrained(
        script.model_name_or_path or demo_model(),
        max_seq_length=script.max_seq_length,
        load_in_4bit=torch.cuda.is_available(),
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    trainer = DPOTrainer(
        model=model, args=arguments, train_dataset=make_pairs(script.pairs), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(arguments.output_dir)


if __name__ == "__main__":
    main()
