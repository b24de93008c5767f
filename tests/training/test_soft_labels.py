"""Soft labels on their way through the trainer."""

from dataclasses import replace

import pytest
import tiny
from test_trainer import metrics, trainer

from distalign.methods import PMLE


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_accuracy_counts_the_side_that_is_labelled(tmp_path):
    """A label of probability 0 prefers the other response: accuracy is one minus that of the label turned round."""
    found = []
    for probability in (0.0, 1.0, 0.25):
        pairs = [replace(pair, probability=probability) for pair in tiny.encoded_pairs(8)]
        folder = tmp_path / str(probability)
        trainer(folder, PMLE(gamma=0.5, beta=0.0), pairs=pairs).train()
        found.append(metrics(folder)[0]["rewards/accuracies"])
    turned, certain, soft = found
    assert turned == pytest.approx(1 - certain)
    assert soft == pytest.approx(0.25 * certain + 0.75 * turned)
    assert certain != pytest.approx(0.5)
