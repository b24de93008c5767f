"""A reward model trained on pairs: γ ln π₀ plus a correction (init: policy), or a score head alone (init: scratch).

    policy    R(x, a) = γ ln π₀(a|x) + f(x, a),   f learned (`heads`), starting at exactly zero
    scratch   R(x, a) = f(x, a),                  the usual sequence-classification model

It reads the POLICY's token ids, so nothing is decoded, rendered or cut on the way. In a folder it is

reward.json         settings, γ, tokens, and ln π₀ of one response by which a wrong base model is noticed
results.json        held-out results with their standard errors, and the history of the training
README.md           a card
reward.safetensors  init: policy: the head, and what was trained of the trunk
model.safetensors   init: scratch: a standard sequence-classification model (LoRA: an adapter for one)
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from distalign.data import EncodedPair
from distalign.engine import Group, micro_batches, score_in_batches
from distalign.engine.forward import evaluating
from distalign.engine.scoring import expected_counts, read
from distalign.errors import DAMAGED
from distalign.methods.preference import induced_reward
from distalign.models.load import Source
from distalign.models.policy import Lora, make_policy
from distalign.models.quantized import quantization_of
from distalign.models.targets import with_logit_bias
from distalign.models.verify import check_complete, check_finite
from distalign.rewards.base import Request, Reward, RewardError, finite
from distalign.rewards.heads import Head, HeadName, Tilt, embeddings, new_head
from distalign.settings import Count, Positive, Section
from distalign.stats.intervals import Estimate
from distalign.stats.laplace import Posterior

# The file by which a folder of ours is known.
MARK = "reward.json"
_TENSORS, _MODEL, _ADAPTER = "reward.safetensors", "model.safetensors", "adapter_model.safetensors"
_SCORE = "base_model.model.score.weight"


class UnreadableReward(RewardError):
    """A folder that holds no whole reward, such as one whose writing was stopped."""


class RewardTraining(Section):
    """A reward model trained on the recipe's pairs (eq. 9).

    init: policy is R = γ ln π₀ + a learned correction that starts at zero; scratch an ordinary scalar head. `gamma` is
    the sharpness of the labels (if not given, a known target's own, or that of methods whose gamma is auto). head: what
    the correction is linear in, by default what the pairs' evidence speaks for. weight_decay: the precision of the
    Gaussian prior on the head's weights (null: that of the largest evidence). With a frozen backbone the head is the
    most probable one; lora and full start there and train both by the settings that follow, which are null for what
    suits the backbone.
    """

    init: Literal["policy", "scratch"] = "policy"
    head: Literal["auto", "tilt", "counts", "hidden"] = "auto"
    backbone: Literal["frozen", "lora", "full"] = "frozen"
    gamma: Positive | None = None
    weight_decay: Positive | None = None
    learning_rate: Positive | None = None
    batch_size: Count = 32
    epochs: Count | None = None
    patience: Count = 5
    lora: Lora = Lora()

    @model_validator(mode="after")
    def _fits(self) -> RewardTraining:
        if self.head != "auto" and self.init == "scratch":
            raise ValueError(f"reward.train: init is scratch, which has a score head; leave out head: {self.head}")
        if self.gamma is not None and self.init == "scratch":
            raise ValueError(f"reward.train: init is scratch, which reads no gamma; leave out gamma: {self.gamma:g}")
        if self.head in ("tilt", "counts") and self.backbone != "frozen":
            raise ValueError(
                f"reward.train: head is {self.head}, which reads no hidden states, and backbone {self.backbone} would "
                "train them; take head: hidden, or backbone: frozen"
            )
        for name in ("learning_rate", "epochs"):
            if getattr(self, name) is not None and self.backbone == "frozen":
                raise ValueError(
                    f"reward.train.{name} is for backbone: lora or full; a frozen one has its best head without steps: "
                    "leave it out"
                )
        return self

    def check_4bit(self) -> None:
        """Raise RewardError for what cannot be trained, or saved, where the policy's weights are in 4 bits."""
        if self.init == "scratch" or self.backbone == "full":
            found = "init: scratch" if self.init == "scratch" else "backbone: full"
            raise RewardError(
                f"reward.train: {found} needs the model's weights as they were, and here they are in 4 bits; take "
                "init: policy with backbone: frozen or lora, or train the reward without quantization"
            )


class TrainedReward(Reward):
    """R of the module's docstring. `trunk` is what the head reads: `base` itself when the backbone is frozen.

    `gamma` is None for init: scratch, which has no use for ln π₀.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        trunk: PreTrainedModel | PeftModel,
        head: Head,
        *,
        gamma: float | None,
        token_budget: int,
    ) -> None:
        self.base, self.trunk, self.gamma, self.token_budget = base, trunk, gamma, token_budget
        self.head = head.to(embeddings(base).device)
        self._model: PreTrainedModel | None = None
        self._start = torch.zeros(0)

    @property
    def frozen(self) -> bool:
        """Whether only the head is learned, so that one pass of the base serves everything."""
        return self.trunk is self.base

    def __call__(self, requests: Sequence[Request]) -> Float[Tensor, "responses"]:
        """Rewards in nats."""
        return finite(self.values([request.group for request in requests]), "trained")

    @torch.no_grad()
    def values(self, groups: Sequence[Group]) -> Float[Tensor, "responses"]:
        """Rewards in nats, in float64 on the CPU."""
        if isinstance(self.head, Tilt):
            assert self.gamma is not None
            logps = score_in_batches(self._tilted(self.head), groups, token_budget=self.token_budget).logps
            return induced_reward(logps.cpu().double(), gamma=self.gamma)
        offset, features = self.encode(groups)
        return offset + self.head(features).cpu().double()

    @torch.no_grad()
    def linearise(
        self,
        groups: Sequence[Group],
        offset: Float[Tensor, "responses"],
        features: Float[Tensor, "responses width"],
    ) -> tuple[Float[Tensor, "responses"], Float[Tensor, "responses width"]]:
        """R, and its derivative in the head's weights, at the weights as they are; the others are what `encode` gave.

        But for `tilt` it is linear, and the derivative the same everywhere.
        """
        head = self.head
        if not isinstance(head, Tilt):
            rows = head.rows(features)
            return offset + (rows @ head.weight).cpu().double(), rows
        rows, tilted = torch.empty_like(features), self._tilted(head)
        for batch, own in self._batches(groups):
            own = own.to(rows.device)
            rows[own] = head.rows(features[own] - expected_counts(tilted, batch))
        return self.values(groups), rows

    def _tilted(self, head: Tilt) -> PreTrainedModel:
        """The language model whose log-probabilities times γ are the reward: one, whose bias follows the weights."""
        assert self.gamma is not None
        if self._model is None:
            self._model = with_logit_bias(self.base, torch.zeros(len(head.weight)))
            self._start = self._model.get_output_embeddings().bias.clone()  # pyright: ignore[reportCallIssue, reportOptionalMemberAccess]
        bias = self._start + head.weight / (head.scale * self.gamma)
        self._model.get_output_embeddings().bias.copy_(bias)  # pyright: ignore[reportOptionalMemberAccess]
        return self._model

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The trunk's parameters that training changes, by name; the head's own are `head.weight`."""
        if self.frozen:
            return {}
        return {f"trunk.{name}": p for name, p in self.trunk.named_parameters() if p.requires_grad}

    def features(self, groups: Sequence[Group]) -> Float[Tensor, "responses width"]:
        """The head's features of the responses, with gradient where the trunk has one."""
        return self.head.features(read(self.trunk, groups), embeddings(self.trunk))

    @torch.no_grad()
    def encode(
        self, groups: Sequence[Group], advance: Callable[..., None] | None = None
    ) -> tuple[Float[Tensor, "responses"], Float[Tensor, "responses width"]]:
        """γ ln π₀ (0 without γ; nats, on the CPU) and features of all responses, in micro-batches without gradient.

        `advance(done)` counts groups.
        """
        count = sum(len(group.responses) for group in groups)
        offset = torch.zeros(count, dtype=torch.float64)
        features = self.head.weight.new_zeros(count, len(self.head.weight))
        together, done = self.gamma is not None and self.frozen, 0
        for batch, rows in self._batches(groups):
            with evaluating(self.trunk):
                reading = read(self.trunk, batch, logps=together)
            features[rows.to(features.device)] = self.head.features(reading, embeddings(self.trunk))
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

    def _batches(self, groups: Sequence[Group]) -> Iterator[tuple[list[Group], Int[Tensor, "rows"]]]:
        """Micro-batches of the groups, each with the numbers of its responses among those of all groups."""
        numbers = torch.arange(sum(len(group.responses) for group in groups))
        of_group = numbers.split([len(group.responses) for group in groups])
        for batch in micro_batches(groups, self.token_budget):
            yield [groups[i] for i in batch], torch.cat([of_group[i] for i in batch])


@dataclass(frozen=True)
class Trained:
    """A trained reward, what it achieves on held-out pairs, how it came about, and what it was made of.

    `results`: accuracy, nll (nats) and ece on the held-out pairs, and `start_nll` before any step: γ ln π₀ alone, or
    ln 2 from scratch; with lora and full these pairs also chose when to stop, which flatters them a little. `history`
    has one row per head that was tried and per evaluation; `head` is the one that was taken.
    """

    reward: TrainedReward
    head: HeadName
    results: dict[str, Estimate]
    history: list[dict[str, Any]]
    posterior: Posterior
    settings: RewardTraining
    source: Source
    tokenizer: PreTrainedTokenizerBase
    train: list[EncodedPair]
    held: list[EncodedPair]

    def save(self, folder: str | Path) -> None:
        """Weights as safetensors, reward.json, results.json and a card; what `load_reward` reads."""
        folder, settings, reward, pair = Path(folder), self.settings, self.reward, self.held[0]
        folder.mkdir(parents=True, exist_ok=True)
        if settings.init == "policy":
            tensors = {f"head.{name}": value for name, value in reward.head.state_dict().items()}
            _save_tensors(folder / _TENSORS, tensors | reward.trained_parameters())
        else:
            _save_scratch(folder, self)
        about = {
            "init": settings.init,
            "head": self.head,
            "backbone": settings.backbone,
            "gamma": reward.gamma,
            "base_model": self.source.name,
            "lora": settings.lora.model_dump() if settings.backbone == "lora" else None,
            "vocabulary": _fingerprint(self.tokenizer),
            "quantization": quantization_of(reward.base),
            "probe": {
                "prompt": pair.prompt,
                "response": pair.chosen,
                "logp": _logp(reward.base, pair.prompt, pair.chosen),
            },
        }
        results = {
            "n_train": len(self.train),
            "held_out": {key: value._asdict() for key, value in self.results.items()},
            "history": self.history,
        }
        for name, content in {MARK: about, "results.json": results}.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(self), encoding="utf-8")


