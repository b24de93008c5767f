"""Training a reward model on pairs by maximum likelihood (eq. 9).

With a frozen backbone the head is the most probable one under a Gaussian prior, whose strength, like the kind of head,
is chosen by the pairs' evidence: an error of a reward is divided by γ, and held-out label likelihood hardly sees it.
LoRA and full training start from that head and fine-tune both, stopped where held-out pairs are predicted best (linear
probing, then fine-tuning: arXiv 2202.10054).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distalign.data import EncodedPair, independent
from distalign.engine import Group, micro_batches
from distalign.errors import InputError
from distalign.methods.preference import bradley_terry_nll
from distalign.models.load import Source
from distalign.models.policy import make_policy
from distalign.models.quantized import is_quantized
from distalign.progress import progress
from distalign.rewards.base import RewardError
from distalign.rewards.heads import HeadName, Tilt, embeddings, new_head
from distalign.rewards.reward_model import RewardTraining, Trained, TrainedReward, as_classifier
from distalign.stats.calibration import expected_calibration_error
from distalign.stats.intervals import Estimate, by_cluster, clusters_of, jackknife, mean_and_se
from distalign.stats.laplace import Posterior, fit_posterior

_BLOCKS = 100  # the jackknife of the calibration error leaves out one of so many blocks of prompts


# What null settings stand for.
_LEARNING_RATES, _EPOCHS = {"lora": 3e-4, "full": 3e-5}, 3

_SUBSET = 512  # pairs on which heads and their priors are compared
_STRONG = 3.0  # nats of evidence, a factor of 20
_LARGEST = 2**29  # features of all responses that are held in memory, of token counts
_CHEAP = 2e9  # logits of one pass over the pairs, up to which the tilt is tried


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
    """Train a reward on `train`, measure it on `held`, and save it if there is a `folder`.

    The settings' own `gamma`, if given, comes before the argument. `base` is frozen and stays as it is. The same seed
    gives the same reward on one machine. Raises RewardError for fewer than two held-out pairs, no `gamma` where it is
    needed, or a model without a sequence-classification class (init: scratch).
    """
    if not train or len(held) < 2:
        raise RewardError(
            f"reward.train: {len(train)} training and {len(held)} held-out pairs; those measure it: give "
            "data.eval, or a larger data.held_out"
        )
    if is_quantized(base):
        settings.check_4bit()
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

    def make(name: HeadName) -> TrainedReward:
        return TrainedReward(base, trunk, new_head(name, base), gamma=gamma, token_budget=token_budget)

    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in (*train, *held)]
    labels = torch.tensor([pair.label for pair in (*train, *held)]).double()
    n = len(train)
    offset = make("last" if settings.init == "scratch" else "hidden").values(groups).view(-1, 2)
    clusters = clusters_of(independent(held))
    start = mean_and_se(by_cluster(bradley_terry_nll(offset[n:], labels[n:]), clusters))
    if not bool(offset.isfinite().all()):
        raise RewardError("reward.train: the model itself gives no finite log-probabilities; take another")
    name, reward, posterior, history = choose_head(settings, make, groups[:n], labels[:n])
    if settings.backbone != "frozen":
        fit = Fit(reward, groups, offset, labels, n, settings, posterior.precision, history)
        with _seeded(base, seed):
            fit.run(seed)
    reward.head.finish(reward.encode(groups[:n])[1].view(n, 2, -1))
    results = {**measure(reward.values(groups[n:]).view(-1, 2), labels[n:], clusters), "start_nll": start}
    made_of = settings, source, tokenizer, list(train), list(held)
    trained = Trained(reward, name, results, history, posterior, *made_of)
    if folder is not None:
        trained.save(folder)
    return trained


@contextmanager
def _seeded(base: PreTrainedModel, seed: int) -> Iterator[None]:
    """New adapters and dropout follow the seed; the global random state is left alone."""
    with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def fit_head(
    reward: TrainedReward,
    groups: Sequence[Group],
    labels: Float[Tensor, "pairs"],
    precision: float | None,
    *,
    steps: int = 3,
    near: float | None = None,
) -> Posterior:
    """Give the head its most probable weights; the posterior that it comes from (of `precision`, or by the evidence).

    A head that is not linear takes Gauss-Newton `steps`, each of which is this problem for its derivative.
    """
    with progress("reward: encode pairs", len(groups)) as advance:
        offset, features = reward.encode(groups, advance)
    head = reward.head
    if not bool(head.weight.any()):
        head.standardise(features.view(len(groups), 2, -1))
    for _ in range(steps if isinstance(head, Tilt) else 1):
        values, rows = reward.linearise(groups, offset, features)
        values, rows = values.view(-1, 2), rows.view(len(groups), 2, -1).cpu()
        rows = rows[:, 0] - rows[:, 1]
        rest = values[:, 0] - values[:, 1] - rows.double() @ head.weight.detach().cpu().double()
        posterior = fit_posterior(rows, labels, rest, precision, near=near)
        precision = posterior.precision
        with torch.no_grad():
            head.weight.copy_(posterior.mean)
    return posterior


def choose_head(
    settings: RewardTraining,
    make: Callable[[HeadName], TrainedReward],
    groups: Sequence[Group],
    labels: Float[Tensor, "pairs"],
) -> tuple[HeadName, TrainedReward, Posterior, list[dict[str, Any]]]:
    """The head that the evidence of (at most `_SUBSET`) pairs speaks for, fitted on all; and what each one had.

    The first that is possible is taken unless another has `_STRONG` nats more: it is the one that is a language model.
    """
    tried: dict[HeadName, tuple[TrainedReward, Posterior]] = {}
    some = groups[:_SUBSET]
    for name in _candidates(settings, groups, make("hidden").base):
        try:
            reward = make(name)
            tried[name] = reward, fit_head(reward, some, labels[:_SUBSET], settings.weight_decay)
        except InputError as error:  # a model whose logits take no bias
            if settings.head == name:
                raise RewardError(f"reward.train: head is {name}: {error}") from error
    first, best = next(iter(tried)), max(tried, key=lambda name: tried[name][1].evidence)
    name: HeadName = best if tried[best][1].evidence > tried[first][1].evidence + _STRONG else first
    reward, posterior = tried[name]
    history = [{"head": key, "evidence": p.evidence, "precision": p.precision} for key, (_, p) in tried.items()]
    if len(groups) > _SUBSET:
        # More pairs speak for their own prior, which is as a rule a stronger one.
        posterior = fit_head(reward, groups, labels, settings.weight_decay, steps=2, near=posterior.precision)
    return name, reward, posterior, history


def _candidates(settings: RewardTraining, groups: Sequence[Group], base: PreTrainedModel) -> list[HeadName]:
    """The heads to try. Raises RewardError for one that is asked for and has no room."""
    vocabulary = len(embeddings(base))
    room = 2 * len(groups) * vocabulary <= _LARGEST
    if settings.head in ("tilt", "counts") and not room:
        raise RewardError(
            f"reward.train: head is {settings.head}, whose features are {2 * len(groups)} responses by {vocabulary} "
            f"tokens; take head: hidden, or at most {_LARGEST // (2 * vocabulary)} pairs (data.limit)"
        )
    if settings.init == "scratch":
        return ["last"]
    if settings.head != "auto":
        return [settings.head]
    if settings.backbone != "frozen" or not room:
        return ["hidden"]
    logits = sum(len(response) for group in groups[:_SUBSET] for response in group.responses) * vocabulary
    return ["tilt", "counts", "hidden"] if logits < _CHEAP else ["counts", "hidden"]


@dataclass
class Fit:
    """Fine-tune head and trunk: minimise mean NLL + λ/2n |w|²; keep the epoch that predicts the held-out pairs best.

    The first `n_train` pairs are trained on. `offset` is γ ln π₀, λ the precision of the head's prior.
    """

    reward: TrainedReward
    groups: list[Group]
    offset: Float[Tensor, "pairs 2"]
    labels: Float[Tensor, "pairs"]
    n_train: int
    settings: RewardTraining
    precision: float
    history: list[dict[str, Any]] = field(default_factory=list)

    def run(self, seed: int) -> None:
        """Epochs of minibatches, each followed by an evaluation; the start is a candidate too. Raises RewardError."""
        parameters, epochs = self.parameters(), self.settings.epochs or _EPOCHS
        learning_rate = self.settings.learning_rate or _LEARNING_RATES[self.settings.backbone]
        optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0)
        steps = epochs * math.ceil(self.n_train / self.settings.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        order = torch.Generator().manual_seed(seed)
        best, best_epoch, best_values = self._evaluate(0, {}), 0, _copy(parameters)
        with progress("reward: train", epochs) as advance:
            for epoch in range(1, epochs + 1):
                train_nll = self._epoch(optimizer, schedule, order)
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
        """What is trained, by name: the head, and what of the trunk is not frozen."""
        return {"head.weight": self.reward.head.weight} | self.reward.trained_parameters()

    def parts(self, indices: Sequence[int]) -> list[list[int]]:
        """The same indices, in parts that fit into one pass."""
        batches = micro_batches([self.groups[i] for i in indices], self.reward.token_budget)
        return [[indices[i] for i in batch] for batch in batches]

    def rewards(self, indices: Sequence[int]) -> Float[Tensor, "pairs 2"]:
        """R of both responses in nats, with gradient."""
        features = self.reward.features([self.groups[i] for i in indices]).view(len(indices), 2, -1)
        return self.offset[list(indices)] + self.reward.head(features).cpu().double()

    def loss(self, indices: Sequence[int], of: int) -> Float[Tensor, ""]:
        """The share of these pairs in the mean NLL of `of` pairs (eq. 9), in nats."""
        return bradley_terry_nll(self.rewards(indices), self.labels[list(indices)]).sum() / of

    def _epoch(
        self, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, order: torch.Generator
    ) -> float:
        """One pass over the training pairs: their mean NLL on the way."""
        head, total = self.reward.head, 0.0
        self.reward.trunk.train()
        for batch in torch.randperm(self.n_train, generator=order).split(self.settings.batch_size):
            for part in self.parts(batch.tolist()):
                loss = self.loss(part, len(batch))
                loss.backward()
                total += float(loss.detach()) * len(batch)
            (self.precision / (2 * self.n_train) * head.weight.square().sum()).backward()
            nn.utils.clip_grad_norm_(self.parameters().values(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        self.reward.trunk.eval()
        return total / self.n_train

    def _evaluate(self, epoch: int, more: dict[str, float]) -> float:
        held = self.groups[self.n_train :]
        nll, se, n = mean_and_se(bradley_terry_nll(self.reward.values(held).view(-1, 2), self.labels[self.n_train :]))
        if not math.isfinite(nll):
            raise RewardError(
                f"reward.train: the held-out loss is {nll} after {epoch} epochs; lower reward.train.learning_rate"
            )
        self.history.append({"epoch": epoch, **more, "held_nll": nll, "held_nll_se": se, "n": n})
        return nll


def _copy(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def measure(
    rewards: Float[Tensor, "pairs 2"], probability: Float[Tensor, "pairs"], clusters: Sequence[list[int]]
) -> dict[str, Estimate]:
    """Accuracy, NLL (nats) and expected calibration error of rewards on labelled pairs, soft labels honoured.

    Calibration compares how sure the reward is of the response it prefers with how often that is preferred. Errors are
    over prompts, of which each has a cluster of pairs; that of calibration is a jackknife (over blocks of many).
    """
    logit = rewards[:, 0] - rewards[:, 1]
    right = torch.where(logit > 0, probability, torch.where(logit < 0, 1 - probability, 0.5))
    sure = logit.abs().sigmoid()
    size = math.ceil(len(clusters) / _BLOCKS)
    rows = torch.stack([sure, right], -1)
    blocks = [rows[list(chain(*clusters[i : i + size]))] for i in range(0, len(clusters), size)]

    def ece(parts: list[Tensor]) -> float:
        return expected_calibration_error(*torch.cat(parts).unbind(1))

    error = jackknife(ece, blocks)
    return {
        "accuracy": mean_and_se(by_cluster(right, clusters)),
        "nll": mean_and_se(by_cluster(bradley_terry_nll(rewards, probability), clusters)),
        "ece": Estimate(error.mean, error.se, len(clusters)),
    }
