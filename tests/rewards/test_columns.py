"""Rewards that stand in the data need a scale to nats, pairs that have them, and a method that reads no others."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny
import torch
from pydantic import ValidationError

from distalign import PD, AlignmentConfig, AlignmentTrainer, ColumnReward, compare, train
from distalign.data import Data, EncodedPair, Pair
from distalign.experiments.results import data_key
from distalign.models.load import Source
from distalign.rewards import RewardError, RewardSettings

OFFLINE = PD(0.5, 0.0, pairs="data")


def rows(n=12):
    """Chats with the points of a judge for both responses."""
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": "happy warm"}],
            "rejected": [{"role": "assistant", "content": "cold bad rain"}],
            "chosen_reward": 8 - i % 3,
            "rejected_reward": 3 + i % 2,
        }
        for i, prompt in enumerate(tiny.prompts(n))
    ]


def trainer(folder, method, data, reward):
    """Two steps on the tiny model."""
    args = AlignmentConfig(
        str(folder), max_steps=2, per_device_train_batch_size=4, use_cpu=True, max_completion_length=5
    )
    return AlignmentTrainer(tiny.model(), method, args, data, processing_class=tiny.tokenizer(), reward_funcs=reward)


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """A recipe of PD on the data's pairs, as a mapping."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    return {
        "name": "columns",
        "output_dir": str(tmp_path / "runs"),
        "model": str(tiny_folder),
        "data": {"train": str(tmp_path / "pairs.jsonl"), "held_out": 0.3},
        "methods": {"pd": {"gamma": 0.5, "beta": 0.0, "pairs": "data"}},
        "reward": {"columns": True, "scale": 0.5},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True},
        "evaluation": {"prompts": 4, "samples": 2, "max_new_tokens": 4},
    }


def test_soft_labels_are_those_of_the_scaled_columns(tmp_path):
    """p̃ = σ(scale · (chosen_reward − rejected_reward)) for each pair, also of two rows of one text."""
    data = rows(6)
    data.append({**data[0], "chosen_reward": 1, "rejected_reward": 9})
    made = trainer(tmp_path, OFFLINE, data, ColumnReward(scale=0.5))
    pairs = [group.rewards for group in made.collect(made.rows, range(7)).prompts]
    wanted = [[0.5 * row["chosen_reward"], 0.5 * row["rejected_reward"]] for row in data]
    assert torch.stack(pairs).tolist() == wanted
    made.train()
    assert not (tmp_path / "samples.jsonl").exists()


def test_pairs_of_one_text_and_place_have_their_own_rewards(tmp_path):
    """As those that are made in Python, all of them `row`."""
    pairs = [Pair("tea", "warm", "cold", chosen_reward=points, rejected_reward=0.0) for points in (1.0, 5.0)]
    made = trainer(tmp_path, OFFLINE, Data(pairs, "pairs", "standard"), ColumnReward(scale=1.0))
    assert [float(group.rewards[0]) for group in made.collect(made.rows, range(2)).prompts] == [1.0, 5.0]


def test_a_recipe_trains_with_the_columns(recipe):
    """`train` and `compare`; what policies draw has no rewards in columns, so the table has no column for them."""
    assert train(recipe).kept_step > 0
    methods = compare(recipe).methods
    assert "entropy" in methods["pd"]
    assert "reward" not in methods["pd"]


def test_a_comparison_knows_that_the_columns_changed():
    """Going on with it, pairs of the same text with other rewards are other data."""
    row = Pair("a", "b", "c", chosen_reward=1.0, rejected_reward=0.0)
    pairs = [EncodedPair([1], [2], [3], None, "row", row)]
    others = [dataclasses.replace(pairs[0], row=dataclasses.replace(row, chosen_reward=2.0))]
    assert data_key(pairs, [], []) != data_key(others, [], [])


def test_a_scale_is_asked_for_and_belongs_to_columns():
    """There is no default: the message says what the number is."""
    with pytest.raises(ValidationError, match=r"reward.columns has no scale; add scale, the nats that one unit"):
        RewardSettings(columns=True)
    with pytest.raises(ValidationError, match=r"reward.scale is for columns; other rewards have weight"):
        RewardSettings(exact=True, scale=0.5)
    with pytest.raises(RewardError, match=r"scale is 0; give the nats that one unit of the columns is worth"):
        ColumnReward(0)


@pytest.mark.parametrize("pairs", ["policy", "reference", "data+reference"])
def test_a_method_that_reads_other_rewards_is_refused(tmp_path, recipe, pairs, monkeypatch):
    """Before a model is loaded: drawn responses are in no column."""
    monkeypatch.setattr(Source, "model", None)
    recipe["methods"] = {"pd": {"beta": 0.0, "pairs": pairs}}
    message = "needs rewards of drawn responses, and the columns have those of the data's pairs alone; take a method"
    with pytest.raises(RewardError, match=f"reward: pd {message}"):
        train(recipe)
    with pytest.raises(RewardError, match=f"reward: train pd {message}"):
        trainer(tmp_path, PD(0.5, 0.0, pairs=pairs), rows(), ColumnReward(0.5))


def test_a_pair_without_rewards_is_named(tmp_path, recipe, monkeypatch):
    """Where the first is, and how many there are, before a model is loaded."""
    monkeypatch.setattr(Source, "model", None)
    data = rows(40)
    for row in data[4:]:
        del row["chosen_reward"], row["rejected_reward"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    with pytest.raises(
        RewardError, match=r"pairs.jsonl:\d+ has no chosen_reward and rejected_reward, as \d+ of \d+ pairs"
    ):
        train(recipe)
    with pytest.raises(
        RewardError, match=r"reward: rows:5 has no chosen_reward and rejected_reward, as 36 of 40 pairs"
    ):
        trainer(tmp_path, OFFLINE, data, ColumnReward(0.5))


def test_a_known_target_has_no_columns(recipe):
    """Its responses are drawn."""
    del recipe["data"]
    recipe["target"] = {"words": ["happy"], "prompts": tiny.prompts(10)}
    with pytest.raises(RewardError, match=r"reward.columns: only the data's pairs have them"):
        train(recipe)