def load_reward(
    folder: str | Path, *, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_budget: int = 2048
) -> TrainedReward:
    """The reward that `Trained.save` wrote, on the device of `base`, with identical scores.

    `base` and `tokenizer` are those of the policy, and must be those it was trained with. Raises RewardError if they
    are not, UnreadableReward if the folder is incomplete.
    """
    folder = Path(os.path.expanduser(folder))
    try:
        about = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if about["vocabulary"] != _fingerprint(tokenizer):
            raise RewardError(
                f"reward {folder}: it reads the tokens of {about['base_model']}, which are not the policy's; train a "
                "reward with this policy's model"
            )
        if bool(about.get("quantization")) != (quantization_of(base) is not None):
            known, own = ("4-bit weights", "not") if about.get("quantization") else ("full weights", "in 4 bits")
            raise RewardError(
                f"reward {folder}: it was trained on {known} of {about['base_model']}, and those here are {own}; set "
                f"quantization: {'4bit' if about.get('quantization') else 'null'}, or train it again"
            )
        trunk = base
        if about["backbone"] != "frozen":
            lora = None if about["lora"] is None else Lora(**about["lora"])
            source = Source(about["base_model"], "", "the base of a saved reward")
            trunk = make_policy(base, tokenizer, source, lora=lora, reference=False).model.eval()
        head = new_head(about["head"], base)
        reward = TrainedReward(base, trunk, head, gamma=about["gamma"], token_budget=token_budget)
        if about["init"] == "policy":
            _load_tensors(folder, reward)
        else:
            _load_scratch(folder, reward, about["backbone"])
    except (*DAMAGED, RuntimeError, SafetensorError) as error:
        if isinstance(error, RewardError):
            raise
        raise UnreadableReward(f"reward {folder}: it cannot be read ({error}); train it again") from error
    probe = about["probe"]
    logp = _logp(base, probe["prompt"], probe["response"])
    # Half precision moves a sequence by a fraction of a nat, another model by many.
    if not abs(logp - probe["logp"]) < 0.5 + 0.01 * abs(probe["logp"]):
        raise RewardError(
            f"reward {folder}: ln π₀ of a response was {probe['logp']:.2f} and is {logp:.2f} on this model; it "
            f"belongs to {about['base_model']}: load that, or train again"
        )
    return reward


