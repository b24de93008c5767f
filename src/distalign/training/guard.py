"""A run that has diverged stops before the step that would spoil the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from distalign.engine import Scores
from distalign.training.passes import local
from distalign.training.rollout_settings import TrainingError
from distalign.training.rounds import Row

ADVICE = "lower learning_rate, gamma or the scale of the rewards"
# Steps in a row that the scaler of float16 may skip: it halves its scale each time.
SKIPPED_IN_A_ROW = 20


class Guard:
    """Raises TrainingError for a loss, a gradient or a weight that is not finite; `label` begins the messages."""

    def __init__(self, label: str) -> None:
        self.label, self.skipped = label, 0

    def check_loss(self, loss: Tensor, scores: Scores, rows: Sequence[Row], step: int) -> None:
        """The loss of a micro-batch; the message names its rows, or those of them that the policy cannot score."""
        if finite(loss):
            return
        fine = scores.logps.detach().view(len(rows), -1).isfinite().all(1).tolist()
        wrong = [row.where for row, right in zip(rows, fine, strict=True) if not right] or [row.where for row in rows]
        shown = ", ".join(wrong[:5]) + (", …" if len(wrong) > 5 else "")
        raise TrainingError(f"{self.label}: the loss is {loss.item()} at step {step + 1} ({shown}); {ADVICE}")

    def check_gradients(self, parameters: Iterable[nn.Parameter], step: int, *, scaled: bool) -> None:
        """The length of the gradient of a step. With a scaler (float16) such steps are skipped, up to a bound."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        length = local(nn.utils.get_total_norm(gradients)) if gradients else torch.zeros(())
        if finite(length):
            self.skipped = 0
            return
        self.skipped += 1
        if scaled and self.skipped <= SKIPPED_IN_A_ROW:
            return
        again = f" {self.skipped} times in a row" if scaled else ""
        raise TrainingError(
            f"{self.label}: the length of the gradient is {float(length)}{again} at step {step + 1}; {ADVICE}"
        )

    def check_policy(self, model: nn.Module, logps: Tensor, step: int) -> None:
        """What would be saved: its weights, and what it says of some pairs or prompts (nats)."""
        broken = [name for name, weight in model.named_parameters() if weight.requires_grad and not finite(weight)]
        if broken:
            found = f"{len(broken)} of its tensors hold numbers that are not finite, first {broken[0]}"
        elif not finite(logps):
            found = "it gives log-probabilities that are not finite"
        else:
            return
        raise TrainingError(f"{self.label}: after step {step} the policy is not saved, for {found}; {ADVICE}")


def finite(values: Tensor) -> bool:
    """Whether all of them are."""
    return bool(values.isfinite().all())
