"""Text metrics: by hand, by their definition, and the edges."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distalign.stats.intervals import jackknife
from distalign.stats.text import (
    distinct_n,
    jackknife_distinct_n,
    jackknife_self_bleu,
    repeated_ngram_rate,
    self_bleu,
)


def test_diversity_of_varied_and_degenerate_text():
    """'a b a b a b' has two different bigrams in five; varied text repeats nothing."""
    assert distinct_n([[1, 2, 1, 2, 1, 2]], n=2) == pytest.approx(2 / 5)
    assert distinct_n([[1, 2, 3], [1, 2, 3]], n=1) == pytest.approx(0.5)
    assert repeated_ngram_rate([[1, 2, 1, 2, 1, 2], [1, 2, 3, 4]], n=2).mean == pytest.approx((3 / 5 + 0) / 2)
    assert repeated_ngram_rate([[1, 2, 3], [1, 2, 3]], n=1).mean == 0.0


def test_diversity_without_enough_tokens():
    """Too short for one n-gram: NaN and a count of 0, not a perfect score."""
    assert math.isnan(distinct_n([[1], []], n=2))
    assert repeated_ngram_rate([[1], []], n=2).n == 0
    with pytest.raises(ValueError, match="n is 0"):
        distinct_n([[1, 2]], n=0)


def test_self_bleu_by_hand():
    """Two sequences and bigrams: precisions 3/4 and 1/3, 3/3 and 1/2; the shorter one pays exp(1 − 4/3)."""
    first, second = [1, 2, 3, 4], [2, 3, 1]
    by_hand = (math.sqrt(3 / 4 * 1 / 3) + math.exp(1 - 4 / 3) * math.sqrt(3 / 3 * 1 / 2)) / 2
    assert self_bleu([first, second], n=2) == pytest.approx(by_hand)
    assert self_bleu([first, first], n=4) == pytest.approx(1)
    # Nothing shared: a precision of zero counts 0.1 grams, of 4, 3, 2 and 1.
    assert self_bleu([first, [5, 6, 7, 8]]) == pytest.approx((0.1**4 / 24) ** 0.25)
    assert self_bleu([[1, 2], [1, 2]], n=2) == pytest.approx(1)
    assert math.isnan(self_bleu([[1], [1]], n=2))
    with pytest.raises(ValueError, match="needs two"):
        self_bleu([first])


@given(st.lists(st.lists(st.integers(0, 3), max_size=7), min_size=2, max_size=5), st.integers(1, 3))
def test_self_bleu_is_its_definition(sequences, n):
    """Equal to BLEU written out against each list of references."""

    def grams(sequence, k):
        return Counter(tuple(sequence[i : i + k]) for i in range(len(sequence) - k + 1))

    scores = []
    for i, own in enumerate(sequences):
        if len(own) < n:
            continue
        others = sequences[:i] + sequences[i + 1 :]
        log = 0.0
        for k in range(1, n + 1):
            hits = sum(min(c, max(grams(o, k)[g] for o in others)) for g, c in grams(own, k).items())
            log += math.log((hits or 0.1) / (len(own) - k + 1)) / n
        nearest = min((abs(len(o) - len(own)), len(o)) for o in others)[1]
        scores.append(math.exp(log + min(0, 1 - nearest / len(own))))
    value = self_bleu(sequences, n=n)
    assert math.isnan(value) if not scores else value == pytest.approx(sum(scores) / len(scores))


TEXTS = st.lists(st.lists(st.integers(0, 3), max_size=7), max_size=3)  # an item: some share n-grams, some are empty


@given(st.lists(TEXTS, min_size=2, max_size=6), st.integers(1, 3))
def test_jackknife_of_distinct_n_is_its_definition(items, n):
    """Counted once, leaving out what an item alone has: equal to `distinct_n` of the rest, item by item, NaN too."""
    found = jackknife_distinct_n(items, n=n)
    each = jackknife(lambda some: distinct_n([text for item in some for text in item], n=n), items)
    assert found == pytest.approx(each, abs=1e-12, nan_ok=True)


@given(st.lists(TEXTS.filter(lambda item: item != []), min_size=3, max_size=5), st.integers(1, 4))
def test_jackknife_of_self_bleu_is_its_definition(items, n):
    """Counted once: equal to `self_bleu` of the rest, item by item, NaN too."""
    found = jackknife_self_bleu(items, n=n)
    each = jackknife(lambda some: self_bleu([text for item in some for text in item], n=n), items)
    assert found == pytest.approx(each, abs=1e-12, nan_ok=True)


def test_a_jackknife_needs_two_items():
    """One left out leaves none; self-BLEU of what is left needs two sequences."""
    for items in ([], [[[1, 2, 3]]]):
        with pytest.raises(ValueError, match="needs at least two"):
            jackknife_distinct_n(items, n=2)
        with pytest.raises(ValueError, match="needs at least two"):
            jackknife_self_bleu(items)
    with pytest.raises(ValueError, match="needs two"):
        jackknife_self_bleu([[[1, 2, 3]], [[1, 2, 3]]])
