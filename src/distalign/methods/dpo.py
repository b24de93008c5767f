"""DPO, direct preference optimisation (arXiv 2305.18290, eq. 7): fit the policy's log-ratio to the labels.

PMLE with the reference inside the sigmoid instead of a KL term outside it. What DPO's paper calls beta (their beta) is
`gamma` here: it multiplies the log-probability gap, as in PMLE and PD, and weighs no divergence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from distalign.methods.base import Method, Needs, Pairs, Samples, check_setting, require_reference
from distalign.methods.preference import preference_logit, preference_nll


def dpo_loss(
    logps: Float[Tensor, "pairs 2"],
    reference_logps: Float[Tensor, "pairs 2"],
    probability: Float[Tensor, "pairs"],
    *,
    gamma: float,
) -> Float[Tensor, "pairs"]:
    """Negative log-likelihood of a labelled pair under the policy's log-ratio to the reference, in nats.

        −ln σ( γ [ln π(a⁺|x)/π₀(a⁺|x) − ln π(a⁻|x)/π₀(a⁻|x)] )

    Column 0 is the preferred response; `probability` is the probability of that label (1: certain). `gamma` is their
    beta. No gradient enters `reference_logps`. Raises ValueError if gamma ≤ 0.

    Source: arXiv 2305.18290, eq. 7.
    """
    return preference_nll(preference_logit(logps - reference_logps.detach(), gamma=gamma), probability)


@dataclass(frozen=True)
class DPO(Method):
    """DPO with the paper's TL;DR setting: `gamma` (their beta)."""

    gamma: float = 0.05

    equation: ClassVar[str] = "−ln σ(γ Δ ln π/π₀)"
    source: ClassVar[str] = "arXiv 2305.18290, eq. 7"
    optimum: ClassVar[str] = "π₀ π*"

    def __post_init__(self) -> None:
        check_setting(self, "gamma")

    @property
    def needs(self) -> Needs:
        """Labelled pairs and the reference."""
        return Needs(pairs="labelled", reference=True)

    def loss(self, pairs: Pairs, samples: Samples) -> Float[Tensor, ""]:
        """Mean likelihood loss of the pairs, in nats."""
        return dpo_loss(pairs.logps, pairs.reference_logps, pairs.probability, gamma=self.gamma).mean()

    def implicit_reward(
        self, logps: Float[Tensor, "*shape"], reference_logps: Float[Tensor, "*shape"] | None
    ) -> Float[Tensor, "*shape"]:
        """γ ln π(a|x)/π₀(a|x), in nats: DPO's implicit reward."""
        return self.gamma * (logps - require_reference(reference_logps))
