"""Training a reward model on pairs by maximum likelihood (eq. 9), stopped where held-out pairs are predicted best.

With a frozen backbone the features of every response are computed once, and what is left takes seconds. LoRA and full
training start from the head that this gives, and run the same loop with the model in it (linear probing, then fine-
tuning: arXiv 2202.10054).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distalign.data import EncodedPair
from distalign.engine import Group, micro_batches
from distalign.methods.preference import bradley_terry_nll
from distalign.models.load import Source
from distalign.models.policy import make_policy
from distalign.progress import progress
from distalign.rewards.base import RewardError
from distalign.rewards.reward_model import (
    Origin,
    RewardTraining,
    TrainedReward,
    as_classifier,
    new_head,
    save_reward,
)
from distalign.stats.calibration import expected_calibration_error
from distalign.stats.intervals import Estimate, jackknife, mean_and_se

_BLOCKS = 100  # the jackknife of the calibration error leaves out one of so many blocks of pairs


@dataclass(frozen=True)
class Plan:
    """How fast and how long; `ridge` is the strength of the prior on the head."""

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
    per evaluation.
    """

    reward: TrainedReward
    results: dict[str, Estimate]
    history: list[dict[str, Any]]
    origin: Origin

    def save(self, folder: str | Path) -> None:
        """Weights as safetensors, reward.json, results.json and a card; what `load_reward` reads."""
        save_reward(Path(folder), self.reward, self.results, self.history, self.origin)


