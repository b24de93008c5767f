"""What of a trained reward is learned with a frozen backbone: a vector of weights, linear in features of a response.

hidden   f = w · Σ_t [h_t; e(y_t)] / √T          the context after each token and its embedding
counts   f = Σ_t b[y_t]                          a bonus for each token
tilt     R = γ Σ_t ln softmax(z_t + b)[y_t]      z_t the logits of π₀: a reward that IS a language model (eq. 8)
last     f = w · h_T                             the score of a sequence-classification model
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from distalign.engine.scoring import Reading

HeadName = Literal["hidden", "counts", "tilt", "last"]


class Head(nn.Module):
    """value = w · (features − shift) / scale, in nats; starts at exactly zero.

    shift and scale are those of the training pairs, so that w ~ N(0, I/λ) treats all features alike.
    """

    weight: nn.Parameter
    shift: Tensor
    scale: Tensor
    bound: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        for name, start in (("shift", torch.zeros(width)), ("scale", torch.ones(width))):
            self.register_buffer(name, start)
        self.register_buffer("bound", torch.tensor(torch.inf))

    @abstractmethod
    def features(self, reading: Reading, embeddings: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "responses width"]:
        """A response as one vector of float32; `embeddings` are the input embeddings of all tokens."""

    def standardise(self, features: Float[Tensor, "pairs 2 width"]) -> None:
        """Take shift and scale from the features of the training pairs: a typical pair differs by a vector of length 1.

        Then N(0, 1/λ) is a prior on the difference of two values with standard deviation 1/√λ nats.
        """
        flat = features.flatten(0, 1)
        spread = flat.std(0)
        # What hardly varies says nothing, and would be blown up.
        spread = torch.where(spread > 1e-6 * flat.abs().max().clamp(min=1e-30), spread, torch.inf)
        length = ((features[:, 0] - features[:, 1]) / spread).square().sum(-1).mean().sqrt()
        self.shift.copy_(flat.mean(0))
        self.scale.copy_(spread * length.clamp(min=1e-6))

    @torch.no_grad()
    def finish(self, features: Float[Tensor, "pairs 2 width"]) -> None:
        """Level off beyond the largest value of the training responses, so that a policy gains nothing far outside."""
        self.bound.fill_(torch.inf)
        self.bound.copy_(self(features).abs().max().clamp(min=1e-6))

    def rows(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """What the weights multiply."""
        return (features - self.shift) / self.scale

    def forward(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
        """Values in nats: linear as far as training has seen, ± 2 · bound at the most."""
        value = self.rows(features) @ self.weight
        beyond = (value.abs() - self.bound).clamp(min=0)
        if not bool((beyond > 0).any()):
            return value
        return value.sign() * (value.abs() - beyond + self.bound * torch.tanh(beyond / self.bound))


class Hidden(Head):
    """A linear score of every response token, summed, over √T.

    The sum can express "each such word counts"; dividing by √T keeps long responses from being rewarded for length.
    """

    def features(self, reading: Reading, embeddings: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "responses width"]:
        """Σ_t [h_t; e(y_t)] / √T."""
        tokens = torch.cat([reading.hidden, embeddings[reading.ids]], -1).float()
        return reading.mean(tokens) * reading.lengths[:, None].sqrt()


class Counts(Head):
    """How often each token stands in the response, all on one scale."""

    def features(self, reading: Reading, embeddings: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "responses width"]:
        """Σ_t e_{y_t}."""
        return reading.counts(len(embeddings)).float()

    def standardise(self, features: Float[Tensor, "pairs 2 width"]) -> None:
        """One scale for all tokens: a rare one is not blown up."""
        length = (features[:, 0] - features[:, 1]).square().sum(-1).mean().sqrt()
        self.scale.fill_(float(length.clamp(min=1e-6)))


class Tilt(Counts):
    """Token bonuses inside the softmax: the reward is γ times the log-probability of a language model.

    `weight` is γ b, the bonus in nats of reward; the features are the derivative at it, counts less expected counts.
    """

    def finish(self, features: Float[Tensor, "pairs 2 width"]) -> None:
        """Nothing levels off: a normalised language model has no far outside."""


class LastToken(Head):
    """The score of a sequence-classification model: linear in the hidden state after the last token.

    Trained on standardised features; what is kept are the weights that such a model holds.
    """

    def features(self, reading: Reading, embeddings: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "responses width"]:
        """h_T, the end token read."""
        return reading.last.float()

    @torch.no_grad()
    def finish(self, features: Float[Tensor, "pairs 2 width"]) -> None:
        """Same rewards up to a constant, with shift 0 and scale 1: the weights of an ordinary score head."""
        self.weight.div_(self.scale)
        self.shift.zero_()
        self.scale.fill_(1.0)


def new_head(name: HeadName, base: PreTrainedModel) -> Head:
    """A head on `base`, 0 everywhere."""
    vocabulary, hidden = embeddings(base).shape
    widths: dict[str, tuple[type[Head], int]] = {
        "hidden": (Hidden, 2 * hidden),
        "counts": (Counts, vocabulary),
        "tilt": (Tilt, vocabulary),
        "last": (LastToken, hidden),
    }
    kind, width = widths[name]
    return kind(width)


def embeddings(model: PreTrainedModel | PeftModel) -> Float[Tensor, "vocab hidden"]:
    """The input embeddings of all tokens."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight
