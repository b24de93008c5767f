"""The acting half of a training step: draw a round's responses, reward and score them once, hand them out in batches.

The buffer of the round is state: it is saved with every checkpoint, and before a reward that fails stops the run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distalign.data import plain_text
from distalign.engine import Group, Scores, score_in_batches
from distalign.engine.forward import evaluating
from distalign.methods import Method, Samples
from distalign.models.policy import Policy
from distalign.training.buffer import FILE as ROLLOUT
from distalign.training.buffer import Buffer
from distalign.training.health import Monitor, completion_metrics, write_completions
from distalign.training.prompts import Collected
from distalign.training.rounds import Rollout, RoundBatches, mix

MONITOR, VALUES, COUNTS = "health.json", "value_head.safetensors", "reward_counts.json"


class Actor:
    """Rounds of one run. `note(metrics, weight)` takes numbers of a round for the next log line.

    `rows` are the prompts (or labelled pairs) of the run by number; `args` are the TrainingArguments. Models run inside
    `autocast()`, rewards do not. `batches` says which rows are together in a round.
    """

    def __init__(
        self,
        policy: Policy,
        method: Method,
        rollout: Rollout,
        rows: Sequence[Any],
        *,
        args: Any,
        token_budget: int,
        monitor: Monitor | None,
        note: Callable[[dict[str, float], int], None],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.policy, self.method, self.rollout, self.rows = policy, method, rollout, rows
        self.accumulated, self.token_budget, self.seed = args.gradient_accumulation_steps, token_budget, args.seed
        self.monitor, self.note, self.autocast = monitor, note, autocast
        self.batches = RoundBatches(
            len(rows),
            batch_size=args.per_device_train_batch_size,
            batches=rollout.settings.minibatches * self.accumulated,
            inner_epochs=rollout.settings.inner_epochs,
            seed=self.seed,
        )
        self.buffer: Buffer | None = None
        self._facts = {} if rollout.reward is None else rollout.reward.counters()
        self._start, self._told = 0, -1
        self._seen: list[dict[str, Tensor]] = []

    # A round ----------------------------------------------------------------------------------------------------------

    def enter(self, model: nn.Module, indices: Sequence[int], step: int, samples_file: Path) -> None:
        """See to it that the round of these rows is drawn, rewarded and scored. Raises RewardError.

        `step` is the number of optimizer steps done. What was drawn before a reward failed is in `buffer`.
        """
        number, members = self.batches.round_of(indices[0])
        rows = [self.rows[index] for index in members]
        if self.buffer is None or self.buffer.round != number:
            started = time.perf_counter()
            with self.autocast():
                self.buffer = self.rollout.draw(model, rows, list(members), seed=self.seed, number=number)
            self._start, self._seen = step, []
            self.note({"rollout_time": time.perf_counter() - started}, 1)
        buffer = self.buffer
        buffer.position = step - self._start
        # A run that goes on may find a part of this done.
        if self.method.needs.reward and "rewards" not in buffer.tensors:
            started = time.perf_counter()
            buffer.add("rewards", self.rollout.judge(buffer, rows))
            self.note({"reward_time": time.perf_counter() - started}, 1)
            self.note(self._reward_facts(), 0)
        self._score(model, buffer)
        if self._told != number:
            self._told = number
            self._tell(buffer, step, samples_file)

    def _several_steps(self, buffer: Buffer) -> bool:
        """Whether the policy moves while the round is used: then it has to be known what drew the responses."""
        return self.batches.batches_of(buffer.indices) > self.accumulated or self.method.needs.values

    def _score(self, model: nn.Module, buffer: Buffer) -> None:
        """Log-probabilities of the responses where they are wanted: of what drew them, and of the reference."""
        needs, several, known = self.method.needs, self._several_steps(buffer), buffer.tensors
        drawn = several and "behavior_token_logps" not in known
        # With the full KL of a single step its own pass says what is logged of the reference.
        wanted = (several or not needs.kl) and "reference_token_logps" not in known
        reference = self.policy.reference if wanted else None
        if reference is not None and not drawn:
            with self.policy.as_reference() as original:
                buffer.add("reference_token_logps", self._scores(original, buffer).token_logps.cpu())
        if drawn:
            value_head = self.policy.value_head if needs.values else None
            found = self._scores(model, buffer, reference=reference, value_head=value_head)
            if found.reference_token_logps is not None:
                buffer.add("reference_token_logps", found.reference_token_logps.cpu())
            buffer.add("behavior_token_logps", found.token_logps.cpu())
            if needs.values:
                self._give_credit(buffer, found)

    def _scores(self, model: nn.Module, buffer: Buffer, **settings: Any) -> Scores:
        groups = [Group(p, r) for p, r in zip(buffer.prompts, buffer.responses, strict=True)]
        settings |= {"token_budget": self.token_budget, "temperature": self.rollout.settings.temperature}
        with self.autocast(), evaluating(model):
            return score_in_batches(model, groups, **settings)

    def _give_credit(self, buffer: Buffer, found: Scores) -> None:
        kept = {name: rows.to(found.token_logps) for name, rows in buffer.tensors.items()}
        kept["behavior_token_logps"] = found.token_logps
        assert found.values is not None
        samples = Samples(found.token_logps, found.mask, group=found.group, values=found.values, **kept)
        advantages, returns = self.method.credit(samples)
        buffer.add("advantages", advantages.cpu())
        buffer.add("returns", returns.cpu())

    # A batch of it ----------------------------------------------------------------------------------------------------

    def collect(self, model: nn.Module, indices: Sequence[int], step: int) -> list[Collected]:
        """The drawn responses of these rows with their constants; fresh ones beside them if the policy has moved."""
        assert self.buffer is not None
        needs, buffer = self.method.needs, self.buffer
        places = [buffer.find(index) for index in indices]
        fresh: list[list[list[int]]] = [[] for _ in places]
        if needs.samples and step > self._start and self.rollout.settings.stale == "resample":
            # Batches of one optimizer step draw by different random numbers.
            number = mix(buffer.round, step - self._start, indices[0])
            prompts = [buffer.prompts[place] for place in places]
            with self.autocast():
                fresh = self.rollout.sample(model, prompts, seed=self.seed + 1, number=number)
        found = []
        for place, own in zip(places, fresh, strict=True):
            # Fresh responses take the place of drawn ones, unless pairs are made of these.
            drawn = buffer.responses[place] if needs.pairs == "sampled" or not own else []
            tensors = {name: rows[buffer.rows(place)] for name, rows in buffer.tensors.items()} if drawn else {}
            group = Group(buffer.prompts[place], [*drawn, *own])
            found.append(Collected(group, drawn=len(drawn), fresh=len(own), tensors=tensors))
        return found

    def saw(self, scores: Scores, collected: Sequence[Collected], step: int) -> None:
        """Note what a training pass says of responses that the present policy drew, if no pass before it did."""
        assert self.buffer is not None
        if "behavior_token_logps" in self.buffer.tensors or step > self._start:
            return
        first = collected[0]
        each = first.labelled + first.drawn + first.fresh
        rows = torch.arange(len(scores.mask), device=scores.mask.device).view(-1, each)[:, first.labelled :].reshape(-1)
        seen = {"logps": scores.logps.detach()[rows].cpu()}
        if scores.step_kl is not None:
            seen["kl"] = scores.step_kl.detach().sum(-1)[rows].cpu()
        elif "reference_token_logps" in self.buffer.tensors:
            reference = torch.cat([one.tensors["reference_token_logps"].double().sum(-1) for one in collected])
            seen["kl"] = seen["logps"] - reference
        self._seen.append(seen)

    # Telling ----------------------------------------------------------------------------------------------------------

    def finish_batch(self, step: int) -> None:
        """Note entropy, KL and health of the round, once all of it has been seen."""
        assert self.buffer is not None
        total = self.buffer.starts[-1]
        if self._seen and sum(len(seen["logps"]) for seen in self._seen) == total:
            self._objective({name: torch.cat([seen[name] for seen in self._seen]) for name in self._seen[0]}, step)
            self._seen = []

    def _tell(self, buffer: Buffer, step: int, samples_file: Path) -> None:
        shown = range(min(self.rollout.settings.show, len(buffer)))
        rewards = buffer.tensors.get("rewards")
        texts = [
            (
                self._prompt(buffer, i),
                [self._text(own) for own in buffer.responses[i]],
                None if rewards is None else rewards[buffer.rows(i)].tolist(),
            )
            for i in shown
        ]
        if texts:
            write_completions(samples_file, step, texts)
        if "behavior_token_logps" not in buffer.tensors:
            return
        logps = buffer.tensors["behavior_token_logps"].double().sum(-1)
        found = {"logps": logps}
        if "reference_token_logps" in buffer.tensors:
            found["kl"] = logps - buffer.tensors["reference_token_logps"].double().sum(-1)
        self._objective(found, step)

    def _objective(self, found: dict[str, Float[Tensor, "responses"]], step: int) -> None:
        assert self.buffer is not None
        rewards = self.buffer.tensors.get("rewards")
        responses = [own for group in self.buffer.responses for own in group]
        metrics = {"objective/entropy": float(-found["logps"].mean())}
        if "kl" in found:
            metrics["objective/kl"] = float(found["kl"].mean())
        if rewards is not None:
            metrics["objective/reward"] = float(rewards.mean())
        metrics |= completion_metrics(responses, end_id=self.rollout.end_id, rewards=rewards)
        if self.monitor is not None:
            metrics |= self.monitor.update(metrics, step)
        self.note(metrics, 1)

    def _prompt(self, buffer: Buffer, i: int) -> str:
        row = self.rows[buffer.indices[i]].row
        return self._text(buffer.prompts[i]) if row is None else plain_text(row.prompt)

    def _text(self, ids: list[int]) -> str:
        tokenizer: Any = self.policy.tokenizer
        return tokenizer.decode(ids, skip_special_tokens=True)

    def _reward_facts(self) -> dict[str, float]:
        """What the reward counted in this run; it may have served others before."""
        facts = {} if self.rollout.reward is None else self.rollout.reward.counters()
        return {f"reward/{name}": value - self._facts.get(name, 0.0) for name, value in facts.items()}

    # State ------------------------------------------------------------------------------------------------------------

    def save(self, folder: Path, step: int) -> None:
        """Write the buffer, the value head, the monitor's memory and the reward's counts into a checkpoint."""
        if self.buffer is not None:
            self.buffer.position = step - self._start
            self.buffer.save(folder)
        if self.policy.value_head is not None:
            save_file(self.policy.value_head.state_dict(), folder / VALUES)
        if self.monitor is not None:
            (folder / MONITOR).write_text(json.dumps(self.monitor.state_dict()), encoding="utf-8")
        (folder / COUNTS).write_text(json.dumps(self._reward_facts()), encoding="utf-8")

    def load(self, folder: Path, step: int) -> None:
        """Go on from what `save` wrote. Raises InputError for a damaged file."""
        if (folder / ROLLOUT).is_file():
            self.buffer = Buffer.load(folder)
            self._start = step - self.buffer.position
            self._told = self.buffer.round if self.buffer.position > 0 else -1
        if self.policy.value_head is not None:
            self.policy.value_head.load_state_dict(load_file(folder / VALUES))
        if self.monitor is not None and (folder / MONITOR).is_file():
            self.monitor.load_state_dict(json.loads((folder / MONITOR).read_text(encoding="utf-8")))
        if (folder / COUNTS).is_file():
            told = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
            self._facts = {name: value - told.get(f"reward/{name}", 0.0) for name, value in self._facts.items()}


def effective_share(weights: Float[Tensor, "responses"]) -> float:
    """(Σ w)² / (n Σ w²): the share of the responses that still counts under these importance weights."""
    return float(weights.sum() ** 2 / (len(weights) * weights.square().sum()))


def observe(
    policy: Policy, rollout: Rollout, model: nn.Module, rows: Sequence[Any], limit: int, token_budget: int, seed: int
) -> dict[str, float]:
    """Draw a response to each of `limit` prompts, to look at: entropy, KL to the reference (nats), length, repetition.

    The first different ones that leave the model room to answer; empty if there is none.
    """
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    longest = positions - rollout.settings.max_new_tokens
    prompts = list({tuple(row.prompt): row.prompt for row in rows if len(row.prompt) <= longest}.values())[:limit]
    if not prompts:
        return {}
    responses = rollout.sample(model, prompts, seed=seed, number=0, n=1)
    groups = [Group(prompt, own) for prompt, own in zip(prompts, responses, strict=True)]
    settings: dict[str, Any] = {"token_budget": token_budget, "temperature": rollout.settings.temperature}
    with evaluating(model):
        logps = score_in_batches(model, groups, **settings).logps
    metrics = {"objective/entropy": float(-logps.mean())}
    if policy.reference is not None:
        with policy.as_reference() as original:
            metrics["objective/kl"] = float((logps - score_in_batches(original, groups, **settings).logps).mean())
    return metrics | completion_metrics([own for group in responses for own in group], end_id=rollout.end_id)
