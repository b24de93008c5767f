"""PD's pairs, wherever they come from: the expected loss by enumeration, and a run that draws from π₀ exactly once."""

from __future__ import annotations

import json
from functools import reduce
from itertools import product

import pytest
import tiny
import torch
from acting import METHODS, Warmth, metrics, parameters, prompts, trainer
from enumeration import Enumeration, gradient

from distalign.engine import Group, Scores
from distalign.methods import PD, Needs
from distalign.models.policy import Lora
from distalign.training.prompts import MicroBatch, PromptGroup, merge
from distalign.training.rollout_settings import TrainingError

GAMMA, BETA = 0.7, 0.4
MIXTURES = ("data", "reference", "policy", "data+reference", "data+policy", "reference+policy")


# The loss -------------------------------------------------------------------------------------------------------------


class Sources:
    """An enumerable policy and reference, a reward for every response, and one pair of the data."""

    def __init__(self):
        self.world = Enumeration(2, 3)
        self.policy, self.reference = self.world.parameters(0), self.world.parameters(1).detach()
        self.rewards = torch.randn(len(self.world.responses), generator=torch.Generator().manual_seed(2)).double()
        self.data = (3, 1)

    def loss(self, method, drawn):
        """The method's loss on one prompt, with these two responses of each source that draws."""
        rows, parts = [], []
        for source, part in (("labelled", self._labelled), ("reference", self._reference), ("sampled", self._drawn)):
            if source in method.needs.pairs or (source == "sampled" and method.needs.samples):
                chosen = self.data if source == "labelled" else drawn[source]
                rows += chosen
                parts.append(part(chosen))
        kl = self.world.step_kl(self.policy, self.reference)[rows].nan_to_num() if method.needs.kl else None
        scores = Scores(
            self.world.token_logps(self.policy)[rows].nan_to_num(),
            self.world.mask[rows],
            torch.zeros(len(rows), dtype=torch.long),
            step_kl=kl,
        )
        micro = MicroBatch([reduce(merge, parts)], 1.0)
        return method.loss(*micro.inputs(scores, method.needs, "all"))

    def _group(self, rows):
        return Group([1], [list(self.world.responses[row]) for row in rows])

    def _labelled(self, rows):
        return PromptGroup(self._group(rows), labelled=2, rewards=self.rewards[list(rows)])

    def _reference(self, rows):
        return PromptGroup(self._group(rows), reference=2, reference_constants={"rewards": self.rewards[list(rows)]})

    def _drawn(self, rows):
        return PromptGroup(self._group(rows), drawn=2, constants={"rewards": self.rewards[list(rows)]})

    def expected_loss(self, method):
        """Its mean over every draw of two responses by π₀ and of two by the policy."""
        n, total = len(self.world.responses), torch.zeros((), dtype=torch.float64)
        weights = {
            "reference": self.world.logps(self.reference).exp(),
            "sampled": self.world.logps(self.policy).exp().detach(),
        }
        used = [name for name in weights if name in method.needs.pairs or (name == "sampled" and method.needs.samples)]
        for rows in product(range(n), repeat=2 * len(used)):
            drawn = {name: rows[2 * i : 2 * i + 2] for i, name in enumerate(used)}
            weight = torch.stack([weights[name][list(two)].prod() for name, two in drawn.items()]).prod() if used else 1
            total = total + weight * self.loss(method, drawn)
        return total

    def exact(self, pairs, beta):
        """The mean over the sources of E[KL(Bern(p̃) ‖ Bern(σ(γ Δ ln π)))], and β KL(π ‖ π₀), as the paper has them."""
        logps, p = self.world.logps(self.policy), torch.sigmoid(self.rewards[:, None] - self.rewards)
        q = torch.sigmoid(GAMMA * (logps[:, None] - logps))
        divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        means = {
            "data": divergence[self.data],
            "reference": self._mean(divergence, self.world.logps(self.reference)),
            "policy": self._mean(divergence, logps.detach()),
        }
        kl = self.world.kl(self.policy, self.reference)
        return torch.stack([means[source] for source in pairs.split("+")]).mean() + beta * kl

    @staticmethod
    def _mean(divergence, logps):
        return logps.exp() @ divergence @ logps.exp()


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("pairs", MIXTURES)
def test_pairs_of_any_source_equal_enumeration(pairs, beta):
    """Theorems 6 and 14, algorithm 1, and two of them: value and gradient, with the KL term and without."""
    s = Sources()
    exact, estimate = s.exact(pairs, beta), s.expected_loss(PD(GAMMA, beta, pairs=pairs))
    torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient(estimate, s.policy), gradient(exact, s.policy), rtol=0, atol=1e-10)


# A run ----------------------------------------------------------------------------------------------------------------


