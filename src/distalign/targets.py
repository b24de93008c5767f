"""Known targets: language models π* that can be sampled and scored exactly, so the distance to them can be measured.

A target is a causal language model made from another one; everything that takes a model takes it. `Tilt` adds a bonus
to the logits of some tokens at every step. A plug-in needs one method, `model(base, tokenizer, strength)`: strength 1
is the target, 0 the base, and values between and beyond are weaker and stronger versions to draw responses from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distalign.data import end_token_id
from distalign.engine import Group, score_in_batches
from distalign.policy import share
from distalign.preference import preference_logit


class Target(Protocol):
    """A family of language models on top of a base model, from the base itself (strength 0) to the target (1)."""

    def model(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, strength: float = 1.0) -> PreTrainedModel:
        """The language model of that strength; `base` stays as it is."""
        ...


@dataclass(frozen=True)
class Tilt:
    """π*(y_t | s_t) ∝ π₀(y_t | s_t) exp(bonus(y_t)): a bonus in nats on some words, at every step.

    `words` are strings; every way to write one as a single token counts (with a space before it, capitalised).
    `end_bonus` is that of the token which ends a response. Raises ValueError for words that are no single token.
    """

    words: tuple[str, ...] = field()
    bonus: float = 4.0
    end_bonus: float = 0.0

    def bias(self, tokenizer: Any, vocabulary: int) -> Float[Tensor, "vocabulary"]:
        """The bonus of every token, in nats."""
        bias = torch.zeros(vocabulary)
        for word in self.words:
            ids = _token_ids(tokenizer, word)
            if not ids:
                raise ValueError(f'target: "{word}" is no single token of this tokenizer; take a more common word')
            bias[ids] = self.bonus
        bias[end_token_id(tokenizer, conversational=bool(tokenizer.chat_template))] += self.end_bonus
        return bias

    def model(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, strength: float = 1.0) -> PreTrainedModel:
        """The base with a bias on its language-model head. Shares every weight of `base`: keep those frozen."""
        return with_logit_bias(base, strength * self.bias(tokenizer, base.get_output_embeddings().weight.shape[0]))


def _token_ids(tokenizer: Any, word: str) -> list[int]:
    spellings = {word, word.capitalize(), f" {word}", f" {word.capitalize()}"}
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in spellings]
    return sorted({ids[0] for ids in encoded if len(ids) == 1})


def with_logit_bias(model: PreTrainedModel, bias: Float[Tensor, "vocabulary"]) -> PreTrainedModel:
    """A model that shares the weights of `model` and adds `bias` (nats) to its logits at every step.

    Raises ValueError if the head is no linear layer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"target: the head is a {type(head).__name__}; a bias needs a linear layer")
    tilted = share(model)
    biased = nn.Linear(head.in_features, head.out_features, device="meta")
    biased.weight = head.weight
    start = torch.zeros_like(bias) if head.bias is None else head.bias.detach().cpu()
    total = (start + bias).to(head.weight.device, head.weight.dtype)
    biased.bias = nn.Parameter(total, requires_grad=False)
    tilted.set_output_embeddings(biased)
    return tilted.eval()


def target_logits(
    model: PreTrainedModel, groups: Sequence[Group], *, gamma: float, token_budget: int, progress: Any = None
) -> Float[Tensor, "groups"]:
    """γ[ln π*(first) − ln π*(second)] of groups of two responses, in nats (eq. 3): P_{π*} is σ of it."""
    logps = score_in_batches(model, groups, token_budget=token_budget, progress=progress).logps
    return preference_logit(logps.view(-1, 2), gamma=gamma)
