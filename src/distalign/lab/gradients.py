"""Mean and variance of a gradient estimator, exactly: every draw of a group of responses, weighted by its probability.

A world is one prompt whose policy is a table of next-token logits over the tree of all responses. Every group of K
responses has its own copy of the table, so that one backward pass gives the gradients of all groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distalign.lab.exact import divergence, entropy, optimum
from distalign.lab.tree import Tree
from distalign.methods.base import Samples

Logits = Float[Tensor, "nodes vocabulary"]


class Gradient(NamedTuple):
    """What an estimator's gradient is: its expectation, and E|ĝ − E ĝ|² of one response, in nats²."""

    mean: Float[Tensor, "parameters"]
    variance: float


@dataclass(frozen=True)
class World:
    """One prompt: the policies as next-token logits, the rewards of all responses, the weights of RKL's objective.

    `policy` draws and is trained, `behavior` is an earlier policy whose responses may be reused.
    """

    tree: Tree
    policy: Logits
    reference: Logits
    behavior: Logits
    rewards: Float[Tensor, "responses"]
    gamma: float
    beta: float

    def logps(self, logits: Logits) -> Float[Tensor, "responses"]:
        """ln π of every response under next-token logits."""
        return self.tree.path_sums(logits.log_softmax(-1))

    def kl(self, logps: Float[Tensor, "responses"]) -> Float[Tensor, ""]:
        """KL(π ‖ π₀)."""
        return divergence(logps[None], self.logps(self.reference)[None])

    def entropy(self, logps: Float[Tensor, "responses"]) -> Float[Tensor, ""]:
        """H(π)."""
        return entropy(logps[None])

    def reward(self, logps: Float[Tensor, "responses"]) -> Float[Tensor, ""]:
        """E[R]."""
        return (logps.exp() * self.rewards).sum()

    def objective(self, logps: Float[Tensor, "responses"]) -> Float[Tensor, ""]:
        """−E[R] − γ H(π) + β KL(π ‖ π₀), which RKL minimises (eq. 14)."""
        return -self.reward(logps) - self.gamma * self.entropy(logps) + self.beta * self.kl(logps)

    def optimum(self) -> Logits:
        """The policy that minimises the objective (appendix B), as next-token logits."""
        logps = optimum(self.rewards[None], self.logps(self.reference)[None], gamma=self.gamma, beta=self.beta)[0]
        mask = self.tree.mask
        mass = logps.exp()[:, None].expand(mask.shape)[mask]
        through = torch.zeros(self.policy.numel(), dtype=mass.dtype).index_add(0, self.tree.paths[mask], mass)
        return through.log().view_as(self.policy)

    def exact_gradient(self, expectation: Callable[[Tensor], Tensor]) -> Float[Tensor, "parameters"]:
        """Derivative of an expectation, given ln π of all responses, in the policy's logits."""
        logits = self.policy.clone().requires_grad_()
        return torch.autograd.grad(expectation(self.logps(logits)), logits)[0].flatten()

    def gradient(self, surrogate: Callable[[Samples], Tensor], *, size: int, stale: bool = False) -> Gradient:
        """Mean and variance of the gradient of a group's mean surrogate, over all groups of `size` responses.

        The variance is `size` times that of the mean, so that groups of different sizes compare. Groups of one have no
        baseline. `stale`: `behavior` drew the responses.
        """
        count = len(self.rewards)
        rows = torch.cartesian_prod(*[torch.arange(count)] * size).view(-1, size)
        copies = self.policy.expand(len(rows), *self.policy.shape).clone().requires_grad_()
        surrogates = surrogate(self._samples(copies, rows, stale=stale)).view(rows.shape).mean(1)
        gradients = torch.autograd.grad(surrogates.sum(), copies)[0].flatten(1)
        weights = self.logps(self.behavior if stale else self.policy)[rows].sum(1).exp()
        mean = weights @ gradients
        return Gradient(mean, size * float(weights @ (gradients - mean).square().sum(1)))

    def variance(self, surrogate: Callable[[Samples], Tensor], sizes: list[float]) -> list[float]:
        """Variance of one response with a leave-one-out baseline, for groups of these sizes, ∞ among them if wanted.

            A + B / (K − 1)

        exactly, because the group's mean gradient is a U-statistic of degree two; A and B from all groups of two and
        of three. Holds for surrogates that are linear in their baseline, as all of `distalign.methods.estimators` are.
        """
        two, three = (self.gradient(surrogate, size=size).variance for size in (2, 3))
        return [2 * three - two + 2 * (two - three) / (size - 1) for size in sizes]

    def _samples(
        self,
        copies: Float[Tensor, "groups nodes vocabulary"],
        rows: Int[Tensor, "groups size"],
        *,
        stale: bool,
    ) -> Samples:
        """The groups' responses as a method sees them, each under its group's own copy of the policy."""
        size = rows.shape[1]
        group = torch.arange(len(rows)).repeat_interleave(size)
        rows = rows.flatten()
        nodes, tokens = self.tree.nodes[rows], self.tree.tokens[rows]
        log_p, log_q = copies.log_softmax(-1), self.reference.log_softmax(-1)
        at = group[:, None], nodes
        token_logps = log_p[(*at, tokens)]
        return Samples(
            token_logps=token_logps,
            mask=self.tree.mask[rows],
            behavior_token_logps=self.behavior.log_softmax(-1)[nodes, tokens] if stale else token_logps.detach(),
            reference_token_logps=log_q[nodes, tokens],
            step_kl=(log_p.exp() * (log_p - log_q)).sum(-1)[at],
            step_entropy=-(log_p.exp() * log_p).sum(-1)[at],
            rewards=self.rewards[rows],
            group=group,
        )
