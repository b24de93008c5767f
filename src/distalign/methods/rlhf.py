"""RLHF: reward maximisation with a KL penalty, which is exactly RKL at γ = 0 (arXiv 2506.01523v2, eq. 14).

Its optimum π₀ exp(R̂/β) is not the target language model for any β: too large a β underfits, too small a one
collapses to a deterministic answer. Kept as the baseline that RKL is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from distalign.methods.rkl import RKL


@dataclass(frozen=True)
class RLHF(RKL):
    """RLHF with the paper's TL;DR setting: KL weight `beta`. At β = 0 it looks for the single best-scoring answer."""

    gamma: float = field(default=0.0, init=False)

    equation: ClassVar[str] = "−E[R̂] + β KL(π‖π₀)"
    source: ClassVar[str] = "arXiv 2203.02155, eq. 2; arXiv 2506.01523v2, eq. 14 at γ = 0"
    optimum: ClassVar[str] = "π₀ exp(R̂/β)"
    theorem: ClassVar[str | None] = None
