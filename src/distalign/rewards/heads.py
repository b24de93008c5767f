"""What is learned on top of a language model's hidden states: one number a response."""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distalign.engine.scoring import Reading


class Head(nn.Module):
    """value = w · (features − shift) / scale, in nats; starts at exactly zero.

    shift and scale are those of the training pairs: a typical pair's features then differ by a vector of length 1, so
    that w ~ N(0, 1/ridge) is a prior on the difference of two values with standard deviation 1/√ridge nats.
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

    @staticmethod
    @abstractmethod
    def width(hidden: int) -> int:
        """Number of features for hidden states of that size."""

    @abstractmethod
    def features(self, reading: Reading, embeddings: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "responses width"]:
        """A response as one vector of float32; `embeddings` are the input embeddings of all tokens."""

    def standardise(self, features: Float[Tensor, "pairs 2 width"]) -> None:
        """Take shift and scale from the features of the training pairs."""
        flat = features.flatten(0, 1)
        spread = flat.std(0)
        # What hardly varies says nothing, and would be blown up.
        spread = torch.where(spread > 1e-6 * flat.abs().max().clamp(min=1e-30), spread, torch.inf)
        length = ((features[:, 0] - features[:, 1]) / spread).square().sum(-1).mean().sqrt()
        self.shift.copy_(flat.mean(0))
        self.scale.copy_(spread * length.clamp(min=1e-6))

    @abstractmethod
    def finish(self, features: Float[Tensor, "pairs 2 width"]) -> None:
        """Bring the trained head into the form it is used and saved in; `features` are the training pairs'."""

    def forward(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
        """Values in nats: linear as far as training has seen, ± 2 · bound at the most."""
        value = ((features - self.shift) / self.scale) @ self.weight
        beyond = (value.abs() - self.bound).clamp(min=0)
        if not bool((beyond > 0).any()):
            return value
        return value.sign() * (value.abs() - beyond + self.bound * torch.tanh(beyond / self.bound))


class Correction(Head):
    """The correction of a policy-initialised reward: a linear score of every response token, summed, over √T.

    A token is seen as its hidden state (the context after it) and its own input embedding (the word). The sum can
    express "each such word counts"; dividing by √T keeps long responses from being rewarded for length, and beyond the
    values met in training it levels off at `bound`, so that a policy which maximises it gains nothing far outside.
    """

    @staticmethod
    def width(hidden: int) -> int:
        """Hidden state and embedding."""
        return 2 * hidden

    def features(self, reading: Reading, embeddings: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "responses width"]:
        """Σ_t [h_t; e(y_t)] / √T."""
        tokens = torch.cat([reading.hidden, embeddings[reading.ids]], -1).float()
        return reading.mean(tokens) * reading.lengths[:, None].sqrt()

    @torch.no_grad()
    def finish(self, features: Float[Tensor, "pairs 2 width"]) -> None:
        """Level off beyond the largest value of the training responses."""
        self.bound.fill_(torch.inf)
        self.bound.copy_(self(features).abs().max().clamp(min=1e-6))


class LastToken(Head):
    """The score of a sequence-classification model: linear in the hidden state after the last token.

    Trained on standardised features; what is kept are the weights that such a model holds.
    """

    @staticmethod
    def width(hidden: int) -> int:
        """Hidden state."""
        return hidden

    def features(self, reading: Reading, embeddings: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "responses width"]:
        """h_T, the end token read."""
        return reading.last.float()

    @torch.no_grad()
    def finish(self, features: Float[Tensor, "pairs 2 width"]) -> None:
        """Same rewards up to a constant, with shift 0 and scale 1: the weights of an ordinary score head."""
        self.weight.div_(self.scale)
        self.shift.zero_()
        self.scale.fill_(1.0)
