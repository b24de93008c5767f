"""The annotations of shapes are checked while these tests run: of functions, methods and dataclasses."""

import pytest
import torch
from jaxtyping import TypeCheckError

from distalign.methods import Pairs
from distalign.methods.pmle import pmle_loss
from distalign.stats.intervals import mean_and_se


@pytest.mark.parametrize("call", [
    lambda: pmle_loss(torch.zeros(3, 2), torch.zeros(4), gamma=1.0),
    lambda: Pairs(logps=torch.zeros(3, 2), probability=torch.zeros(4)),
    lambda: mean_and_se(torch.zeros(3, 2)),
])  # fmt: skip
def test_a_wrong_shape_is_noticed(call):
    """In the first calls of every test."""
    with pytest.raises(TypeCheckError):
        call()
