"""Read, check, split and encode preference pairs and prompts. `docs/data.md` describes the formats."""

from __future__ import annotations

from distalign.data.inspect import Inspection, inspect_pairs
from distalign.data.pairs import (
    Data,
    Pair,
    Prompt,
    Text,
    has_pairs,
    label_warnings,
    plain_text,
    prompt_key,
    read_pairs,
    read_prompts,
    split_by_prompt,
)
from distalign.data.readers import DataError, Source
from distalign.data.tokenize import (
    EncodedPair,
    EncodedPrompt,
    Tokenizer,
    decode_after,
    encode_pair,
    encode_pairs,
    encode_prompt,
    end_token_id,
    independent,
    prompts_of,
)

__all__ = [
    "Data",
    "DataError",
    "EncodedPair",
    "EncodedPrompt",
    "Inspection",
    "Pair",
    "Prompt",
    "Source",
    "Text",
    "Tokenizer",
    "decode_after",
    "encode_pair",
    "encode_pairs",
    "encode_prompt",
    "end_token_id",
    "has_pairs",
    "independent",
    "inspect_pairs",
    "label_warnings",
    "plain_text",
    "prompt_key",
    "prompts_of",
    "read_pairs",
    "read_prompts",
    "split_by_prompt",
]