def is_reward_model(name: str) -> bool:
    """Whether `Trained.save` wrote the folder of that name."""
    return os.path.isfile(Path(os.path.expanduser(name)) / MARK)


def as_classifier(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """A sequence-classification model with one label whose trunk IS that of a causal language model.

    Its score head has no memory yet. Raises RewardError if the family has no such class.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        classifier = None
    prefix = getattr(classifier, "base_model_prefix", "")
    trunk = getattr(model, prefix, None)
    same = trunk is not None and type(getattr(classifier, prefix)) is type(trunk)
    if classifier is None or not same or not hasattr(classifier, "score"):
        raise RewardError(
            f"reward.train: {config.model_type} has no sequence-classification class with the same trunk; use init: "
            "policy"
        )
    setattr(classifier, prefix, trunk)
    return classifier


def _load_tensors(folder: Path, reward: TrainedReward) -> None:
    """init: policy: tensors of our own, for ln π₀ is not part of any class of transformers."""
    tensors = load_file(folder / _TENSORS)
    # Without a bound a head is linear everywhere: that is written as infinite.
    check_finite(f"reward {folder}", {name: value for name, value in tensors.items() if name != "head.bound"})
    reward.head.load_state_dict({name[5:]: value for name, value in tensors.items() if name.startswith("head.")})
    with torch.no_grad():
        for name, parameter in reward.trained_parameters().items():
            parameter.copy_(tensors[name])
    reward.trunk.requires_grad_(False)


def _save_scratch(folder: Path, trained: Trained) -> None:
    """init: scratch: what AutoModelForSequenceClassification (or PEFT) reads, and gives the same scores.

    The padding token of the tokenizer is one that no text contains.
    """
    reward, tokenizer = trained.reward, copy.deepcopy(trained.tokenizer)
    score = reward.head.weight.detach().cpu()[None]
    pad = _padding(tokenizer, [*trained.train, *trained.held])
    if pad is not None:
        tokenizer.pad_token_id = pad
    tokenizer.save_pretrained(folder)
    if isinstance(reward.trunk, PeftModel):
        _save_tensors(folder / _ADAPTER, {**get_peft_model_state_dict(reward.trunk), _SCORE: score})
        config: Any = copy.deepcopy(reward.trunk.peft_config["default"])
        config.task_type, config.inference_mode, config.modules_to_save = "SEQ_CLS", True, ["score"]
        config.base_model_name_or_path = trained.source.path
        config.save_pretrained(str(folder))
        return
    model = as_classifier(reward.trunk)
    model.config.pad_token_id = pad
    model.get_submodule("score").weight = nn.Parameter(score.to(reward.trunk.dtype))
    model.save_pretrained(folder, max_shard_size="1TB")


def _load_scratch(folder: Path, reward: TrainedReward, backbone: str) -> None:
    """The weights of the standard folder in a trunk that the engine reads."""
    lora = backbone == "lora"
    state = load_file(folder / (_ADAPTER if lora else _MODEL))
    check_finite(f"reward {folder}", state)
    score = state.pop(_SCORE if lora else "score.weight")
    if lora:
        check_complete(f"reward {folder}", get_peft_model_state_dict(reward.trunk).keys() - state.keys())
        set_peft_model_state_dict(reward.trunk, state)
    elif backbone == "full":
        # The trunk still has the head of a language model, which a score does not read.
        missing, _ = reward.trunk.load_state_dict(state, strict=False)
        check_complete(f"reward {folder}", [key for key in missing if key.startswith(reward.trunk.base_model_prefix)])
    reward.trunk.requires_grad_(False)
    with torch.no_grad():
        reward.head.weight.copy_(score[0])


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def _padding(tokenizer: Any, pairs: list[EncodedPair]) -> int | None:
    """A special token that stands in no text: models of this class take the last token that is not padding."""
    used = {token for pair in pairs for ids in (pair.prompt, pair.chosen, pair.rejected) for token in ids}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    candidates = [tokenizer.pad_token_id, *(index for index, token in added.items() if token.special)]
    end = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    return next((index for index in candidates if index is not None and index not in used | end), None)


def _logp(base: PreTrainedModel, prompt: list[int], response: list[int]) -> float:
    return float(score_in_batches(base, [Group(prompt, [response])], token_budget=1).logps[0])


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers with the same tokens."""
    known = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def _card(trained: Trained) -> str:
    settings = trained.settings
    formula = "γ ln π₀(a|x) + f(x, a)" if settings.init == "policy" else "f(x, a)"
    rows = [f"| {key} | {v.mean:.4f} ± {v.se:.4f} | {v.n} |" for key, v in trained.results.items()]
    given = {key: value for key, value in settings.model_dump().items() if value is not None}
    given |= {"gamma": trained.reward.gamma, "n_train": len(trained.train)}
    listed = "\n".join(f"- {key}: {value}" for key, value in given.items())
    table = "\n".join(rows)
    return f"""---
library_name: transformers
tags:
- distalign
- reward-model
---

# Reward model on {trained.source.name}

R(x, a) = {formula}, trained on pairwise preferences with distalign by maximum likelihood (arXiv 2506.01523v2, eq. 9).

## On held-out pairs

| | mean ± standard error | pairs |
| --- | --- | --- |
{table}

With lora and full the same pairs decided when to stop.

## Settings

{listed}
"""
