"""A tiny autoregressive policy whose responses can all be listed, so that every expectation is a finite sum."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import torch

from distalign.methods import Pairs, Samples

EOS = 0


@dataclass
class Enumeration:
    """Every response of at most `length` tokens over `vocabulary` tokens, 0 being end-of-sequence.

    A response ends with end-of-sequence or at `length`. The logits of the next token are free for every prefix, so the
    parameters are one table [prefixes, vocabulary] and the policy can be any distribution over the responses.
    """

    vocabulary: int
    length: int
    responses: list[tuple[int, ...]] = field(init=False)
    tokens: torch.Tensor = field(init=False)
    mask: torch.Tensor = field(init=False)
    prefix: torch.Tensor = field(init=False)

    def __post_init__(self):
        number = {(): 0}
        for size in range(1, self.length):
            for words in product(range(1, self.vocabulary), repeat=size):
                number[words] = len(number)
        self.prefixes = len(number)
        ended = [(*p, EOS) for p in number]
        cut = [(*p, w) for p in number if len(p) == self.length - 1 for w in range(1, self.vocabulary)]
        self.responses = ended + cut
        rows = [(*r, *[EOS] * (self.length - len(r))) for r in self.responses]
        self.tokens = torch.tensor(rows)
        self.mask = torch.tensor([[t < len(r) for t in range(self.length)] for r in self.responses])
        self.prefix = torch.tensor(
            [[number[r[:t]] if t < len(r) else 0 for t in range(self.length)] for r in self.responses]
        )

    def parameters(self, seed: int, scale: float = 1.0) -> torch.Tensor:
        """Random logits [prefixes, vocabulary] in float64, ready for a gradient."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.prefixes, self.vocabulary)
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    def token_logps(self, parameters: torch.Tensor) -> torch.Tensor:
        """Log-probability of each token, [responses, length], NaN after the end: whoever reads there is found out."""
        logps = parameters.log_softmax(-1)[self.prefix, self.tokens]
        return torch.where(self.mask, logps, torch.nan)

    def logps(self, parameters: torch.Tensor) -> torch.Tensor:
        """Log-probability of each response, [responses]."""
        return (parameters.log_softmax(-1)[self.prefix, self.tokens] * self.mask).sum(-1)

    def step_kl(self, parameters: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """KL between the next-token distributions at each step, [responses, length], NaN after the end."""
        log_p, log_q = parameters.log_softmax(-1), reference.log_softmax(-1)
        return torch.where(self.mask, (log_p.exp() * (log_p - log_q)).sum(-1)[self.prefix], torch.nan)

    def step_entropy(self, parameters: torch.Tensor) -> torch.Tensor:
        """Entropy of the next-token distribution at each step, [responses, length], NaN after the end."""
        log_p = parameters.log_softmax(-1)
        return torch.where(self.mask, -(log_p.exp() * log_p).sum(-1)[self.prefix], torch.nan)

    def kl(self, parameters: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Exact KL(π ‖ π₀) over responses, differentiable through the probabilities."""
        logps = self.logps(parameters)
        return (logps.exp() * (logps - self.logps(reference))).sum()

    def entropy(self, parameters: torch.Tensor) -> torch.Tensor:
        """Exact entropy over responses, differentiable through the probabilities."""
        logps = self.logps(parameters)
        return -(logps.exp() * logps).sum()

    def reward(self, parameters: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        """Exact expected reward, differentiable through the probabilities."""
        return (self.logps(parameters).exp() * rewards).sum()

    def groups_of_two(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Every ordered draw of two responses to one prompt: row numbers [2 N²] and the group that each row is in."""
        n = len(self.responses)
        rows = torch.cartesian_prod(torch.arange(n), torch.arange(n)).reshape(-1)
        return rows, torch.arange(n * n).repeat_interleave(2)

    def group_weights(self, parameters: torch.Tensor) -> torch.Tensor:
        """Probability of each draw of `groups_of_two`, halved and repeated for its two rows, [2 N²]; a constant."""
        p = self.logps(parameters).exp().detach()
        return (torch.outer(p, p).reshape(-1) / 2).repeat_interleave(2)

    def samples(self, parameters, reference, rewards, rows, group, behavior=None) -> Samples:
        """The responses `rows` as a method sees them, every field filled; `behavior` drew them (None: the policy).

        Without a group no row has a baseline.
        """
        n = len(self.responses)
        advantages = torch.linspace(-1, 1, n * self.length, dtype=torch.float64).view(n, self.length).sin()
        behavior = parameters if behavior is None else behavior
        group = torch.arange(len(rows)) if group is None else group
        return Samples(
            token_logps=self.token_logps(parameters)[rows],
            mask=self.mask[rows],
            behavior_token_logps=self.token_logps(behavior.detach())[rows],
            reference_token_logps=self.token_logps(reference.detach())[rows],
            step_kl=self.step_kl(parameters, reference.detach())[rows],
            step_entropy=self.step_entropy(parameters)[rows],
            rewards=rewards[rows],
            group=group,
            values=torch.where(self.mask, parameters.sum(-1)[self.prefix], torch.nan)[rows],
            advantages=advantages[rows],
            returns=2 * advantages[rows],
        )

    def pairs(self, parameters, reference, rewards, rows, probability=None) -> Pairs:
        """The pairs of responses `rows` [pairs, 2] as a method sees them, all fields filled but `probability`."""
        return Pairs(
            logps=self.logps(parameters)[rows],
            reference_logps=self.logps(reference.detach())[rows],
            behavior_logps=self.logps(parameters.detach() + 0.3 * reference.detach())[rows],
            rewards=rewards[rows],
            probability=probability,
        )


def gradient(value: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Derivative of a scalar in the parameters, keeping the graph for the next question."""
    return torch.autograd.grad(value, parameters, retain_graph=True)[0]
