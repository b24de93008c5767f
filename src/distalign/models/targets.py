"""Known targets: language models π* that can be sampled and scored exactly, so the distance to them can be measured.

A target is a causal language model made from another one; everything that takes a model takes it. `Tilt` adds a bonus
to the logits of some tokens at every step, `ModelTarget` is a fine-tuned model. A plug-in needs one method,
`model(base, tokenizer, strength)`: strength 1 is the target, 0 the base, and values between and beyond are weaker and
stronger versions to draw responses from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distalign.data import Data, EncodedPair, Prompt, Tokenizer, end_token_id, read_prompts, split_by_prompt
from distalign.engine import Group, score_in_batches
from distalign.engine.packing import FORWARD_BUDGET
from distalign.errors import InputError
from distalign.methods.preference import preference_logit
from distalign.models.load import Source, find_model
from distalign.models.policy import share
from distalign.rollout.sample import sample
from distalign.settings import Count, Positive, Section
from distalign.user_code import load_named

logger = logging.getLogger("distalign.models.targets")

# Settings of models whose logits are not what their head gives.
_AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@runtime_checkable
class Target(Protocol):
    """A family of language models on top of a base model, from the base itself (strength 0) to the target (1)."""

    def model(self, base: PreTrainedModel, tokenizer: Tokenizer, strength: float = 1.0) -> PreTrainedModel:
        """The language model of that strength; `base` stays as it is."""
        ...


_TWO_STRENGTHS = "a model as target has the strengths 0 (the base) and 1 (itself); for others write a class"

# Share of a target's prompts that no training pair answers.
HELD_OUT_PROMPTS = 0.2


# How often a pair is drawn until its responses differ.
DRAWS = 20


class TargetSettings(Section):
    """A known target, which labels pairs that it can also score: one of words, a class of the user's, or a model.

    words: the model with `bonus` nats on the logits of these words. class: `file.py:Class` or `module:Class`, made with
    `settings`. model: a fine-tuned model of the same tokenizer, by folder or hub id; its `strengths` are 0 and 1 alone.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    words: Annotated[list[str], Field(min_length=1)] | None = None
    bonus: float = 4.0
    end_bonus: float = 0.0
    class_: Annotated[str | None, Field(alias="class")] = None
    settings: Annotated[dict[str, Any], Field(default_factory=dict)]
    model: str | None = None
    gamma: Positive = 0.15
    pairs: Count = 256
    eval_pairs: Count = 64
    strengths: Annotated[tuple[float, ...], Field(min_length=1)] = (0.0, 0.5, 1.0, 1.5)
    temperature: Positive = 0.8
    max_new_tokens: Count = 20
    prompts: str | list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _strengths_of_a_model(cls, raw: object) -> object:
        return {"strengths": (0.0, 1.0), **raw} if isinstance(raw, dict) and raw.get("model") else raw

    @model_validator(mode="after")
    def _one_kind(self) -> TargetSettings:
        given = {"words": self.words, "class": self.class_, "model": self.model}
        kinds = [kind for kind, value in given.items() if value]
        if len(kinds) != 1:
            raise ValueError(f"target names {len(kinds)} of words, class and model; give one of them")
        if kinds != ["words"] and (self.bonus, self.end_bonus) != (4.0, 0.0):
            raise ValueError("target.bonus and end_bonus are those of words; leave them out")
        if kinds != ["class"] and self.settings:
            raise ValueError("target.settings are those of a class; leave them out")
        if self.model and not {0.0, 1.0}.issuperset(self.strengths):
            raise ValueError(f"target.strengths is {list(self.strengths)}; {_TWO_STRENGTHS}")
        return self


@dataclass(frozen=True)
class Tilt:
    """π*(y_t | s_t) ∝ π₀(y_t | s_t) exp(bonus(y_t)): a bonus in nats on some words, at every step.

    `words` are strings; every way to write one as a single token counts (with a space before it, capitalised).
    `end_bonus` is that of the token which ends a response. Raises InputError for words that are no single token.
    """

    words: tuple[str, ...]
    bonus: float = 4.0
    end_bonus: float = 0.0

    def bias(self, tokenizer: Tokenizer, vocabulary: int) -> Float[Tensor, "vocabulary"]:
        """The bonus of every token, in nats."""
        bias = torch.zeros(vocabulary)
        for word in self.words:
            ids = _token_ids(tokenizer, word)
            if not ids:
                raise InputError(f'target: "{word}" is no single token of this tokenizer; take a more common word')
            bias[ids] = self.bonus
        bias[end_token_id(tokenizer, conversational=bool(tokenizer.chat_template))] += self.end_bonus
        return bias

    def model(self, base: PreTrainedModel, tokenizer: Tokenizer, strength: float = 1.0) -> PreTrainedModel:
        """The base with a bias on its language-model head. Shares every weight of `base`: keep those frozen."""
        return with_logit_bias(base, strength * self.bias(tokenizer, base.config.get_text_config().vocab_size))


