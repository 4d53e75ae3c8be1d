"""A model folder of a known shape with random weights and another model's tokenizer, to measure with.

python jobs/bench/random_model.py 8b TOKENIZER_FOLDER TARGET
"""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaConfig

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
}
"""The shapes of Llama 3.2 1B and Llama 3.1 8B, and one for trying the scripts."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def write_random_model(shape: str, tokenizer: str, target: str) -> None:
    """Write a Llama of a shape from SHAPES, in bfloat16, with the tokenizer of another folder."""
    from transformers import LlamaForCausalLM

    config = write_shape(shape, tokenizer, target)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(target)


def write_shape(shape: str, tokenizer: str, target: str) -> "LlamaConfig":
    """Write all of such a model but its weights; its configuration."""
    from transformers import AutoTokenizer, LlamaConfig

    words = len(AutoTokenizer.from_pretrained(tokenizer))
    sizes = {"max_position_embeddings": 32_768, **SHAPES[shape]}
    config = LlamaConfig(**{**sizes, "vocab_size": max(words, sizes.get("vocab_size", 0))})
    config.save_pretrained(target)
    for name in TOKENIZER_FILES:
        if (Path(tokenizer) / name).is_file():
            shutil.copy(Path(tokenizer) / name, target)
    return config


if __name__ == "__main__":
    write_random_model(*sys.argv[1:4])
