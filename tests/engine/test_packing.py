from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distalign.engine import Group, micro_batches
from distalign.engine.packing import Segment, frame, pack, pad, validate

CPU = torch.device("cpu")
GROUPS = [Group([1, 2, 3], [[4, 5, 6], [7]]), Group([8], [[9, 10]])]

tokens = st.lists(st.integers(0, 50), min_size=1, max_size=12)
shapes = st.lists(st.tuples(tokens, st.lists(tokens, min_size=1, max_size=4)), min_size=1, max_size=9)


def test_packed_row_by_hand():
    """The prompt once, positions restarting after it, the last response token left out."""
    row = pack(GROUPS, CPU)
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 8, 9]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert row.predictors.tolist() == [2, 3, 4, 2, 5, 6]
    assert row.segments == (Segment(3, (2, 0)), Segment(1, (1,)))


def test_frame_by_hand():
    """Targets in reading order; a row of the mask a response."""
    places = frame(GROUPS, CPU)
    assert places.targets.tolist() == [4, 5, 6, 7, 9, 10]
    assert places.mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert places.group.tolist() == [0, 0, 1]


@given(shapes, st.integers(0, 60))
def test_packed_and_padded_rows_say_the_same(shapes, budget):
    """Each response token is predicted from the same token at the same position, packed or padded."""
    groups = [Group(*shape) for shape in shapes]
    row = pack(groups, CPU)
    packed = list(
        zip(row.input_ids[0, row.predictors].tolist(), row.position_ids[0, row.predictors].tolist(), strict=True)
    )
    pieces = {}
    for batch in pad(groups, CPU, token_budget=budget):
        width = batch.input_ids.shape[1]
        assert len(batch.responses) == 1 or batch.input_ids.numel() <= budget
        ids, start = batch.input_ids.flatten(), 0
        lengths = frame(groups, CPU).lengths
        for response in batch.responses:
            places = batch.predictors[start : start + lengths[response]]
            pieces[response] = [(ids[place].item(), place.item() % width) for place in places]
            start += lengths[response]
    assert packed == [pair for response in sorted(pieces) for pair in pieces[response]]


@given(shapes, st.integers(1, 80))
def test_micro_batches(shapes, budget):
    """Every group once, never over the budget unless alone; no group would have fitted into an earlier batch."""
    groups = [Group(*shape) for shape in shapes]
    batches = micro_batches(groups, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(groups)))
    used = [sum(groups[i].tokens for i in batch) for batch in batches]
    assert all(len(batch) == 1 or size <= budget for batch, size in zip(batches, used, strict=True))
    firsts = [groups[batch[0]].tokens for batch in batches]
    assert firsts == sorted(firsts, reverse=True)
    for later, batch in enumerate(batches):
        smallest = min(groups[i].tokens for i in batch)
        assert all(size + smallest > budget for size in used[:later])


def test_budget_below_one_is_refused():
    """A budget of 0 is a mistake, not an empty batch."""
    with pytest.raises(ValueError, match="token_budget is 0"):
        micro_batches(GROUPS, 0)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "no groups to score"),
        ([Group([], [[1]])], r"groups\[0\]: the prompt is empty"),
        ([GROUPS[0], Group([1], [])], r"groups\[1\]: no responses"),
        ([Group([1], [[2], []])], r"groups\[0\]\.responses\[1\]: the response is empty"),
        (
            [Group([1, 101], [[2]])],
            r"groups\[0\]\.prompt: token id 101 at position 1 is outside the vocabulary \(0 … 100\)",
        ),
        ([Group([1], [[-100]])], r"groups\[0\]\.responses\[0\]: token id -100 at position 0"),
        ([Group([1] * 6, [[2], [2] * 4])], r"responses\[1\]: 6 prompt and 4 response tokens need 9 positions.*has 8"),
    ],
)
def test_errors_say_where_and_what(groups, message):
    """Bad groups are refused before anything is computed."""
    with pytest.raises(ValueError, match=message):
        validate(groups, vocabulary=101, max_positions=8)


def test_longest_row_that_fits():
    """The last response token needs no position; one token more is refused."""
    validate([Group([1] * 6, [[2] * 3])], vocabulary=101, max_positions=8)
    with pytest.raises(ValueError, match="need 9 positions"):
        validate([Group([1] * 6, [[2] * 4])], vocabulary=101, max_positions=8)