class ModelTarget:
    """A fine-tuned model as π*, loaded when it is first asked for, beside its base and in its precision."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._model: PreTrainedModel | None = None

    def model(self, base: PreTrainedModel, tokenizer: Tokenizer, strength: float = 1.0) -> PreTrainedModel:
        """The model at strength 1, the base at 0. Raises InputError for another strength."""
        if strength not in (0, 1):
            raise InputError(f"target {self.source.name}: strength is {strength}; {_TWO_STRENGTHS}")
        if strength == 0:
            return base
        if self._model is None:
            dtype = str(base.dtype).removeprefix("torch.")
            self._model = self.source.model(dtype, base.device).requires_grad_(False)
        return self._model


@dataclass(frozen=True)
class _UserTarget:
    """The user's own target, under the name of its class; what its model() gives is checked."""

    name: str
    target: Target

    def model(self, base: PreTrainedModel, tokenizer: Tokenizer, strength: float = 1.0) -> PreTrainedModel:
        """The user's model. Raises InputError for one that cannot be compared with the base."""
        try:
            model = self.target.model(base, tokenizer, strength)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"target {self.name}: model(base, tokenizer, strength) raised {type(error).__name__}: {error}; fix it"
            ) from error
        if not isinstance(model, PreTrainedModel):
            raise InputError(
                f"target {self.name}: its model() returned a {type(model).__name__}; return a PreTrainedModel"
            )
        sizes = [each.config.get_text_config().vocab_size for each in (base, model)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"target {self.name}: its model() returned one of {sizes[1]:,} tokens, and the base has {sizes[0]:,}; "
                "a target is compared token by token: return a model of the same tokens"
            )
        return model


def make_target(settings: TargetSettings, source: Source, tokenizer: PreTrainedTokenizerBase) -> Target:
    """The target that the settings name, for a base model. Raises InputError for what can be known without weights."""
    if settings.words:
        return Tilt(tuple(settings.words), settings.bonus, settings.end_bonus)
    if settings.class_ is not None:
        return _user_target(settings.class_, settings.settings)
    tuned = find_model(str(settings.model), trust_remote_code=source.trust_remote_code)
    sizes = [each.config().get_text_config().vocab_size for each in (source, tuned)]
    if tuned.tokenizer().get_vocab() != tokenizer.get_vocab() or sizes[0] != sizes[1]:
        raise InputError(
            f"target {tuned.name}: its tokens are not those of {source.name} ({sizes[1]:,} and {sizes[0]:,}); a target "
            "is compared token by token: take one that was fine-tuned from the model"
        )
    return ModelTarget(tuned)


def _user_target(name: str, settings: dict[str, Any]) -> Target:
    """The user's class that `file.py:Class` or `module:Class` names, made with its settings."""

    def is_target(value: object) -> bool:
        return isinstance(value, type) and callable(getattr(value, "model", None))

    found = load_named(name, "Class", is_target, label=f"target {name}", error=InputError)
    if not is_target(found):
        raise InputError(f"target {name}: it has no method model(base, tokenizer, strength); docs/targets.md shows one")
    try:
        return _UserTarget(name, found(**settings))
    except (TypeError, ValueError) as error:
        raise InputError(f"target {name}: {error}; change target.settings") from error


def _token_ids(tokenizer: Tokenizer, word: str) -> list[int]:
    spellings = {word, word.capitalize(), f" {word}", f" {word.capitalize()}"}
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in spellings]
    return sorted({ids[0] for ids in encoded if len(ids) == 1} - {getattr(tokenizer, "unk_token_id", None)})