def train_reward(
    settings: RewardTraining,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    train: Sequence[EncodedPair],
    held: Sequence[EncodedPair],
    *,
    gamma: float | None,
    token_budget: int,
    seed: int,
    folder: str | Path | None = None,
) -> Trained:
    """Train a reward on `train`, stop by `held`, and save it if there is a `folder`.

    The settings' own `gamma`, if given, comes before the argument. `base` is frozen and stays as it is. The same seed
    gives the same reward on one machine. Raises RewardError for fewer than two held-out pairs, no `gamma` where it is
    needed, or a model without a sequence-classification class (init: scratch).
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
        as_classifier(base)  # refuse now what could not be saved
    trunk = base
    if settings.backbone != "frozen":
        lora = settings.lora if settings.backbone == "lora" else None
        with _seeded(base, seed):
            trunk = make_policy(base, tokenizer, source, lora=lora, reference=False).model
    reward = TrainedReward(base, trunk, new_head(settings.init, base), gamma=gamma, token_budget=token_budget)
    fit = make_fit(reward, train, held, settings)
    start = fit.held_nll()
    for stage, plan in enumerate(_plans(settings)):
        fit.live = stage > 0
        with _seeded(base, seed):
            fit.run(plan, seed)
    reward.head.finish(fit.features(range(fit.n_train)))
    results = {**measure(fit.held_rewards(), fit.labels[fit.n_train :]), "start_nll": start}
    origin = Origin(settings, gamma, source, tokenizer, list(train), list(held))
    trained = Trained(reward, results, fit.history, origin)
    if folder is not None:
        trained.save(folder)
    return trained


def _plans(settings: RewardTraining) -> list[Plan]:
    """The head on cached features; then, unless the backbone is frozen, both, which is what the settings are for."""
    given = {"learning_rate": settings.learning_rate, "epochs": settings.epochs, "ridge": settings.weight_decay}
    last = replace(PLANS[settings.backbone], **{key: value for key, value in given.items() if value is not None})
    return [last] if settings.backbone == "frozen" else [replace(PLANS["frozen"], ridge=last.ridge), last]


@contextmanager
def _seeded(base: PreTrainedModel, seed: int) -> Iterator[None]:
    """New adapters and dropout follow the seed; the global random state is left alone."""
    with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def make_fit(
    reward: TrainedReward, train: Sequence[EncodedPair], held: Sequence[EncodedPair], settings: RewardTraining
) -> Fit:
    """The training problem, with γ ln π₀ and the features of the untrained trunk computed, the head standardised."""
    pairs = [*train, *held]
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]
    with progress("reward: encode pairs", len(groups)) as advance:
        offset, features = reward.encode(groups, advance)
    features = features.view(len(groups), 2, -1)
    reward.head.standardise(features[: len(train)])
    labels = torch.tensor([1.0 if pair.probability is None else pair.probability for pair in pairs]).double()
    return Fit(reward, groups, offset.view(-1, 2), features, labels, len(train), settings)


@dataclass
class Fit:
    """Minimise mean NLL + ridge/2n |w|² over the training pairs; keep what predicts the held-out pairs best.

    The first `n_train` pairs are trained on. `offset` is γ ln π₀ and `cached` are the features by the trunk as it
    started; while `live` the trunk is trained too, and features come from a pass of it.
    """

    reward: TrainedReward
    groups: list[Group]
    offset: Float[Tensor, "pairs 2"]
    cached: Float[Tensor, "pairs 2 width"]
    labels: Float[Tensor, "pairs"]
    n_train: int
    settings: RewardTraining
    live: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)

    def run(self, plan: Plan, seed: int) -> None:
        """Epochs of minibatches, each followed by an evaluation; the start is a candidate too. Raises RewardError."""
        parameters = self.parameters()
        optimizer = torch.optim.AdamW(parameters.values(), lr=plan.learning_rate, weight_decay=0.0)
        steps = plan.epochs * math.ceil(self.n_train / self.settings.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        order = torch.Generator().manual_seed(seed)
        best, best_epoch, best_values = self._evaluate(0, {}), 0, _copy(parameters)
        with progress("reward: train", plan.epochs) as advance:
            for epoch in range(1, plan.epochs + 1):
                train_nll = self._epoch(optimizer, schedule, order, plan.ridge)
                nll = self._evaluate(epoch, {"train_nll": train_nll})
                advance(epoch, note=f"held-out NLL {nll:.4f}")
                if nll < best:
                    best, best_epoch, best_values = nll, epoch, _copy(parameters)
                if epoch - best_epoch >= self.settings.patience:
                    break
        with torch.no_grad():
            for name, value in best_values.items():
                parameters[name].copy_(value)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: the head and, while `live`, what of the trunk is not frozen."""
        return {"head.weight": self.reward.head.weight} | (self.reward.trained_parameters() if self.live else {})

    def parts(self, indices: Sequence[int]) -> list[list[int]]:
        """The same indices, in parts that fit into one pass."""
        if not self.live:
            return [list(indices)]
        batches = micro_batches([self.groups[i] for i in indices], self.reward.token_budget)
        return [[indices[i] for i in batch] for batch in batches]

    def rewards(self, indices: Sequence[int]) -> Float[Tensor, "pairs 2"]:
        """R of both responses in nats, with gradient."""
        return self.offset[list(indices)] + self.reward.head(self._features(indices)).cpu().double()

    def loss(self, indices: Sequence[int], of: int) -> Float[Tensor, ""]:
        """The share of these pairs in the mean NLL of `of` pairs (eq. 9), in nats."""
        return bradley_terry_nll(self.rewards(indices), self.labels[list(indices)]).sum() / of

    @torch.no_grad()
    def features(self, indices: range) -> Float[Tensor, "pairs 2 width"]:
        """Features by the trunk as it is now, in parts, without gradient."""
        features = torch.zeros_like(self.cached[indices.start : indices.stop])
        for part in self.parts(indices):
            features[[i - indices.start for i in part]] = self._features(part)
        return features

    def _features(self, indices: Sequence[int]) -> Float[Tensor, "pairs 2 width"]:
        """Features in one pass, with gradient where the trunk is trained."""
        if not self.live:
            return self.cached[list(indices)]
        return self.reward.features([self.groups[i] for i in indices]).view(len(indices), 2, -1)

    def held_nll(self) -> Estimate:
        """Mean NLL of the held-out pairs, in nats, with its standard error."""
        return mean_and_se(bradley_terry_nll(self.held_rewards(), self.labels[self.n_train :]))

    @torch.no_grad()
    def held_rewards(self) -> Float[Tensor, "held 2"]:
        """Rewards of the held-out pairs, in nats."""
        features = self.features(range(self.n_train, len(self.labels)))
        return self.offset[self.n_train :] + self.reward.head(features).cpu().double()

    def _epoch(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        order: torch.Generator,
        ridge: float,
    ) -> float:
        """One pass over the training pairs: their mean NLL on the way."""
        head, total = self.reward.head, 0.0
        self._set_training(True)
        for batch in torch.randperm(self.n_train, generator=order).split(self.settings.batch_size):
            for part in self.parts(batch.tolist()):
                loss = self.loss(part, len(batch))
                loss.backward()
                total += float(loss.detach()) * len(batch)
            (ridge / (2 * self.n_train) * head.weight.square().sum()).backward()
            nn.utils.clip_grad_norm_(self.parameters().values(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        self._set_training(False)
        return total / self.n_train

    def _set_training(self, on: bool) -> None:
        """The trunk's dropout, where it is trained."""
        if self.live:
            self.reward.trunk.train(on)

    def _evaluate(self, epoch: int, more: dict[str, float]) -> float:
        nll, se, n = self.held_nll()
        if not math.isfinite(nll):
            cause = "lower reward.train.learning_rate" if epoch else "the model itself gives no numbers: take another"
            raise RewardError(f"reward.train: the held-out loss is {nll} after {epoch} epochs; {cause}")
        stage = "all" if self.live else "head"
        self.history.append({"stage": stage, "epoch": epoch, **more, "held_nll": nll, "held_nll_se": se, "n": n})
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

    error = jackknife(ece, list(blocks))
    return {
        "accuracy": mean_and_se(right),
        "nll": mean_and_se(bradley_terry_nll(rewards, probability)),
        "ece": Estimate(error.mean, error.se, len(logit)),
    }
