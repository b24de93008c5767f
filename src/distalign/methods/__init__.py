"""The six objectives, in the paper's order: three of arXiv 2506.01523, then the three they are compared with.

A method is one file: a pure function of tensors, then a frozen dataclass with the defaults that says what it needs. A
seventh method is one more file and one more line here.
"""

from __future__ import annotations

from distalign.methods.base import Method, Needs, Pairs, Samples
from distalign.methods.dpo import DPO
from distalign.methods.pd import PD
from distalign.methods.pmle import PMLE
from distalign.methods.rebel import REBEL
from distalign.methods.rkl import RKL
from distalign.methods.rlhf import RLHF

__all__ = [
    "DPO",
    "METHODS",
    "PD",
    "PMLE",
    "REBEL",
    "RKL",
    "RLHF",
    "Method",
    "Needs",
    "Pairs",
    "Samples",
]

METHODS: dict[str, type[Method]] = {
    "pmle": PMLE,
    "pd": PD,
    "rkl": RKL,
    "dpo": DPO,
    "rebel": REBEL,
    "rlhf": RLHF,
}