def with_logit_bias(model: PreTrainedModel, bias: Float[Tensor, "vocabulary"]) -> PreTrainedModel:
    """A model that shares the weights of `model` and adds `bias` (nats) to its logits at every step.

    Raises InputError if the head is no linear layer, or its outputs are not the logits themselves.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise InputError(f"target: the head is a {type(head).__name__}; a bias needs a linear layer")
    config = model.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1.0) for name in _AFTER_THE_HEAD):
        raise InputError(f"target: {config.model_type} caps or scales its logits after the head; take another model")
    tilted = share(model)
    biased = nn.Linear(head.in_features, head.out_features, device="meta")
    biased.weight = head.weight
    start = torch.zeros_like(bias) if head.bias is None else head.bias.detach().cpu()
    total = (start + bias).to(head.weight.device, head.weight.dtype)
    biased.bias = nn.Parameter(total, requires_grad=False)
    tilted.set_output_embeddings(biased)
    return tilted.eval()


@dataclass(frozen=True)
class TargetPairs:
    """Pairs labelled by a known target, preferred response first, and how surely.

    `logit` is γ[ln π*(chosen) − ln π*(rejected)] and `reference_logps` ln π₀ of both, in nats. `ties` counts draws
    whose two responses came out the same, which were drawn again; `dropped` pairs stayed the same and are left out.
    """

    pairs: list[EncodedPair]
    logit: Float[Tensor, "pairs"]
    reference_logps: Float[Tensor, "pairs 2"]
    ties: int
    dropped: int = 0

    def information(self, gamma: float) -> float:
        """Fisher information of one pair about the strength of the target, at the target.

            E[ σ(l)(1 − σ(l)) (dl/ds)² ],  l = γ Δ ln π_s,  dl/ds ≈ γ Δ (ln π* − ln π₀)

        n pairs locate the strength s on the way from π₀ (0) to π* (1) to about ± 1/√(n · information).
        """
        slope = self.logit - preference_logit(self.reference_logps, gamma=gamma)
        return float((self.logit.sigmoid() * (1 - self.logit.sigmoid()) * slope**2).mean())


def make_pairs(
    target: Target,
    base: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    *,
    n: int,
    gamma: float,
    strengths: Sequence[float] = (0.0, 0.5, 1.0, 1.5),
    temperature: float = 0.8,
    max_new_tokens: int = 20,
    token_budget: int = FORWARD_BUDGET,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> TargetPairs:
    """Draw `n` pairs and label each by a coin with P_{π*} (eq. 3).

    Prompts are taken in random order, again and again. Each response comes from a version of the target whose strength
    is drawn anew, at `temperature`, so that pairs differ in what the target cares about. A pair whose responses are the
    same 20 times is dropped, with a warning. `progress(done, total)` counts responses sampled and pairs scored. Raises
    InputError if no pair is left.
    """
    random = torch.Generator().manual_seed(seed)
    end_id = end_token_id(tokenizer, conversational=bool(tokenizer.chat_template))
    order = torch.cat([torch.randperm(len(prompts), generator=random) for _ in range(n // len(prompts) + 1)])
    chosen_prompts = [prompts[index] for index in order[:n].tolist()]
    choice = torch.randint(len(strengths), (n, 2), generator=random)
    responses: list[list[list[int]]] = [[[], []] for _ in range(n)]
    done, total, ties, todo = 0, 3 * n, 0, [(i, side) for i in range(n) for side in (0, 1)]
    for attempt in range(DRAWS):
        for number, strength in enumerate(strengths):
            slots = [(i, side) for i, side in todo if int(choice[i, side]) == number]
            if not slots:
                continue
            model = target.model(base, tokenizer, strength)
            drawn = sample(
                model,
                [chosen_prompts[i] for i, _ in slots],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                end_id=end_id,
                seed=1_000_003 * seed + 101 * attempt + number,
                rows=128,
                progress=None if progress is None else lambda d, _, start=done: progress(min(start + d, total), total),
            )
            for (i, side), (response,) in zip(slots, drawn, strict=True):
                responses[i][side] = response
            done += len(slots) if attempt == 0 else 0
        todo = [(i, 1) for i in range(n) if responses[i][0] == responses[i][1]]
        ties += len(todo)
        if not todo:
            break
    if todo:
        what = f"target: {len(todo)} of {n} pairs had the same response twice, {DRAWS} times"
        if len(todo) == n:
            raise InputError(f"{what}; raise the temperature")
        logger.warning("%s: they are dropped; raise the temperature to keep them", what)
    groups = [Group(prompt, two) for prompt, two in zip(chosen_prompts, responses, strict=True) if two[0] != two[1]]
    scores = score_in_batches(
        target.model(base, tokenizer),
        groups,
        token_budget=token_budget,
        reference=base,
        progress=None if progress is None else lambda d, _: progress(2 * n + d, total),
    )
    assert scores.reference_logps is not None
    logit = preference_logit(scores.logps.view(-1, 2), gamma=gamma)
    first = torch.bernoulli(logit.sigmoid().cpu(), generator=random).bool().to(logit.device)
    swap = torch.where(first[:, None], torch.tensor([[0, 1]]).to(logit.device), torch.tensor([[1, 0]]).to(logit.device))
    pairs = [
        EncodedPair(group.prompt, group.responses[a], group.responses[b], None, f"pair {i} drawn with seed {seed}")
        for i, (group, (a, b)) in enumerate(zip(groups, swap.tolist(), strict=True))
    ]
    return TargetPairs(
        pairs, torch.where(first, logit, -logit), scores.reference_logps.view(-1, 2).gather(1, swap), ties, len(todo)
    )


def target_prompts(settings: TargetSettings, tokenizer: Tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts of a target experiment: (for training pairs, held out). The split is the same for every seed.

    Raises InputError for strings in a file where the model has a chat template, whose end token the target's is.
    """
    given, chat = settings.prompts, bool(tokenizer.chat_template)
    if given is None:
        text = files("distalign").joinpath("models/everyday_prompts.txt").read_text(encoding="utf-8")
        given = text.split("\n")
    if isinstance(given, str):
        data = read_prompts(given)
        if chat and data.format == "standard":
            raise InputError(f"target.prompts: {given} holds strings and the model is a chat model; write messages")
    else:
        rows = [Prompt([{"role": "user", "content": line}] if chat else line) for line in given if line.strip()]
        data = Data(rows, "prompts", "conversational" if chat else "standard")
    train, held = split_by_prompt(data, HELD_OUT_PROMPTS)
    return train.rows, held.rows
