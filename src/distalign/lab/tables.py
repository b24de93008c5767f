"""Known targets as tables, and labelled pairs drawn from them: P(a ≻ b) = σ(γ[ln π*(a|x) − ln π*(b|x)]) (eq. 3).

A world is a target π*, a reference π₀ and a behaviour μ over the same responses; many worlds are drawn and fitted at
once. Pairs come as COUNTS, by multinomial and binomial draws, so that ten million cost what a thousand do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distalign.lab.exact import asymptotic_constant, table_features
from distalign.methods.preference import preference_logit


@dataclass(frozen=True)
class Tables:
    """Worlds whose responses are single tokens: log-probabilities in nats, and the sharpness of their preferences."""

    target: Float[Tensor, "worlds contexts responses"]
    reference: Float[Tensor, "worlds contexts responses"]
    behavior: Float[Tensor, "worlds contexts responses"]
    gamma: float

    @property
    def pairs(self) -> Int[Tensor, "2 pairs"]:
        """Every unordered pair of different responses: row 0 the first, row 1 the second."""
        responses = self.target.shape[-1]
        return torch.triu_indices(responses, responses, 1)

    def constant(self) -> Float[Tensor, "worlds"]:
        """C = lim n · KL where the policy is the full table, in nats (`asymptotic_constant`)."""
        features = table_features(*self.target.shape[1:])
        return asymptotic_constant(self.target, self.behavior, features, gamma=self.gamma)

    def pair_logps(self, logps: Float[Tensor, "*batch contexts responses"]) -> Float[Tensor, "*batch contexts pairs 2"]:
        """The log-probabilities of both responses of every pair."""
        return logps[..., self.pairs.T]

    def pair_weights(
        self, source: Float[Tensor, "worlds contexts responses"]
    ) -> Float[Tensor, "worlds contexts pairs"]:
        """Probability that two independent draws from `source`, in a random context, are that pair, in any order."""
        both = self.pair_logps(source.exp())
        return 2 * both.prod(-1) / source.shape[-2]


@dataclass(frozen=True)
class Counts:
    """Labelled pairs: how often each pair was compared, and how often its first response won."""

    total: Float[Tensor, "worlds contexts pairs"]
    wins: Float[Tensor, "worlds contexts pairs"]

    @property
    def frequency(self) -> Float[Tensor, "worlds contexts pairs"]:
        """How often the first response won, 1/2 where the pair was never compared."""
        return torch.where(self.total > 0, self.wins / self.total.clamp(min=1), 0.5)

    def split(self, held_out: float, seed: int) -> tuple[Counts, Counts]:
        """(the rest, held out): each comparison is held out with that probability."""
        random = np.random.default_rng([seed, 2, int(self.total.sum())])
        losses = self.total - self.wins
        wins = _tensor(random.binomial(self.wins.numpy().astype(np.int64), held_out))
        total = wins + _tensor(random.binomial(losses.numpy().astype(np.int64), held_out))
        return Counts(self.total - total, self.wins - wins), Counts(total, wins)


def random_tables(
    worlds: int, contexts: int, responses: int, *, scale: float, gamma: float, seed: int, skew: float = 0.0
) -> Tables:
    """Worlds whose logits of π* and π₀ are independent N(0, scale²); the behaviour μ ∝ π*^(−skew).

    Source: arXiv 2506.01523v2, appendix D.1 (scale 0.1, 10 contexts, 10 responses, γ 0.5, μ uniform).
    """
    random = torch.Generator().manual_seed(seed)
    shape = (worlds, contexts, responses)
    target, reference = (
        (scale * torch.randn(shape, generator=random, dtype=torch.float64)).log_softmax(-1) for _ in range(2)
    )
    return Tables(target, reference, (-skew * target).log_softmax(-1), gamma)


def linear_tables(
    shape: tuple[int, int, int, int],
    *,
    relevant: int,
    scale: float,
    gamma: float,
    seed: int,
    skew: float = 0.0,
) -> tuple[Tables, Float[Tensor, "worlds contexts responses features"]]:
    """Log-linear worlds and their features φ ~ N(0, 1): ln π* = φ·w* + constant, one w* for all contexts.

    `shape`: worlds, contexts, responses, features.
    Only the first `relevant` weights of w* differ from zero; they are scaled so that the logits have the standard
    deviation `scale`. π₀ is uniform and μ ∝ π*^(−skew).
    """
    random = torch.Generator().manual_seed(seed)
    phi = torch.randn(shape, generator=random, dtype=torch.float64)
    weights = torch.randn((len(phi), 1, relevant, 1), generator=random, dtype=torch.float64)
    weights = scale * weights / weights.norm(dim=-2, keepdim=True)
    target = (phi[..., :relevant] @ weights)[..., 0].log_softmax(-1)
    uniform = torch.zeros_like(target).log_softmax(-1)
    return Tables(target, uniform, (-skew * target).log_softmax(-1), gamma), phi


def draw(tables: Tables, n: int, seed: int, *, stream: int = 0) -> Counts:
    """n labelled pairs in every world: x uniform, a and b from μ, the label from P_{π*}. Pairs with a = b are wasted.

    The numbers depend on `seed`, `stream` and `n` alone: a longer list of n changes none of them, and another stream is
    an independent draw.

    Source: arXiv 2506.01523v2, eq. 2, 3.
    """
    random = np.random.default_rng([seed, stream, n])
    weights = tables.pair_weights(tables.behavior)
    flat = weights.flatten(1).numpy()
    categories = np.concatenate([flat, np.clip(1 - flat.sum(1, keepdims=True), 0, None)], 1)
    total = random.multinomial(n, categories / categories.sum(1, keepdims=True))[:, :-1].reshape(weights.shape)
    logit = preference_logit(tables.pair_logps(tables.target), gamma=tables.gamma)
    return Counts(_tensor(total), _tensor(random.binomial(total, logit.sigmoid().numpy())))


def _tensor(counts: np.ndarray) -> Tensor:
    return torch.from_numpy(counts.astype(np.float64))
