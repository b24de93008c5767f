"""Training a reward model on pairs by maximum likelihood (eq. 9), stopped where held-out pairs are predicted best.

With a frozen backbone the features of every response are computed once, and what is left takes seconds. LoRA and full
training start from the head that this gives, and run the same loop with the model in it (linear probing, then fine-
tuning: arXiv 2202.10054).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distalign.data import EncodedPair
from distalign.engine import Group, micro_batches
from distalign.methods.preference import bradley_terry_nll
from distalign.models.policy import Lora, make_policy
from distalign.progress import progress
from distalign.rewards.base import RewardError
from distalign.rewards.heads import Correction, LastToken
from distalign.rewards.reward_model import TrainedReward
from distalign.rewards.saved import Origin, check_export, save_reward
from distalign.settings import Count, NotNegative, Positive, Section
from distalign.stats.calibration import expected_calibration_error
from distalign.stats.intervals import Estimate, jackknife, mean_and_se

HEADS = {"policy": Correction, "scratch": LastToken}
_BLOCKS = 100  # the jackknife of the calibration error leaves out one of so many blocks of pairs


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


@dataclass(frozen=True)
class Plan:
    """How long and how fast; `ridge` is the prior of `Head`."""

    learning_rate: float
    epochs: int
    ridge: float = 1.0


# What null settings stand for, with each kind of backbone.
PLANS = {"frozen": Plan(1e-2, 60), "lora": Plan(3e-4, 3), "full": Plan(1e-5, 2)}


@dataclass(frozen=True)
class Trained:
    """A trained reward, what it achieves on held-out pairs, and how it came about.

    `results`: accuracy, nll (nats) and ece on the held-out pairs, and `start_nll` before any step: γ ln π₀ alone, or
    ln 2 from scratch. The held-out pairs also chose when to stop, which flatters them a little. `history` has one row
    an evaluation.
    """

    reward: TrainedReward
    results: dict[str, Estimate]
    history: list[dict[str, Any]]
    origin: Origin

    def save(self, folder: str | Path) -> None:
        """Weights as safetensors, reward.json, results.json and a card; what `load_reward` reads."""
        save_reward(Path(folder), self.reward, self.results, self.history, self.origin)


def train_reward(
    settings: Any,
    base: Any,
    tokenizer: Any,
    source: Any,
    train: Sequence[EncodedPair],
    held: Sequence[EncodedPair],
    *,
    gamma: float | None,
    token_budget: int,
    seed: int,
    folder: str | Path | None = None,
) -> Trained:
    """Train a reward on `train`, stop by `held`, and save it if there is a `folder`.

    `settings` are `recipe.RewardTraining`; its own `gamma`, if given, comes before the argument. `base` is frozen and
    stays as it is. The same seed gives the same reward on one machine. Raises RewardError for fewer than two held-out
    pairs, no `gamma` where it is needed, or a model without a sequence-classification class (init: scratch).
    """
    if not train or len(held) < 2:
        raise RewardError(
            f"reward.train: {len(train)} training and {len(held)} held-out pairs; those stop it: give "
            "data.eval, or a larger data.held_out"
        )
    gamma = None if settings.init == "scratch" else (settings.gamma or gamma)
    if settings.init == "policy" and gamma is None:
        raise RewardError("reward.train: init is policy, which needs gamma; set reward.train.gamma")
    if settings.init == "scratch":
        check_export(base)
    with _seeded(base, seed):
        reward = _start(settings, base, tokenizer, source, gamma, token_budget)
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in (*train, *held)]
    with progress("reward: encode pairs", len(groups)) as advance:
        offset, features = reward.encode(groups, advance)
    offset, features = offset.view(-1, 2), features.view(len(groups), 2, -1)
    reward.head.standardise(features[: len(train)])
    labels = torch.tensor([1.0 if p.probability is None else p.probability for p in (*train, *held)]).double()
    history: list[dict[str, Any]] = []
    start = None
    for kind, plan in _stages(settings):
        fit = Fit(kind(reward, groups, offset, features), labels, len(train), plan, settings, history)
        start = start or fit.held_nll()
        with _seeded(base, seed):
            fit.run(seed)
    reward.head.finish(fit.items.final(range(len(train))))
    results = {**measure(fit.held_rewards(), labels[len(train) :]), "start_nll": start}
    made = Trained(reward, results, history, Origin(settings, gamma, source, tokenizer, list(train), list(held)))
    if folder is not None:
        made.save(folder)
    return made


def _start(settings: Any, base: Any, tokenizer: Any, source: Any, gamma: float | None, budget: int) -> TrainedReward:
    """The untrained reward: its trunk is the base itself, the base with an adapter, or a copy."""
    trunk = base
    if settings.backbone != "frozen":
        lora = settings.lora if settings.backbone == "lora" else None
        trunk = make_policy(base, tokenizer, source, lora=lora, reference=False).model
    hidden = base.get_input_embeddings().weight.shape[1]
    head = HEADS[settings.init]
    return TrainedReward(base, trunk, head(head.width(hidden)), gamma=gamma, token_budget=budget)


def _stages(settings: Any) -> list[tuple[type[Items], Plan]]:
    """The head on cached features; then, unless the backbone is frozen, both, which is what the settings are for."""
    given = {"learning_rate": settings.learning_rate, "epochs": settings.epochs, "ridge": settings.weight_decay}
    last = replace(PLANS[settings.backbone], **{key: value for key, value in given.items() if value is not None})
    if settings.backbone == "frozen":
        return [(Cached, last)]
    return [(Cached, replace(PLANS["frozen"], ridge=last.ridge)), (Live, last)]


@contextmanager
def _seeded(base: Any, seed: int) -> Iterator[None]:
    """New adapters and dropout follow the seed; the global random state is left alone."""
    with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Items(ABC):
    """The pairs, numbered, with what is known of them before training: γ ln π₀ and the features of the start."""

    stage: ClassVar[str]

    def __init__(
        self,
        reward: TrainedReward,
        groups: list[Group],
        offset: Float[Tensor, "pairs 2"],
        features: Float[Tensor, "pairs 2 width"],
    ) -> None:
        self.reward, self.groups, self.offset, self.start = reward, groups, offset, features

    @abstractmethod
    def features(self, indices: Sequence[int]) -> Float[Tensor, "pairs 2 width"]:
        """Features of these pairs, with gradient if the trunk has one."""

    @abstractmethod
    def parts(self, indices: Sequence[int]) -> list[list[int]]:
        """The same indices, in parts that fit into one pass."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {"head.weight": self.reward.head.weight}

    @abstractmethod
    def train(self, on: bool) -> None:
        """Switch dropout on or off, where there is some."""

    def rewards(self, indices: Sequence[int]) -> Float[Tensor, "pairs 2"]:
        """R of both responses, in nats."""
        return self.offset[list(indices)] + self.reward.head(self.features(indices)).cpu().double()

    @torch.no_grad()
    def final(self, indices: Sequence[int]) -> Float[Tensor, "pairs 2 width"]:
        """Features by the trunk as it is now, in order, without gradient."""
        found = torch.zeros(len(indices), *self.start.shape[1:], device=self.start.device)
        place = {index: number for number, index in enumerate(indices)}
        for part in self.parts(indices):
            found[torch.tensor([place[i] for i in part])] = self.features(part)
        return found


