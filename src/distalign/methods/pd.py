"""PD, preference distillation (arXiv 2506.01523v2, eq. 9-12): fit the soft labels that a reward gives to pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from distalign.methods.base import Method, Needs, Pairs, Samples, check_choice, check_setting
from distalign.methods.estimators import kl_full, penalised_rewards
from distalign.methods.preference import bernoulli_kl, induced_reward, preference_logit


def pd_loss(
    logps: Float[Tensor, "pairs 2"], probability: Float[Tensor, "pairs"], *, gamma: float
) -> Float[Tensor, "pairs"]:
    """Divergence of the policy's preference model from an expected preference, in nats.

        KL( Bern(p̃) ‖ Bern( σ( γ [ln π(a|x) − ln π(b|x)] ) ) )

    `probability` p̃ = σ(R̂(x,a) − R̂(x,b)) is a constant. At p̃ = 1 this is `pmle_loss`. Raises ValueError if gamma ≤ 0.
    Source: arXiv 2506.01523v2, eq. 11.
    """
    return bernoulli_kl(probability.detach(), preference_logit(logps, gamma=gamma))


@dataclass(frozen=True)
class PD(Method):
    """PD with the paper's TL;DR settings: sharpness `gamma`, KL weight `beta` (0 with the data's pairs alone: offline).

    `pairs`: the policy's of each round (algorithm 1), the reference's, drawn once (theorem 14), the data's (theorem 6).
    `kl_in`: the KL is in the "loss" (eq. 12), or as REBEL's in the "reward" of the policy's pairs, R̂ − β ln π_t/π₀.
    """

    gamma: float = 0.1
    beta: float = None  # pyright: ignore[reportAssignmentType] 0.05, with the data's pairs 0
    pairs: Literal["policy", "data", "reference", "data+reference", "data+policy", "reference+policy"] = "policy"
    kl_in: Literal["loss", "reward"] = "loss"

    equation: ClassVar[str] = "KL(Bern(σ(ΔR̂)) ‖ Bern(σ(γ Δ ln π))) + β KL(π‖π₀)"
    source: ClassVar[str] = "arXiv 2506.01523v2, eq. 9-12"
    optimum: ClassVar[str] = "π* at β = 0, else between π* and π₀"
    theorem: ClassVar[str | None] = "theorems 6 and 14"

    def __post_init__(self) -> None:
        if self.beta is None:
            object.__setattr__(self, "beta", 0.0 if self.pairs == "data" else 0.05)
        check_setting(self, "gamma")
        check_setting(self, "beta", zero=True)
        check_choice(self, "pairs")
        check_choice(self, "kl_in", ("loss", "reward") if self.pairs == "policy" else ("loss",))

    @property
    def needs(self) -> Needs:
        """Scored pairs; with β > 0 also samples and their KL to the reference, as `kl_in` says."""
        pairs = self.pairs.replace("data", "labelled").replace("policy", "sampled")
        kl = self.beta > 0 and self.kl_in == "loss"
        return Needs(pairs=pairs, samples=kl, reward=True, reference=self.beta > 0 and not kl, kl=kl)

    def loss(self, pairs: Pairs, samples: Samples) -> Float[Tensor, ""]:
        """Mean distillation loss of the pairs plus β times the mean KL(π ‖ π₀) of the samples, in nats."""
        a, b = penalised_rewards(pairs, beta=0.0 if self.kl_in == "loss" else self.beta).unbind(1)
        loss = pd_loss(pairs.logps, (a - b).sigmoid(), gamma=self.gamma).mean()
        return loss + self.beta * kl_full(samples).mean() if self.needs.kl else loss

    def implicit_reward(
        self, logps: Float[Tensor, "*shape"], reference_logps: Float[Tensor, "*shape"] | None
    ) -> Float[Tensor, "*shape"]:
        """γ ln π(a|x), in nats (eq. 8): the preference model is the language model, whatever the reference."""
        return induced_reward(logps, gamma=self.gamma)
