"""Read, check, split and encode preference pairs and prompts. `docs/data.md` describes the formats."""

from __future__ import annotations

from distalign.data.inspect import Inspection, inspect_pairs
from distalign.data.pairs import (
    Data,
    Message,
    Pair,
    PairData,
    Prompt,
    PromptData,
    Text,
    has_pairs,
    plain_text,
    prompt_key,
    read_pairs,
    read_prompts,
    split_by_prompt,
)
from distalign.data.readers import DataError, Problem, Source
from distalign.data.tokenize import (
    Counts,
    EncodedPair,
    EncodedPrompt,
    Tokenizer,
    decode_after,
    encode_pair,
    encode_pairs,
    encode_prompt,
    end_token_id,
    prompts_of,
)

__all__ = [
    "Counts",
    "Data",
    "DataError",
    "EncodedPair",
    "EncodedPrompt",
    "Inspection",
    "Message",
    "Pair",
    "PairData",
    "Problem",
    "Prompt",
    "PromptData",
    "Source",
    "Text",
    "Tokenizer",
    "decode_after",
    "encode_pair",
    "encode_pairs",
    "encode_prompt",
    "end_token_id",
    "has_pairs",
    "inspect_pairs",
    "plain_text",
    "prompt_key",
    "prompts_of",
    "read_pairs",
    "read_prompts",
    "split_by_prompt",
]
