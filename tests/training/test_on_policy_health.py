"""What a run of a method that acts tells: collapse, the numbers of its rounds, its completions, missing ends."""

from __future__ import annotations

import json
import logging

import pytest
import tiny
import torch
from acting import METHODS, metrics, trainer

from distalign.experiments.recipe import load_recipe
from distalign.methods import PMLE, RKL, RLHF
from distalign.rewards import Reward
from distalign.training.health import HealthSettings

# Collapse -------------------------------------------------------------------------------------------------------------


class LikesOneToken(Reward):
    """Rewards the share of one word, and nothing else."""

    def __call__(self, requests):
        """A reward a response."""
        return torch.tensor([own.count(8) / len(own) for request in requests for own in request.responses])


@pytest.mark.slow
@pytest.mark.parametrize("stop", [True, False])
def test_collapse_is_caught(tmp_path, caplog, stop):
    """RLHF at β = 0 on a reward that likes one token: a warning that says so, and with stop_on_collapse it saves."""
    health = HealthSettings(stop_on_collapse=stop)
    made = trainer(
        tmp_path,
        RLHF(beta=0.0),
        reward=LikesOneToken(),
        health=health,
        max_steps=60,
        num_generations=8,
        learning_rate=3e-2,
    )
    with caplog.at_level(logging.WARNING, "distalign"):
        made.train()
    warned = [record.getMessage() for record in caplog.records if record.name == "distalign.training.health"]
    assert any("entropy" in text and "beta" in text for text in warned)
    assert (made.state.global_step < 60) == stop
    if stop:
        assert made.monitor.collapsed
        assert (tmp_path / f"checkpoint-{made.state.global_step}" / "rollout.safetensors").is_file()
        assert any(f"stops at step {made.state.global_step - 1}" in r.getMessage() for r in caplog.records)
    assert metrics(tmp_path)[-2]["health/entropy_ratio"] < 0.3


@pytest.mark.slow
def test_entropy_keeps_its_place_with_its_own_weight(tmp_path, caplog):
    """The same reward with RKL's entropy term does not collapse, and nothing is said."""
    made = trainer(
        tmp_path, RKL(1.0, 0.0), reward=LikesOneToken(), health=HealthSettings(stop_on_collapse=True), max_steps=60,
        num_generations=8, learning_rate=3e-2,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "distalign"):
        made.train()
    assert made.state.global_step == 60
    assert not [record for record in caplog.records if "collapse" in record.getMessage()]


# Telling --------------------------------------------------------------------------------------------------------------


def test_metrics_of_a_round_have_their_names(tmp_path):
    """Reward, KL, entropy, lengths and health of every round, and its completions in samples.jsonl."""
    made = trainer(tmp_path, METHODS["rkl"], max_steps=3, health=HealthSettings(), num_iterations=3)
    made.train()
    first, second = metrics(tmp_path)[:2]
    assert set(first) >= {
        *("loss", "objective/reward", "objective/kl", "objective/entropy", "completions/mean_length"),
        *("completions/clipped_ratio", "health/entropy_ratio", "rollout/effective_samples", "rollout_time"),
        *("reward_time", "step_time", "tokens_per_second"),
    }
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert first["rollout/effective_samples"] == pytest.approx(1.0, abs=1e-4)
    assert "objective/reward" not in second
    assert 0 < second["rollout/effective_samples"] < 1
    (line,) = (tmp_path / "samples.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["step"] == 0
    assert row["prompt"].startswith("tell me")
    assert len(row["responses"]) == len(row["rewards"]) == 4


def test_the_logged_kl_is_of_the_policy_to_its_start(tmp_path):
    """A policy that has moved: above 0, where it is estimated from samples too."""
    trainer(tmp_path, RLHF(0.3), reward=LikesOneToken(), max_steps=6, num_generations=8, learning_rate=3e-2).train()
    assert metrics(tmp_path)[5]["objective/kl"] > 0.1


def test_another_temperature_shares_no_reference(tmp_path):
    """Log-probabilities that trainers share are of temperature 1."""
    held, cache = tiny.encoded_pairs(4), {}
    made = trainer(tmp_path, RKL(0.5, 0.3), temperature=0.7, reference_cache=cache)
    made.held_out(held)
    assert not cache


def test_an_offline_method_is_watched_too(tmp_path):
    """At each evaluation some responses are drawn on held-out prompts, and entropy and KL are logged."""
    held = tiny.encoded_pairs(6, seed=1)
    made = trainer(tmp_path, PMLE(0.5, 0.0), health=HealthSettings(prompts=4), max_steps=2)
    made.eval_dataset = held
    found = made.evaluate()
    assert found["eval_completions/number"] == 4
    assert found["eval_objective/entropy"] > 0
    assert found["eval_objective/kl"] == pytest.approx(0.0, abs=1e-4)


def test_a_missing_end_costs_what_the_recipe_says(tmp_path):
    """replace: responses that were cut are worth −1 in the round, the others what the reward says."""
    made = trainer(tmp_path, METHODS["rkl"], missing_end={"rule": "replace", "value": -1.0}, max_completion_length=3)
    made.worker.draw_round([0], 0, 4096)
    responses = [response for group in made.worker.round.responses for response in group]
    cut = torch.tensor([response[-1] != tiny.END for response in responses])
    rewards = made.worker.round.tensors["rewards"]
    assert bool(cut.any())
    assert bool((rewards[cut] == -1).all())
    assert bool((rewards[~cut] >= 0).all())


def test_a_recipe_says_how_long_responses_are(tmp_path):
    """rollout.max_completion_length is the evaluation's unless it is given."""
    for given, wanted in (({}, 5), ({"rollout": {"max_completion_length": 7}}, 7)):
        path = tmp_path / "r.yaml"
        path.write_text(tiny.recipe_text(tmp_path, **given))
        assert load_recipe(path).rollout.max_completion_length == wanted
