"""A reward model trained on pairs: γ ln π₀ plus a correction (init: policy), or a score head alone (init: scratch).

    policy    R(x, a) = γ ln π₀(a|x) + f(x, a),   f learned, starting at exactly zero
    scratch   R(x, a) = f(x, a),                  the usual sequence-classification model

It reads the POLICY's token ids, so nothing is decoded, rendered or cut on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distalign.engine import Group, micro_batches, score_in_batches
from distalign.engine.forward import evaluating
from distalign.engine.scoring import read
from distalign.methods.preference import induced_reward
from distalign.rewards.base import Request, constants
from distalign.rewards.heads import Head


class TrainedReward:
    """R of the module's docstring. `trunk` is what the head reads: `base` itself when the backbone is frozen.

    `gamma` is None for init: scratch, which has no use for ln π₀.
    """

    def __init__(self, base: Any, trunk: Any, head: Head, *, gamma: float | None, token_budget: int) -> None:
        self.base, self.trunk, self.gamma, self.token_budget = base, trunk, gamma, token_budget
        self.head = head.to(base.get_input_embeddings().weight.device)
        self.responses = 0

    @property
    def frozen(self) -> bool:
        """Whether only the head is learned, so that one pass of the base serves everything."""
        return self.trunk is self.base

    def __call__(self, requests: Sequence[Request]) -> Float[Tensor, "responses"]:
        """Rewards in nats."""
        offset, features = self.encode([request.group for request in requests])
        with torch.no_grad():
            values = offset + self.head(features).cpu().double()
        self.responses += len(values)
        return constants(values, "trained")

    def facts(self) -> dict[str, float]:
        """Responses rewarded; none is ever cut."""
        return {"responses": float(self.responses)}

    def trained(self) -> dict[str, nn.Parameter]:
        """The trunk's parameters that training changes, by name; the head's own are `head.weight`."""
        if self.frozen:
            return {}
        return {f"trunk.{name}": p for name, p in self.trunk.named_parameters() if p.requires_grad}

    def features(self, groups: Sequence[Group]) -> Float[Tensor, "responses width"]:
        """The head's features of the responses, with gradient where the trunk has one."""
        return self.head.features(read(self.trunk, groups), self.trunk.get_input_embeddings().weight)

    @torch.no_grad()
    def encode(
        self, groups: Sequence[Group], advance: Callable[..., None] | None = None
    ) -> tuple[Float[Tensor, "responses"], Float[Tensor, "responses width"]]:
        """γ ln π₀ (0 without γ; nats, on the CPU) and features of all responses, in micro-batches without gradient.

        `advance(done)` counts groups.
        """
        starts = torch.tensor([0, *(len(group.responses) for group in groups)]).cumsum(0).tolist()
        offset = torch.zeros(starts[-1], dtype=torch.float64)
        features = self.head.weight.new_zeros(starts[-1], len(self.head.weight))
        together, done = self.gamma is not None and self.frozen, 0
        for batch in micro_batches(groups, self.token_budget):
            rows = torch.tensor([row for i in batch for row in range(starts[i], starts[i + 1])])
            with evaluating(self.trunk):
                reading = read(self.trunk, [groups[i] for i in batch], logps=together)
            embeddings = self.trunk.get_input_embeddings().weight
            features[rows.to(features.device)] = self.head.features(reading, embeddings)
            if reading.logps is not None:
                offset[rows] = reading.logps.cpu().double()
            done += len(batch)
            if advance is not None:
                advance(done)
        if self.gamma is None:
            return offset, features
        if not self.frozen:
            offset = score_in_batches(self.base, groups, token_budget=self.token_budget).logps.cpu().double()
        return induced_reward(offset, gamma=self.gamma), features
