"""
A tiny Llama, a tokenizer of its own and texts of very uneven lengths, made by plain transformers: no downloads.

    python -m accelerate_unsloth.commands.test.tiny FOLDER
"""

import json
import random
import sys
from pathlib import Path

SAMPLES = 24
_SENTENCE = "every token of each rank counts once and all others train a single model however the batch is cut"
_WORDS = _SENTENCE.split()


def make_texts(samples: int = SAMPLES, seed: int = 0) -> list[str]:
    """
    Texts of 2 to 48 words: the same sentence over and over from a random word on, which is soon learned.

    Example:

    ```python
    >>> from accelerate_unsloth.commands.test.tiny import make_texts
    >>> len(make_texts(samples=3))
    3
    ```
    """
    generator = random.Random(seed)
    cycle = _WORDS * 4
    starts = [(generator.randrange(len(_WORDS)), generator.choice([2, 8, 48])) for _ in range(samples)]
    return [" ".join(cycle[start : start + words]) for start, words in starts]


def make_tokenizer():
    """Words of the texts as tokens; anything else becomes `<unk>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *sorted(set(_WORDS))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def make_model(tokenizer):
    """Random weights, the same each time. Heads of 64 values, which every attention kernel knows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def main(folder: str) -> None:
    folder, tokenizer = Path(folder), make_tokenizer()
    make_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [json.dumps({"text": text}) for text in make_texts()]
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
