"""Every response over a small vocabulary as the leaves of one tree, so that a policy is a table of next-token scores.

Token 0 is end-of-sequence. A response ends with it or is cut at `length` tokens. A NODE is a prefix that goes on: there
1 + (V−1) + … + (V−1)^(T−1) of them, in order of length, the empty prefix first. Whatever scores every next token at
every node, [..., prompts, nodes, vocabulary], scores every response by the sum along its path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Positions(NamedTuple):
    """What a causal network reads: at each position its token, how many came before, and where they are.

    `ancestors` holds the positions of the prefixes from the empty one to this one, this one included, then zeros.
    """

    tokens: Int[Tensor, "positions"]
    depths: Int[Tensor, "positions"]
    ancestors: Int[Tensor, "positions depth"]


@dataclass(frozen=True)
class Tree:
    """All responses of at most `length` tokens over `vocabulary` tokens: those that ended, in the order of their
    prefixes, then those that were cut.
    """

    vocabulary: int
    length: int

    @cached_property
    def prefixes(self) -> list[tuple[int, ...]]:
        """The nodes as tuples of tokens."""
        words = range(1, self.vocabulary)
        return [prefix for size in range(self.length) for prefix in product(words, repeat=size)]

    @cached_property
    def responses(self) -> list[tuple[int, ...]]:
        """The responses as tuples of tokens, end-of-sequence included where there is one."""
        last = [prefix for prefix in self.prefixes if len(prefix) == self.length - 1]
        ended = [(*prefix, 0) for prefix in self.prefixes]
        return ended + [(*prefix, word) for prefix in last for word in range(1, self.vocabulary)]

    @cached_property
    def nodes(self) -> Int[Tensor, "responses length"]:
        """The node at which each token of each response is chosen; 0 after its end."""
        number = {prefix: index for index, prefix in enumerate(self.prefixes)}
        return _padded([[number[r[:t]] for t in range(len(r))] for r in self.responses])

    @cached_property
    def tokens(self) -> Int[Tensor, "responses length"]:
        """The tokens of each response; 0 after its end."""
        return _padded(self.responses)

    @cached_property
    def mask(self) -> Bool[Tensor, "responses length"]:
        """True on the tokens of each response, end-of-sequence included."""
        return _padded([[1] * len(r) for r in self.responses]).bool()

    @cached_property
    def paths(self) -> Int[Tensor, "responses length"]:
        """Where the score of each token of each response is in a flattened [nodes · vocabulary]; 0 after its end."""
        return self.nodes * self.vocabulary + self.tokens

    @cached_property
    def inner(self) -> Positions:
        """The nodes, for a network that scores next tokens."""
        return self._positions(self.prefixes)

    @cached_property
    def whole(self) -> Positions:
        """The nodes, then the responses, for a network that reads whole responses."""
        return self._positions(self.prefixes + self.responses)

    def path_sums(self, scores: Float[Tensor, "*batch nodes vocabulary"]) -> Float[Tensor, "*batch responses"]:
        """Sum of the scores along the path of every response: with ln π(token|prefix) it is ln π(response)."""
        ended, start = [], 0
        so_far = scores.new_zeros((*scores.shape[:-2], 1))
        for level in range(self.length):
            size = (self.vocabulary - 1) ** level
            reached = scores[..., start : start + size, :] + so_far[..., None]
            ended.append(reached[..., 0])
            so_far = reached[..., 1:].flatten(-2)
            start += size
        return torch.cat([*ended, so_far], -1)

    def draw(
        self, logps: Float[Tensor, "*batch nodes vocabulary"], uniform: Float[Tensor, "*batch samples length"]
    ) -> Int[Tensor, "*batch samples"]:
        """Responses drawn token by token from next-token log-probabilities; `uniform` is a number in [0, 1) a token."""
        cumulative = logps.detach().exp().cumsum(-1)[..., :-1]  # a number above all of these draws the last token
        drawn = node = torch.zeros(uniform.shape[:-1], dtype=torch.long)
        going = torch.ones_like(node, dtype=torch.bool)
        for step in range(self.length):
            rows = node[..., None].expand(*node.shape, cumulative.shape[-1])
            token = (uniform[..., step, None] >= cumulative.gather(-2, rows)).sum(-1)
            after = self._following[node, token]
            drawn = torch.where(going, after, drawn)
            going = going & (after < 0)
            node = torch.where(going, -after, 0)
        return drawn

    @cached_property
    def _following(self) -> Int[Tensor, "nodes vocabulary"]:
        """What a token leads to: the number of a finished response, or minus the number of the next node."""
        number = {prefix: -index for index, prefix in enumerate(self.prefixes)}
        number |= {response: index for index, response in enumerate(self.responses)}
        return torch.tensor([[number[(*p, token)] for token in range(self.vocabulary)] for p in self.prefixes])

    def _positions(self, sequences: list[tuple[int, ...]]) -> Positions:
        number = {sequence: index for index, sequence in enumerate(sequences)}
        ancestors = [[number[s[:t]] for t in range(len(s) + 1)] for s in sequences]
        tokens = torch.tensor([s[-1] if s else 0 for s in sequences])
        return Positions(tokens, torch.tensor([len(s) for s in sequences]), _padded(ancestors))


def _padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "rows longest"]:
    """The rows as one tensor, zeros after their ends."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
