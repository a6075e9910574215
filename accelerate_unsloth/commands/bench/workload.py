"""What is trained on what: a model of real dimensions with random weights, and text of very uneven lengths."""

import json
import random
import sysconfig
from pathlib import Path

# hidden, intermediate, layers, heads, key and value heads
DIMENSIONS = {
    "quick": (32, 64, 2, 4, 2),
    "135m": (576, 1536, 30, 9, 3),
    "1b": (2048, 8192, 16, 32, 8),
    "8b": (4096, 14336, 32, 32, 8),
}
VOCABULARY = 49_152
_TOKENIZER_WORDS = 8_192


def make_model(size: str, folder: Path) -> Path:
    """
    Write a Llama with random weights and a tokenizer trained on the standard library, once.

    Args:
        size (`str`): `"8b"` and `"1b"` have the dimensions of Llama 3, `"135m"` those of SmolLM2.
        folder (`Path`): Where it goes.

    Returns:
        `Path`: the folder.
    """
    if (folder / "complete").exists():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads = DIMENSIONS[size]
    words = 512 if size == "quick" else VOCABULARY
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=size in ("quick", "135m"),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="float32" if size == "quick" else "bfloat16",
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if size == "quick" else torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(default)
    model.save_pretrained(folder, max_shard_size="4GB")
    make_tokenizer(min(words, _TOKENIZER_WORDS)).save_pretrained(folder)
    (folder / "complete").touch()
    return folder


def make_tokenizer(words: int):
    """A byte-level BPE tokenizer of `words` words, trained on some of the standard library's source."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([standard_library(2_000_000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def standard_library(characters: int) -> str:
    """That many characters of the source of Python's own library."""
    text, folder = "", Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py")):
        if "site-packages" not in file.parts:
            text += file.read_text(errors="ignore")
        if len(text) >= characters:
            break
    return text[:characters]


def make_data(file: Path, samples: int, mean_log: float = 6.9, spread_log: float = 1.0, seed: int = 0) -> Path:
    """
    Pieces of the standard library whose numbers of characters are lognormal: a mean of some 400 tokens, a long tail.

    Args:
        file (`Path`): A JSON Lines file with a `text` column.
        samples (`int`): Number of rows.
        mean_log (`float`), spread_log (`float`): Of the logarithm of the characters.
        seed (`int`): Seed.
    """
    generator, source = random.Random(seed), standard_library(8_000_000)
    with file.open("w") as rows:
        for _ in range(samples):
            length = max(16, int(generator.lognormvariate(mean_log, spread_log)))
            start = generator.randrange(max(1, len(source) - length))
            rows.write(json.dumps({"text": source[start : start + length]}) + "\n")
    return file
