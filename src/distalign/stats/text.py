"""How varied token sequences are: distinct-n, repetition, self-BLEU. Fractions lie between 0 and 1."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int

from distalign.stats.intervals import Estimate, delete_one, jackknife, mean_and_se, two_or_more


def distinct_n(sequences: Sequence[Sequence[int]], *, n: int) -> float:
    """Different n-grams over all n-grams, across all token sequences: 1 all different, near 0 degenerate.

    It falls with the amount of text, so compare equal numbers of sequences of similar length only. NaN when no sequence
    has n tokens.

    Source: arXiv 1510.03055 (distinct-1, distinct-2).
    """
    grams = [gram for sequence in sequences for gram in _ngrams(sequence, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def jackknife_distinct_n(items: Sequence[Sequence[Sequence[int]]], *, n: int) -> Estimate:
    """`distinct_n` of all items' token sequences together, and its error by `jackknife` over the items.

    One count serves all: leaving an item out takes away its n-grams, and those kinds that no other item has. The
    fraction is NaN as `distinct_n` is, the error also where one item alone has n tokens. Raises ValueError for fewer
    than two items.
    """
    counts = [Counter(gram for text in item for gram in _ngrams(text, n)) for item in two_or_more(items)]
    holders = Counter(gram for own in counts for gram in own)
    total = sum(own.total() for own in counts)

    def distinct(own: Counter[tuple[int, ...]]) -> float:
        left = total - own.total()
        return (len(holders) - sum(holders[gram] == 1 for gram in own)) / left if left else math.nan

    return delete_one(distinct(Counter()), [distinct(own) for own in counts])


def repeated_ngram_rate(sequences: Sequence[Sequence[int]], *, n: int) -> Estimate:
    """Fraction of a sequence's n-grams that have occurred before in the same sequence, averaged over sequences.

    Sequences shorter than n have nothing to repeat and are left out; with none left the mean is NaN and n is 0.
    """
    grams = [_ngrams(sequence, n) for sequence in sequences if len(sequence) >= n]
    if not grams:
        return Estimate(math.nan, math.nan, 0)
    return mean_and_se(torch.tensor([1 - len(set(g)) / len(g) for g in grams], dtype=torch.float64))


def self_bleu(sequences: Sequence[Sequence[int]], *, n: int = 4) -> float:
    """BLEU of each token sequence with all the others as its references, averaged: 1 all alike, near 0 all different.

        brevity · exp( mean over k = 1 … n of ln precision_k )
        precision_k = (k-grams also in a reference, each at most as often as in the one that has it most) / (k-grams)
        brevity = min(1, exp(1 − r / length)),  r the length of the reference nearest in length, the shorter of two

    A precision of zero counts as 0.1 k-grams (smoothing of the usual implementations, Chen and Cherry 2014, method 1).
    Sequences with fewer than n tokens are references only. It rises with the number of sequences, so compare equal
    numbers: the samples of one prompt, then averaged over prompts. NaN when none has n tokens.

    Raises ValueError for fewer than two sequences. Source: arXiv 1802.01886.
    """
    return _self_bleu(_grams(sequences, n), [len(sequence) for sequence in sequences], range(len(sequences)), n)


def jackknife_self_bleu(items: Sequence[Sequence[Sequence[int]]], *, n: int = 4) -> Estimate:
    """`self_bleu` of all items' token sequences together, and its error by `jackknife` over the items; one count.

    Raises ValueError for fewer than two items, or if fewer than two sequences are left without one of them.
    """
    sequences = [sequence for item in items for sequence in item]
    grams, lengths = _grams(sequences, n), [len(sequence) for sequence in sequences]
    places = iter(range(len(sequences)))
    numbers = [[next(places) for _ in item] for item in items]
    return jackknife(lambda some: _self_bleu(grams, lengths, [i for own in some for i in own], n), numbers)


def _ngrams(sequence: Sequence[int], n: int) -> list[tuple[int, ...]]:
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has at least one token")
    return list(zip(*(sequence[start:] for start in range(n)), strict=False))


def _grams(sequences: Sequence[Sequence[int]], n: int) -> Int[np.ndarray, "rows 4"]:
    """Number of a sequence, number of a k-gram in it (k = 1 … n), k, and how often; sorted by k-gram and frequency."""
    numbers: dict[tuple[int, ...], int] = {}
    rows = [
        (index, numbers.setdefault(gram, len(numbers)), k, count)
        for index, sequence in enumerate(sequences)
        for k in range(1, n + 1)
        for gram, count in Counter(_ngrams(sequence, k)).items()
    ]
    found = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return found[np.lexsort((found[:, 3], found[:, 1]))]


def _self_bleu(grams: Int[np.ndarray, "rows 4"], lengths: Sequence[int], chosen: Sequence[int], n: int) -> float:
    """`self_bleu` of those sequences, by number, given the `_grams` and lengths of all."""
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} sequences; self-BLEU compares each with the others and needs two")
    here = np.zeros(len(lengths), dtype=bool)
    here[list(chosen)] = True
    owner, gram, k, count = grams[here[grams[:, 0]]].T
    # The sequence that has a gram most often meets the second most; any other meets one that has it at least as often.
    first, last = np.diff(gram, prepend=-1) != 0, np.diff(gram, append=-1) != 0
    second = np.where(first, 0, np.roll(count, 1))[last]
    met = np.minimum(count, second[np.cumsum(first) - 1])
    matched = np.bincount(owner * n + k - 1, weights=met, minlength=len(lengths) * n).reshape(-1, n).tolist()
    present = Counter(lengths[i] for i in chosen)
    nearest = {
        length: min((o for o, c in present.items() if c > (o == length)), key=lambda o: (abs(o - length), o))
        for length in present
    }
    scores = []
    for i in chosen:
        if (length := lengths[i]) >= n:
            log = 0.0
            for order, hits in enumerate(matched[i]):
                log += math.log((hits or 0.1) / (length - order)) / n
            scores.append(math.exp(log + min(0.0, 1 - nearest[length] / length)))
    return math.fsum(scores) / len(scores) if scores else math.nan