class Cached(Items):
    """A frozen backbone: the features never change."""

    stage = "head"

    def features(self, indices: Sequence[int]) -> Float[Tensor, "pairs 2 width"]:
        """From the cache."""
        return self.start[list(indices)]

    def parts(self, indices: Sequence[int]) -> list[list[int]]:
        """All at once."""
        return [list(indices)]

    def train(self, on: bool) -> None:
        """A cache has no dropout."""


class Live(Items):
    """A backbone that is trained along."""

    stage = "all"

    def parameters(self) -> dict[str, nn.Parameter]:
        """The head and what of the trunk is not frozen."""
        return super().parameters() | self.reward.trained()

    def train(self, on: bool) -> None:
        """The trunk's dropout."""
        self.reward.trunk.train(on)

    def features(self, indices: Sequence[int]) -> Float[Tensor, "pairs 2 width"]:
        """By a pass of the trunk."""
        return self.reward.features([self.groups[i] for i in indices]).view(len(indices), 2, -1)

    def parts(self, indices: Sequence[int]) -> list[list[int]]:
        """By the token budget."""
        chosen = [self.groups[i] for i in indices]
        return [[indices[i] for i in batch] for batch in micro_batches(chosen, self.reward.token_budget)]


@dataclass
class Fit:
    """Minimise mean NLL + ridge/2n |w|² over the training pairs; keep what predicts the held-out pairs best."""

    items: Items
    labels: Float[Tensor, "pairs"]
    train: int
    plan: Plan
    settings: Any
    history: list[dict[str, Any]] = field(default_factory=list)

    def run(self, seed: int) -> None:
        """Epochs of minibatches, each followed by an evaluation; the start is a candidate too. Raises RewardError."""
        parameters, epochs = self.items.parameters(), self.plan.epochs
        optimizer = torch.optim.AdamW(parameters.values(), lr=self.plan.learning_rate, weight_decay=0.0)
        steps = epochs * math.ceil(self.train / self.settings.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        order = torch.Generator().manual_seed(seed)
        best = self._evaluate(0, {})
        kept, waited = _copy(parameters), 0
        with progress("reward: train", epochs) as advance:
            for epoch in range(1, epochs + 1):
                loss = self._epoch(optimizer, schedule, order)
                found = self._evaluate(epoch, {"train_nll": loss})
                advance(epoch, note=f"held-out NLL {found:.4f}")
                if found < best:
                    best, kept, waited = found, _copy(parameters), 0
                else:
                    waited += 1
                if waited >= self.settings.patience:
                    break
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)

    def loss(self, indices: Sequence[int], of: int) -> Float[Tensor, ""]:
        """The share of these pairs in the mean NLL of `of` pairs (eq. 9), in nats."""
        nll = bradley_terry_nll(self.items.rewards(indices), self.labels[list(indices)])
        return nll.sum() / of

    def ridge(self) -> Float[Tensor, ""]:
        """The prior on the head: ridge/2n |w|²."""
        return self.plan.ridge / (2 * self.train) * self.items.reward.head.weight.square().sum()

    def held_nll(self) -> Estimate:
        """Mean NLL of the held-out pairs, in nats, with its standard error."""
        return mean_and_se(bradley_terry_nll(self.held_rewards(), self.labels[self.train :]))

    @torch.no_grad()
    def held_rewards(self) -> Float[Tensor, "held 2"]:
        """Rewards of the held-out pairs, in nats."""
        features = self.items.final(range(self.train, len(self.labels)))
        return self.items.offset[self.train :] + self.items.reward.head(features).cpu().double()

    def _epoch(self, optimizer: Any, schedule: Any, order: torch.Generator) -> float:
        total = 0.0
        self.items.train(True)
        for batch in torch.randperm(self.train, generator=order).split(self.settings.batch_size):
            for part in self.items.parts(batch.tolist()):
                loss = self.loss(part, len(batch))
                loss.backward()
                total += float(loss.detach()) * len(batch)
            self.ridge().backward()
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        self.items.train(False)
        return total / self.train

    def _evaluate(self, epoch: int, more: dict[str, float]) -> float:
        nll, se, n = self.held_nll()
        if not math.isfinite(nll):
            cause = "lower reward.train.learning_rate" if epoch else "the model itself gives no numbers: take another"
            raise RewardError(f"reward.train: the held-out loss is {nll} after {epoch} epochs; {cause}")
        self.history.append(
            {"stage": self.items.stage, "epoch": epoch, **more, "held_nll": nll, "held_nll_se": se, "n": n}
        )
        return nll


def _copy(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def measure(rewards: Float[Tensor, "pairs 2"], probability: Float[Tensor, "pairs"]) -> dict[str, Estimate]:
    """Accuracy, NLL (nats) and expected calibration error of rewards on labelled pairs, soft labels honoured.

    Calibration compares how sure the reward is of the response it prefers with how often that is preferred; its error
    is a jackknife over pairs (over blocks of them, where there are many).
    """
    logit = rewards[:, 0] - rewards[:, 1]
    right = torch.where(logit > 0, probability, torch.where(logit < 0, 1 - probability, 0.5))
    sure = logit.abs().sigmoid()
    blocks = torch.stack([sure, right], -1).split(math.ceil(len(logit) / _BLOCKS))

    def ece(parts: list[Tensor]) -> float:
        return expected_calibration_error(*torch.cat(parts).unbind(1))

    found = jackknife(ece, list(blocks))
    return {
        "accuracy": mean_and_se(right),
        "nll": mean_and_se(bradley_terry_nll(rewards, probability)),
        "ece": Estimate(found.mean, found.se, len(logit)),
    }
