"""What is in a file of pairs, reported before anything is trained on it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distalign.data.pairs import Data, Pair, label_warnings, plain_text, prompt_key, read_pairs
from distalign.data.readers import Source
from distalign.data.tokenize import EncodedPair, Tokenizer, encode_pairs

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
_TEXTS = ("prompt", "chosen", "rejected")
BOUNDARY = "⟦prompt | response⟧"


@dataclass(frozen=True)
class Inspection:
    """What `inspect_pairs` found.

    `rows` were read, `pairs` are usable, `ties` have two equal responses. `same_pairs` repeat an earlier pair,
    `swapped_pairs` an earlier one with the opposite label, `same_prompts` an earlier prompt. `chosen_longer` is the
    share of pairs, among those of unequal length, whose chosen response is the longer one; its standard error treats
    the pairs of one prompt as dependent. `lengths[unit][column]` are the QUANTILES. `soft_labels` are quantiles of
    p_chosen. `example` is the first pair with the boundary made visible, as the model reads it if a tokenizer is given.
    """

    source: str
    format: str
    implicit_prompt: bool
    rows: int
    pairs: int
    ties: int
    prompts: int
    same_prompts: int
    same_pairs: int
    swapped_pairs: int
    soft_label_count: int
    soft_labels: list[float] | None
    rewards: int
    chosen_longer: float | None
    chosen_longer_se: float | None
    length_unit: str
    lengths: dict[str, dict[str, list[float]]]
    extra_columns: list[str]
    warnings: list[str]
    too_long: int | None
    example: dict[str, str]


def inspect_pairs(
    source: Source,
    tokenizer: Tokenizer | None = None,
    *,
    split: str | None = None,
    drop_ties: bool = False,
    limit: int | None = None,
    max_length: int | None = None,
) -> Inspection:
    """Read pairs as training would, and describe them; with a tokenizer also in tokens. Raises DataError."""
    data = read_pairs(source, split=split, limit=limit, drop_ties=drop_ties)
    encoded, too_long = None, None
    if tokenizer is not None:
        encoded, _ = encode_pairs(tokenizer, data, max_length=None)
        if max_length is not None:
            too_long = sum(len(p.prompt) + max(len(p.chosen), len(p.rejected)) > max_length for p in encoded)
    lengths = _lengths(data, encoded)
    unit = "tokens" if encoded else "characters"
    keys = [prompt_key(row.prompt) for row in data]
    labels = [row.probability for row in data if row.probability is not None]
    same, swapped = _repeats(data, keys)
    rate, error = _chosen_longer(lengths[unit]["chosen"], lengths[unit]["rejected"], keys)
    return Inspection(
        source=data.source,
        format=data.format,
        implicit_prompt=data.implicit,
        rows=data.read,
        pairs=len(data),
        ties=data.ties,
        prompts=len(set(keys)),
        same_prompts=len(keys) - len(set(keys)),
        same_pairs=same,
        swapped_pairs=swapped,
        soft_label_count=len(labels),
        soft_labels=_quantiles(labels) if labels else None,
        rewards=sum(row.chosen_reward is not None for row in data),
        chosen_longer=rate,
        chosen_longer_se=error,
        length_unit=unit,
        lengths={u: {column: _quantiles(values) for column, values in c.items()} for u, c in lengths.items()},
        extra_columns=sorted({name for row in data for name in row.extra}),
        warnings=label_warnings(data.rows),
        too_long=too_long,
        example=_example(data[0], tokenizer, encoded[0] if encoded else None),
    )


def _lengths(data: Data[Pair], encoded: list[EncodedPair] | None) -> dict[str, dict[str, list[int]]]:
    texts = {name: [plain_text(getattr(row, name)) for row in data] for name in _TEXTS}
    lengths = {
        "characters": {name: [len(text) for text in texts[name]] for name in _TEXTS},
        "words": {name: [len(text.split()) for text in texts[name]] for name in _TEXTS},
    }
    if encoded:
        lengths["tokens"] = {name: [len(getattr(pair, name)) for pair in encoded] for name in _TEXTS}
    return lengths


def _repeats(data: Data[Pair], keys: list[str]) -> tuple[int, int]:
    seen: Counter[tuple[str, str, str]] = Counter()
    same = swapped = 0
    for key, row in zip(keys, data, strict=True):
        # An answer may be a tool call, without words.
        chosen, rejected = (plain_text(text).strip() or repr(text) for text in (row.chosen, row.rejected))
        same += seen[key, chosen, rejected] > 0
        swapped += seen[key, rejected, chosen] > 0
        seen[key, chosen, rejected] += 1
    return same, swapped


def _chosen_longer(chosen: list[int], rejected: list[int], keys: list[str]) -> tuple[float | None, float | None]:
    """The share of pairs whose chosen response is longer and its standard error, clustered by prompt."""
    longer = [(key, a > b) for key, a, b in zip(keys, chosen, rejected, strict=True) if a != b]
    if not longer:
        return None, None
    rate = sum(won for _, won in longer) / len(longer)
    clusters: dict[str, float] = {}
    for key, won in longer:
        clusters[key] = clusters.get(key, 0.0) + won - rate
    if len(clusters) < 2:
        return rate, None
    variance = sum(value**2 for value in clusters.values()) * len(clusters) / (len(clusters) - 1)
    return rate, math.sqrt(variance) / len(longer)


def _quantiles(values: Sequence[float | int]) -> list[float]:
    return np.quantile(values, QUANTILES).tolist()


def _example(row: Pair, tokenizer: Tokenizer | None, encoded: EncodedPair | None) -> dict[str, str]:
    if tokenizer is None or encoded is None:
        parts = {name: plain_text(getattr(row, name)) for name in _TEXTS}
    else:
        parts = {name: tokenizer.decode(getattr(encoded, name)) for name in _TEXTS}
    return {name: parts["prompt"] + BOUNDARY + parts[name] for name in ("chosen", "rejected")}
