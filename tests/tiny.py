"""A language model of 2 layers over 40 words with a chat template, saved as any other, and data that it can read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from distalign.data import EncodedPair

SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
WORDS = [
    *("user", "assistant", "system", "happy", "kind", "warm", "cold", "rain", "sun", "tea", "bread", "milk", "tell"),
    *("me", "about", "the", "a", "cat", "dog", "house", "garden", "is", "was", "very", "good", "bad", "big", "small"),
    *("red", "blue", "day", "night", "yes", "no", "and", "or"),
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = 3
CONTEXT = 64


def tokenizer(*, chat: bool = True) -> Any:
    """Words and four special tokens; `<|im_end|>` ends a turn and a text."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    if chat:
        made.chat_template = TEMPLATE
    return made


def model(kind: str = "llama", **settings: Any) -> Any:
    """A model with random weights, large enough for its distributions to be far from uniform."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": len(SPECIAL) + len(WORDS),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": END,
            **settings,
        },
    )
    return AutoModelForCausalLM.from_config(config).eval()


def save(folder: Path, **settings: Any) -> Path:
    """Model and tokenizer in transformers' format."""
    model(**settings).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def prompts(n: int, seed: int = 0) -> list[str]:
    """Different short requests of unequal length."""
    source, found = random.Random(seed), {}
    while len(found) < n:
        found[" ".join(["tell", "me", "about", *source.choices(WORDS[3:], k=source.randint(1, 4))])] = None
    return list(found)


def encoded_pairs(n: int, seed: int = 0, *, soft: bool = False) -> list[EncodedPair]:
    """Pairs as ids, of unequal lengths. The chosen response is of warm words, so that there is something to learn."""
    source = random.Random(seed)
    pairs = []
    for i in range(n):
        prompt = [2, 4, *source.choices(range(7, 40), k=source.randint(2, 8)), 3, 2, 5]
        chosen = [*source.choices(range(7, 14), k=source.randint(1, 6)), END]
        rejected = [*source.choices(range(20, 40), k=source.randint(1, 6)), END]
        pairs.append(EncodedPair(prompt, chosen, rejected, source.random() if soft else None, f"pair {i}"))
    return pairs


def write_pairs(path: Path, n: int = 40) -> Path:
    """A file of the user's own: chats, as JSON lines."""
    source = random.Random(0)
    with path.open("w") as file:
        for prompt in prompts(n):
            chosen = "happy warm " + " ".join(source.choices(WORDS[3:], k=2))
            rejected = "cold bad " + " ".join(source.choices(WORDS[3:], k=3))
            row = {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            file.write(json.dumps(row) + "\n")
    return path


def recipe_text(folder: Path, **more: Any) -> str:
    """A comparison with a known target on the tiny model, in a few steps."""
    settings: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "model": str(folder / "model"),
        "lora": {"r": 4, "alpha": 8, "layers": 1},
        "target": {
            "words": ["happy", "kind", "warm"],
            "bonus": 2.0,
            "gamma": 0.5,
            "pairs": 24,
            "eval_pairs": 12,
            "max_new_tokens": 5,
            "prompts": prompts(40),
        },
        "methods": {"pmle": {"gamma": 0.5, "beta": 0.0}, "dpo": {"gamma": 0.5}},
        "training": {
            "learning_rate": 3e-3,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 2,
            "eval_steps": 3,
            "use_cpu": True,
        },
        "token_budget": 512,
        "evaluation": {"prompts": 6, "samples": 2, "max_new_tokens": 5},
        **more,
    }
    return json.dumps({key: value for key, value in settings.items() if value is not None})
