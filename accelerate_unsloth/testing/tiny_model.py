"""
Models with random weights, their tokenizers, and data of very uneven lengths, made on the spot: no downloads.

    python -m accelerate_unsloth.testing.tiny_model FOLDER       the model and the data of the installation check
"""

import functools
import json
import math
import random
import sys
import sysconfig
from pathlib import Path

# hidden, intermediate, layers, heads, key and value heads. Heads of "check" have 64 values, which every attention kernel
# knows; "8b" and "1b" are Llama 3's dimensions, "135m" SmolLM2's.
DIMENSIONS = {
    "tiny": (32, 64, 2, 4, 2),
    "check": (128, 256, 2, 2, 2),
    "135m": (576, 1536, 30, 9, 3),
    "1b": (2048, 8192, 16, 32, 8),
    "8b": (4096, 14336, 32, 32, 8),
}
SMALL = ("tiny", "check")
VOCABULARY = 49_152  # of the others
CHECK_SAMPLES = 24

_SENTENCE = "the a rank sends its gradient to all others and waits for none while one model learns from every token"
_WORDS = _SENTENCE.split()


def make_model(size: str, folder: Path) -> Path:
    """Write a Llama of a size of `DIMENSIONS` with random weights, and its tokenizer, into a folder, once; return the folder."""
    from transformers import LlamaConfig

    if (folder / "complete").exists():
        return folder
    small, tied = size in SMALL, size == "135m"
    tokenizer = make_tokenizer() if small else make_tokenizer(8_192, standard_library(2_000_000))
    words = len(tokenizer) if small else VOCABULARY
    spread = 0.2 if size == "tiny" else 0.02
    config = LlamaConfig(
        **_dimensions(size, words), tie_word_embeddings=tied, max_position_embeddings=8192, initializer_range=spread
    )
    return _write(config, tokenizer, folder, "float32" if small else "bfloat16")


def make_mixture_of_experts(folder: Path) -> Path:
    """Write a tiny Qwen3-MoE whose router is far from even, with the tokenizer of the tiny Llama."""
    from transformers import Qwen3MoeConfig

    tokenizer = make_tokenizer()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
    config = Qwen3MoeConfig(**_dimensions("tiny", len(tokenizer)), **experts, initializer_range=0.2)
    return _write(config, tokenizer, folder, "float32")


def _dimensions(size: str, words: int) -> dict:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    tokens = {"vocab_size": words, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return tokens | dict(zip(names, DIMENSIONS[size], strict=True))


def _write(config, tokenizer, folder: Path, dtype: str) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if dtype == "bfloat16" and torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)
    (folder / "complete").touch()
    return folder


def make_tokenizer(words: int = 320, text: str = _SENTENCE):
    """Train a byte-level BPE tokenizer of at most `words` words on a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=[*special.values()], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


def make_prompts(file: Path, samples: int) -> Path:
    """Write prompts and completions of 1 to 60 words each, so that masked and counted tokens differ wildly."""
    text = functools.partial(_random_words, random.Random(0))
    return _write_rows(
        file, [{"prompt": text([1, 5, 40]) + " ", "completion": text([1, 3, 60])} for _ in range(samples)]
    )


def make_preferences(file: Path, samples: int) -> Path:
    """Write prompts with a chosen and a rejected answer, all of very uneven lengths."""
    text = functools.partial(_random_words, random.Random(0))
    rows = [
        {"prompt": text([1, 5, 20]) + " ", "chosen": text([1, 3, 30]), "rejected": text([1, 3, 30]) + " none"}
        for _ in range(samples)
    ]
    return _write_rows(file, rows)


def _random_words(generator: random.Random, lengths: list[int]) -> str:
    """Return random words, as many as one of `lengths`."""
    return " ".join(generator.choice(_WORDS) for _ in range(generator.choice(lengths)))


def make_texts(samples: int = CHECK_SAMPLES) -> list[str]:
    """Return texts of 2 to 48 words: the same sentence over and over from a random word on, which is soon learned."""
    generator = random.Random(0)
    starts = [(generator.randrange(len(_WORDS)), generator.choice([2, 8, 48])) for _ in range(samples)]
    return [" ".join((_WORDS * 4)[start : start + words]) for start, words in starts]


def make_data(file: Path, samples: int, mean_log: float = 6.9, spread_log: float = 1.0) -> Path:
    """
    Write JSON Lines with a `text` column: pieces of the standard library, a mean of some 400 tokens and a long tail.

    The numbers of characters are lognormal; `mean_log` and `spread_log` are those of their logarithm.
    """
    generator, source, rows = random.Random(0), standard_library(8_000_000), []
    for _ in range(samples):
        length = max(16, int(generator.lognormvariate(mean_log, spread_log)))
        start = generator.randrange(max(1, len(source) - length))
        rows.append({"text": source[start : start + length]})
    return _write_rows(file, rows)


def make_answers(
    file: Path, samples: int, mean_log: float = 6.9, spread_log: float = 1.0, paired: bool = True
) -> Path:
    """
    Write JSON Lines with the columns `prompt`, `chosen` and `rejected`, pieces of the standard library.

    A prompt with an answer is as long as a row of [`make_data`]; a third is the prompt's. `paired=False` writes `prompt`,
    `completion` and `label` instead, two of three with a good label.
    """
    generator, source, rows = random.Random(0), standard_library(8_000_000), []
    longest_prompt = int(math.exp(mean_log))  # so that no prompt fills a row alone

    def piece(length: float) -> str:
        start = generator.randrange(len(source) // 2)
        return source[start : start + max(8, int(length))]

    def answer(length: float) -> str:
        return piece(length).lstrip() or "pass"

    for _ in range(samples):
        length = generator.lognormvariate(mean_log, spread_log)
        # A line break ends the prompt, so that no token is part of both.
        row = {"prompt": piece(min(length / 3, longest_prompt)).rstrip() + "\n"}
        if paired:
            other = length * generator.lognormvariate(0.0, spread_log / 2)
            row |= {"chosen": answer(length * 2 / 3), "rejected": answer(other * 2 / 3)}
        else:
            row |= {"completion": answer(length * 2 / 3), "label": generator.random() < 2 / 3}
        rows.append(row)
    return _write_rows(file, rows)


def standard_library(characters: int) -> str:
    """Return that many characters of the source of Python's own library."""
    text, folder = "", Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py")):
        if "site-packages" not in file.parts:
            text += file.read_text(errors="ignore")
        if len(text) >= characters:
            break
    return text[:characters]


def _write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


if __name__ == "__main__":
    made = Path(sys.argv[1])
    make_model("check", made / "model")
    _write_rows(made / "data.jsonl", [{"text": text} for text in make_texts()])
