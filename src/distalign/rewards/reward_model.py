"""A reward model trained on pairs: γ ln π₀ plus a correction (init: policy), or a score head alone (init: scratch).

    policy    R(x, a) = γ ln π₀(a|x) + f(x, a),   f learned, starting at exactly zero
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
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from distalign.data import EncodedPair
from distalign.engine import Group, micro_batches, score_in_batches
from distalign.engine.forward import evaluating
from distalign.engine.scoring import Reading, read
from distalign.methods.preference import induced_reward
from distalign.models.load import Source
from distalign.models.policy import Lora, make_policy
from distalign.rewards.base import Request, RewardError, finite
from distalign.settings import Count, NotNegative, Positive, Section
from distalign.stats.intervals import Estimate

# The file by which a folder of ours is known.
MARK = "reward.json"
_TENSORS, _MODEL, _ADAPTER = "reward.safetensors", "model.safetensors", "adapter_model.safetensors"
_SCORE = "base_model.model.score.weight"


class UnreadableReward(RewardError):
    """A folder that holds no whole reward, such as one whose writing was stopped."""


class RewardTraining(Section):
    """A reward model trained on the recipe's pairs (eq. 9). Null settings are chosen by the kind of backbone.

    init: policy is R = γ ln π₀ + a learned correction that starts at zero; scratch an ordinary scalar head. `gamma` is
    the sharpness of the labels (a known target's own, if not given). backbone: frozen computes its features once.
    """

    init: Literal["policy", "scratch"] = "policy"
    backbone: Literal["frozen", "lora", "full"] = "frozen"
    gamma: Positive | None = None
    learning_rate: Positive | None = None
    weight_decay: NotNegative | None = None
    batch_size: Count = 32
    epochs: Count | None = None
    patience: Count = 5
    lora: Lora = Lora()


class Head(nn.Module):
    """value = w · (features − shift) / scale, in nats; starts at exactly zero.

    shift and scale are those of the training pairs: a typical pair's features then differ by a vector of length 1, so
    that w ~ N(0, 1/ridge) is a prior on the difference of two values with standard deviation 1/√ridge nats.
    """

    weight: nn.Parameter
    shift: Tensor
    scale: Tensor
    bound: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        for name, start in (("shift", torch.zeros(width)), ("scale", torch.ones(width))):
            self.register_buffer(name, start)
        self.register_buffer("bound", torch.tensor(torch.inf))

    @abstractmethod
    def features(self, reading: Reading, embeddings: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "responses width"]:
        """A response as one vector of float32; `embeddings` are the input embeddings of all tokens."""

    def standardise(self, features: Float[Tensor, "pairs 2 width"]) -> None:
        """Take shift and scale from the features of the training pairs."""
        flat = features.flatten(0, 1)
        spread = flat.std(0)
        # What hardly varies says nothing, and would be blown up.
        spread = torch.where(spread > 1e-6 * flat.abs().max().clamp(min=1e-30), spread, torch.inf)
        length = ((features[:, 0] - features[:, 1]) / spread).square().sum(-1).mean().sqrt()
        self.shift.copy_(flat.mean(0))
        self.scale.copy_(spread * length.clamp(min=1e-6))

    @abstractmethod
    def finish(self, features: Float[Tensor, "pairs 2 width"]) -> None:
        """Bring the trained head into the form it is used and saved in; `features` are the training pairs'."""

    def forward(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
        """Values in nats: linear as far as training has seen, ± 2 · bound at the most."""
        value = ((features - self.shift) / self.scale) @ self.weight
        beyond = (value.abs() - self.bound).clamp(min=0)
        if not bool((beyond > 0).any()):
            return value
        return value.sign() * (value.abs() - beyond + self.bound * torch.tanh(beyond / self.bound))


class Correction(Head):
    """The correction of a policy-initialised reward: a linear score of every response token, summed, over √T.

    A token is seen as its hidden state (the context after it) and its own input embedding (the word). The sum can
    express "each such word counts"; dividing by √T keeps long responses from being rewarded for length, and beyond the
    values met in training it levels off at `bound`, so that a policy which maximises it gains nothing far outside.
    """

    def features(self, reading: Reading, embeddings: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "responses width"]:
        """Σ_t [h_t; e(y_t)] / √T."""
        tokens = torch.cat([reading.hidden, embeddings[reading.ids]], -1).float()
        return reading.mean(tokens) * reading.lengths[:, None].sqrt()

    @torch.no_grad()
    def finish(self, features: Float[Tensor, "pairs 2 width"]) -> None:
        """Level off beyond the largest value of the training responses."""
        self.bound.fill_(torch.inf)
        self.bound.copy_(self(features).abs().max().clamp(min=1e-6))


class LastToken(Head):
    """The score of a sequence-classification model: linear in the hidden state after the last token.

    Trained on standardised features; what is kept are the weights that such a model holds.
    """

    def features(self, reading: Reading, embeddings: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "responses width"]:
        """h_T, the end token read."""
        return reading.last.float()

    @torch.no_grad()
    def finish(self, features: Float[Tensor, "pairs 2 width"]) -> None:
        """Same rewards up to a constant, with shift 0 and scale 1: the weights of an ordinary score head."""
        self.weight.div_(self.scale)
        self.shift.zero_()
        self.scale.fill_(1.0)


def new_head(init: Literal["policy", "scratch"], base: PreTrainedModel) -> Head:
    """The head of a reward model on `base`, 0 everywhere."""
    hidden = embeddings(base).shape[1]
    return Correction(2 * hidden) if init == "policy" else LastToken(hidden)


def embeddings(model: PreTrainedModel | PeftModel) -> Float[Tensor, "vocab hidden"]:
    """The input embeddings of all tokens."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


class TrainedReward:
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
        return finite(values, "trained")

    def counters(self) -> dict[str, float]:
        """Responses rewarded; none is ever cut."""
        return {"responses": float(self.responses)}

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
        starts = torch.tensor([0, *(len(group.responses) for group in groups)]).cumsum(0).tolist()
        offset = torch.zeros(starts[-1], dtype=torch.float64)
        features = self.head.weight.new_zeros(starts[-1], len(self.head.weight))
        together, done = self.gamma is not None and self.frozen, 0
        for batch in micro_batches(groups, self.token_budget):
            rows = torch.tensor([row for i in batch for row in range(starts[i], starts[i + 1])])
            with evaluating(self.trunk):
                reading = read(self.trunk, [groups[i] for i in batch], logps=together)
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


@dataclass(frozen=True)
class Origin:
    """What a trained reward was made of."""

    settings: RewardTraining
    gamma: float | None
    source: Source
    tokenizer: PreTrainedTokenizerBase
    train: list[EncodedPair]
    held: list[EncodedPair]


def save_reward(
    folder: Path,
    reward: TrainedReward,
    results: Mapping[str, Estimate],
    history: list[dict[str, Any]],
    origin: Origin,
) -> None:
    """Write the files of this module's docstring."""
    settings, pair = origin.settings, origin.held[0]
    folder.mkdir(parents=True, exist_ok=True)
    if settings.init == "policy":
        tensors = {f"head.{name}": value for name, value in reward.head.state_dict().items()}
        _save_tensors(folder / _TENSORS, tensors | reward.trained_parameters())
    else:
        _save_scratch(folder, reward, origin)
    about = {
        "init": settings.init,
        "backbone": settings.backbone,
        "gamma": origin.gamma,
        "base_model": origin.source.name,
        "lora": settings.lora.model_dump() if settings.backbone == "lora" else None,
        "vocabulary": _fingerprint(origin.tokenizer),
        "probe": {"prompt": pair.prompt, "response": pair.chosen, "logp": _logp(reward.base, pair.prompt, pair.chosen)},
    }
    numbers = {key: value._asdict() for key, value in results.items()}
    written = {MARK: about, "results.json": {"n_train": len(origin.train), "held_out": numbers, "history": history}}
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(results, origin), encoding="utf-8")


def load_reward(
    folder: str | Path, *, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_budget: int = 2048
) -> TrainedReward:
    """The reward that `Trained.save` wrote, on the device of `base`, with identical scores.

    `base` and `tokenizer` are those of the policy, and must be those it was trained with. Raises RewardError if they
    are not, UnreadableReward if the folder is incomplete.
    """
    folder = Path(folder).expanduser()
    try:
        about = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if about["vocabulary"] != _fingerprint(tokenizer):
            raise RewardError(
                f"reward {folder}: it reads the tokens of {about['base_model']}, which are not the policy's; train a "
                "reward with this policy's model"
            )
        trunk = _untrained_trunk(about, base, tokenizer)
        head = new_head(about["init"], base)
        reward = TrainedReward(base, trunk, head, gamma=about["gamma"], token_budget=token_budget)
        (_load_tensors if about["init"] == "policy" else _load_scratch)(folder, reward, about["backbone"])
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
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
    """Whether `save_reward` wrote the folder of that name."""
    return (Path(name).expanduser() / MARK).is_file()


def as_classifier(model: PreTrainedModel | PeftModel) -> Any:
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
    if trunk is None or type(getattr(classifier, prefix)) is not type(trunk) or not hasattr(classifier, "score"):
        raise RewardError(
            f"reward.train: {config.model_type} has no sequence-classification class with the same trunk; use init: "
            "policy"
        )
    setattr(classifier, prefix, trunk)
    return classifier


def _load_tensors(folder: Path, reward: TrainedReward, backbone: str) -> None:
    """init: policy: tensors of our own, for ln π₀ is not part of any class of transformers."""
    tensors = load_file(folder / _TENSORS)
    reward.head.load_state_dict({name[5:]: value for name, value in tensors.items() if name.startswith("head.")})
    with torch.no_grad():
        for name, parameter in reward.trained_parameters().items():
            parameter.copy_(tensors[name])
    reward.trunk.requires_grad_(False)


def _save_scratch(folder: Path, reward: TrainedReward, origin: Origin) -> None:
    """init: scratch: what AutoModelForSequenceClassification (or PEFT) reads, and gives the same scores.

    The padding token of the tokenizer is one that no text contains.
    """
    score = reward.head.weight.detach().cpu()[None]
    tokenizer = copy.deepcopy(origin.tokenizer)
    pad = _padding(tokenizer, [*origin.train, *origin.held])
    if pad is not None:
        tokenizer.pad_token_id = pad
    tokenizer.save_pretrained(folder)
    if isinstance(reward.trunk, PeftModel):
        _save_tensors(folder / _ADAPTER, {**get_peft_model_state_dict(reward.trunk), _SCORE: score})
        config: Any = copy.deepcopy(reward.trunk.peft_config["default"])
        config.task_type, config.inference_mode, config.modules_to_save = "SEQ_CLS", True, ["score"]
        config.base_model_name_or_path = origin.source.path
        config.save_pretrained(str(folder))
        return
    model = as_classifier(reward.trunk)
    model.config.pad_token_id = pad
    model.score.weight = nn.Parameter(score.to(reward.trunk.dtype))
    model.save_pretrained(folder, max_shard_size="1TB")


def _load_scratch(folder: Path, reward: TrainedReward, backbone: str) -> None:
    """The weights of the standard folder in a trunk that the engine reads."""
    lora = backbone == "lora"
    state = load_file(folder / (_ADAPTER if lora else _MODEL))
    score = state.pop(_SCORE if lora else "score.weight")
    if lora:
        set_peft_model_state_dict(reward.trunk, state)
    elif backbone == "full":
        reward.trunk.load_state_dict(state, strict=False)
    reward.trunk.requires_grad_(False)
    with torch.no_grad():
        reward.head.weight.copy_(score[0])


def _untrained_trunk(
    about: Mapping[str, Any], base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | PeftModel:
    """The trunk of a saved reward, as it was before training."""
    if about["backbone"] == "frozen":
        return base
    lora = None if about["lora"] is None else Lora(**about["lora"])
    source = Source(about["base_model"], "", "the base of a saved reward")
    return make_policy(base, tokenizer, source, lora=lora, reference=False).model.eval()


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


def _card(results: Mapping[str, Estimate], origin: Origin) -> str:
    settings, base = origin.settings, origin.source.name
    formula = "γ ln π₀(a|x) + f(x, a)" if settings.init == "policy" else "f(x, a)"
    rows = [f"| {key} | {v.mean:.4f} ± {v.se:.4f} | {v.n} |" for key, v in results.items()]
    given = {key: value for key, value in settings.model_dump().items() if value is not None}
    given |= {"gamma": origin.gamma, "n_train": len(origin.train)}
    listed = "\n".join(f"- {key}: {value}" for key, value in given.items())
    table = "\n".join(rows)
    return f"""---
library_name: transformers
tags:
- distalign
- reward-model
---

# Reward model on {base}

R(x, a) = {formula}, trained on pairwise preferences with distalign by maximum likelihood (arXiv 2506.01523v2, eq. 9).

## On held-out pairs

| | mean ± standard error | pairs |
| --- | --- | --- |
{table}

The same pairs decided when to stop.

## Settings

{listed}
"""
