"""PMLE, preference maximum likelihood (arXiv 2506.01523v2, eq. 4, 5): fit the policy's preference model to labels.

No reward model and no reinforcement learning. It differs from DPO in two ways: no reference inside the sigmoid, and
an explicit KL(π ‖ π₀), over the policy's own responses, outside it. At β = 0 it is fully offline and has no reference
at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from distalign.methods.base import Method, Needs, Pairs, Samples, check_setting
from distalign.methods.estimators import kl_full
from distalign.methods.preference import induced_reward, preference_logit, preference_nll


def pmle_loss(
    logps: Float[Tensor, "pairs 2"], probability: Float[Tensor, "pairs"], *, gamma: float
) -> Float[Tensor, "pairs"]:
    """Negative log-likelihood of a labelled pair under the policy's preference model, in nats.

        −ln σ( γ [ln π(a⁺|x) − ln π(a⁻|x)] )

    Column 0 of `logps` is the preferred response; `probability` is the probability of that label (1: certain), and
    then the loss is the cross-entropy. The KL term of eq. 5 is `estimators.kl_full`. Raises ValueError if gamma ≤ 0.

    Source: arXiv 2506.01523v2, eq. 4.
    """
    return preference_nll(preference_logit(logps, gamma=gamma), probability)


@dataclass(frozen=True)
class PMLE(Method):
    """PMLE with the paper's TL;DR settings: sharpness `gamma`, KL weight `beta` (its chat settings: 5e-3 and 0)."""

    gamma: float = 1e-2
    beta: float = 1e-5

    equation: ClassVar[str] = "−ln σ(γ Δ ln π) + β KL(π‖π₀)"
    source: ClassVar[str] = "arXiv 2506.01523v2, eq. 4, 5"
    optimum: ClassVar[str] = "π* at β = 0, else between π* and π₀"
    theorem: ClassVar[str | None] = "theorem 4"

    def __post_init__(self) -> None:
        check_setting(self, "gamma")
        check_setting(self, "beta", zero=True)

    @property
    def needs(self) -> Needs:
        """Labelled pairs; with β > 0 also samples, and their full-vocabulary KL to the reference."""
        return Needs(pairs="labelled", samples=self.beta > 0, kl=self.beta > 0)

    def loss(self, pairs: Pairs, samples: Samples) -> Float[Tensor, ""]:
        """Mean likelihood loss of the pairs plus β times the mean KL(π ‖ π₀) of the samples, in nats."""
        loss = pmle_loss(pairs.logps, pairs.probability, gamma=self.gamma).mean()
        return loss + self.beta * kl_full(samples).mean() if self.beta > 0 else loss

    def implicit_reward(
        self, logps: Float[Tensor, "*shape"], reference_logps: Float[Tensor, "*shape"] | None
    ) -> Float[Tensor, "*shape"]:
        """γ ln π(a|x), in nats (eq. 8): the preference model is the language model, whatever the reference."""
        return induced_reward(logps, gamma=self.gamma)