class Counting(Warmth):
    """Counts the responses that it rewards."""

    def __init__(self):
        self.responses = 0

    def __call__(self, requests):
        """As Warmth."""
        self.responses += sum(len(request.responses) for request in requests)
        return super().__call__(requests)


@pytest.mark.parametrize("lora", [None, Lora(r=4, dropout=0.3)], ids=["full", "lora"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_reference_draws_and_is_rewarded_once(tmp_path, lora):
    """At β = 0 over three epochs: four responses to each prompt, the same on the same seed, printed once."""
    runs = []
    for name in ("a", "b"):
        reward = Counting()
        settings = {"lora": lora, "per_device_train_batch_size": 4, "max_steps": 6, "reward": reward}
        made = trainer(tmp_path / name, PD(0.5, 0.0, pairs="reference"), **settings)
        assert made.worker is None
        made.train()
        runs.append((made, made.reference_responses.round))
        assert reward.responses == 8 * 4
        lines = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        assert [(line["step"], len(line["responses"]), len(line["rewards"])) for line in lines] == [(0, 4, 4)]
        assert "rollout_time" not in metrics(tmp_path / name)[1]
    (first, drawn), (second, again) = runs
    assert drawn.responses == again.responses
    assert len({tuple(response) for group in drawn.responses for response in group}) > 8
    assert torch.equal(parameters(first), parameters(second))


def test_the_references_responses_are_those_of_the_start(tmp_path):
    """All weights trained and no reference kept, or one kept: the same responses, drawn before the first step."""
    made = [
        trainer(tmp_path / pairs, PD(0.5, beta, pairs=pairs), max_steps=3, num_iterations=3)
        for pairs, beta in (("reference", 0.0), ("reference+policy", 0.3))
    ]
    made[0].policy.reference = None
    for each in made:
        each.train()
    assert made[0].reference_responses.round.responses == made[1].reference_responses.round.responses
    assert made[1].worker.round.responses != made[1].reference_responses.round.responses


@pytest.mark.parametrize("name", ["pd-reference", "pd-data+reference"])
def test_a_run_goes_on_with_what_the_reference_drew(tmp_path, name):
    """Resumed in the middle it ends bit for bit where the other does, and what the reference drew keeps its rewards."""
    settings = {"per_device_train_batch_size": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "run", METHODS[name], reward=Counting(), **settings)
    whole.train()
    reward = Counting()
    again = trainer(tmp_path / "run", METHODS[name], reward=reward, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert torch.equal(parameters(again), parameters(whole))
    assert reward.responses <= (16 if "data" in name else 0)


def test_a_declared_reference_is_scored_for_its_own_pairs(tmp_path):
    """`reference` gives ln π₀ of what π₀ drew, which is also what drew it; undeclared fields stay away."""
    made = trainer(tmp_path, PD(0.5, 0.0, pairs="reference"))
    made.needs = made.reference_responses.needs = Needs(pairs="reference", reward=True, reference=True)
    made.model.eval()
    batch = made.collect(made.rows[:2], [0, 1]).prompts
    micro = MicroBatch(batch, 1.0)
    pairs, _ = micro.inputs(made.score([prompt.group for prompt in micro.prompts]), made.needs, "all")
    torch.testing.assert_close(pairs.reference_logps, pairs.logps.detach(), rtol=0, atol=1e-4)
    assert torch.equal(pairs.behavior_logps, pairs.reference_logps)
    without, _ = micro.inputs(
        made.score([prompt.group for prompt in micro.prompts]), Needs(pairs="reference", reward=True), "best_worst"
    )
    assert not hasattr(without, "reference_logps")
    assert without.logps.shape == (2, 2)
    assert bool((without.rewards[:, 0] >= without.rewards[:, 1]).all())


def test_one_response_makes_no_pair(tmp_path):
    """It is refused before a model is loaded, as for the policy's own."""
    with pytest.raises(TrainingError, match="num_generations is 1, but pairs"):
        trainer(tmp_path, PD(0.5, 0.0, pairs="reference"), num_generations=1, rows=prompts(2))


def test_rows_of_one_prompt_share_what_the_reference_drew(tmp_path):
    """Two pairs of the data with one prompt: its responses are drawn once."""
    pairs = tiny.encoded_pairs(2)
    rows = [*pairs, type(pairs[0])(pairs[0].prompt, pairs[1].chosen, pairs[1].rejected, None, "pair 2")]
    made = trainer(tmp_path, PD(0.5, 0.0, pairs="data+reference"), rows=rows)
    first, _, third = made.collect(made.rows, [0, 1, 2]).prompts
    assert len(made.reference_responses.round) == 2
    assert first.group.responses[2:] == third.group.responses[2:]
