"""The recipes of the paper's two tables: its numbers, accepted as they stand, and every method trains two steps."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny

from distalign.data import read_pairs, read_prompts
from distalign.experiments.recipe import load_recipe
from distalign.experiments.train import check, train
from distalign.settings import RECIPES

ROOT = Path(__file__).parents[2]
SCITLDR = ROOT.parent / "shared" / "data" / "scitldr_pairs.jsonl.gz"

# arXiv 2506.01523v2, the settings of its experiments: batch (responses for PPO, else prompts), learning rate, schedule,
# inner epochs, and the method's own. DPO's β is gamma here.
TLDR = {
    "dpo": (64, 3e-6, "linear", None, {"gamma": 0.05}),
    "pmle": (512, 1e-6, "linear", 1, {"gamma": 1e-2, "beta": 1e-5}),
    "rebel": (512, 3e-6, "linear", 4, {"eta": 1.0, "beta": 0.05}),
    "pd": (512, 3e-6, "linear", 4, {"gamma": 0.1, "beta": 0.05}),
    "rlhf": (
        512,
        3e-6,
        "linear",
        4,
        {"beta": 0.05, "estimator": "ppo", "gae_lambda": 0.95, "clip": 0.2, "value_coefficient": 0.1},
    ),
    "rkl": (
        512,
        3e-6,
        "linear",
        4,
        {"gamma": 0.01, "beta": 0.05, "estimator": "ppo", "gae_lambda": 0.95, "clip": 0.2, "value_coefficient": 0.1},
    ),
}
CHAT = {
    "dpo": (128, 5e-7, "cosine", None, {"gamma": 0.05}),
    "pmle": (128, 3e-7, "cosine", None, {"gamma": 5e-3, "beta": 0.0}),
    "rebel": (128, 3e-7, "cosine", 1, {"eta": 1e6, "beta": 0.0}),
    "pd": (128, 3e-7, "cosine", 1, {"beta": 0.05}),
}
ROWS = [("tldr", name, row) for name, row in TLDR.items()] + [("chat", name, row) for name, row in CHAT.items()]


def stands(name: str, overrides: Sequence[str] = ()):
    """The recipe as it stands in the repository."""
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


def length(recipe, name: str) -> int:
    """Training steps that are given as such; −1 where epochs count."""
    return recipe.training_for(name).get("max_steps", -1)


@pytest.mark.parametrize(("recipe", "name", "row"), ROWS, ids=[f"{recipe}-{name}" for recipe, name, _ in ROWS])
def test_a_method_has_the_papers_numbers(recipe, name, row):
    """Batch, learning rate, schedule, inner epochs and coefficients are those of the table."""
    settings = stands(recipe)
    batch, rate, schedule, inner, own = row
    training, rollout = settings.training_for(name), settings.rollout_for(name)
    responses = rollout.num_generations if "estimator" in own else 1
    assert training["per_device_train_batch_size"] * responses == batch
    assert training.get("gradient_accumulation_steps", 1) == 1
    assert training["learning_rate"] == rate
    assert training["lr_scheduler_type"] == schedule
    assert inner is None or rollout.num_iterations == inner
    method = settings.method(name)
    assert {key: getattr(method, key) for key in own} == own


def test_tldr_has_the_papers_setting():
    """Model, adapter, lengths, sampling and the number of episodes."""
    recipe = stands("tldr")
    assert list(recipe.methods) == list(TLDR)
    assert "pythia-2.8b" in recipe.model
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout, recipe.lora.layers) == (1024, 2048, 0.0, None)
    assert recipe.data.max_length == 512 + 53
    assert recipe.rollout.temperature == 0.7
    assert recipe.rollout.max_completion_length == recipe.evaluation.max_new_tokens == 53
    assert recipe.evaluation.prompts == 600
    assert recipe.early_stopping is None
    for name in ("rebel", "pd", "rlhf", "rkl"):
        assert length(recipe, name) == 4 * math.floor(1_000_000 / 512)
    for name in ("dpo", "pmle"):
        assert length(recipe, name) == -1
        assert recipe.training_for(name)["num_train_epochs"] == 1


def test_chat_has_the_papers_setting():
    """Model, sampling and length."""
    recipe = stands("chat")
    assert list(recipe.methods) == list(CHAT)
    assert recipe.model == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert "ultrafeedback" in recipe.data.train
    assert (recipe.rollout.temperature, recipe.rollout.top_p) == (0.8, 0.9)
    assert recipe.rollout.max_completion_length == recipe.evaluation.max_new_tokens == 1024
    assert all(recipe.training_for(name)["num_train_epochs"] == 1 for name in CHAT)
    assert all(length(recipe, name) == -1 for name in CHAT)


def test_the_columns_of_the_hub_sets_fit():
    """Rows shaped like those of the named sets are read as prompt and two responses, nothing converted."""
    tldr = {"prompt": "SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: c\n\nTL;DR:", "chosen": " d", "rejected": " e"}
    assert read_pairs([tldr]).format == "standard"
    assert read_prompts([{"prompt": tldr["prompt"], "completion": " d"}])[0].prompt == tldr["prompt"]
    turn = {"role": "user", "content": "a"}
    feedback = {
        "prompt": "a",
        "prompt_id": "0",
        "chosen": [turn, {"role": "assistant", "content": "b"}],
        "rejected": [turn, {"role": "assistant", "content": "c"}],
        "messages": [turn, {"role": "assistant", "content": "b"}],
        "score_chosen": 8.0,
        "score_rejected": 5.0,
    }
    (pair,) = read_pairs([feedback])
    assert (pair.prompt, pair.chosen) == ([turn], [{"role": "assistant", "content": "b"}])


@pytest.mark.skipif(not SCITLDR.is_file(), reason="the summarisation pairs are not here")
def test_tldr_trains_on_summarisation_pairs(tmp_path):
    """Real abstracts with summaries, in the lengths of the recipe: on-policy and on labelled pairs."""
    model = tiny.save(tmp_path / "model", max_position_embeddings=1024)
    changes = {
        "output_dir": tmp_path,
        "model": model,
        "dtype": "float32",
        "lora": "{r: 4, alpha: 8}",
        "reward": "{train: {init: scratch, backbone: frozen}}",
        "rollout.max_completion_length": 5,
        "data": f"{{train: {SCITLDR}, held_out: 0.3, limit: 60, eval_limit: 4, max_length: 565, too_long: drop}}",
    }
    for section in ("training", "methods.pmle.training"):
        changes |= {f"{section}.max_steps": 2, f"{section}.per_device_train_batch_size": 2}
    changes |= {"training.eval_steps": 2, "training.use_cpu": True}
    recipe = stands("tldr", [f"{key}={value}" for key, value in changes.items()])
    assert math.isfinite(train(recipe, "pmle").held_out["loss"])


def test_the_smoke_script_changes_settings_that_exist(tmp_path):
    """Every --set of scripts/tldr.sh is a setting, and none of a method's own settings outlives it."""
    script = (ROOT / "scripts/tldr.sh").read_text()
    print_flags = (
        script.split("distalign compare")[0].replace("PATH=", "IGNORED=") + 'printf "%s\\n" "${settings[@]}"\n'
    )
    out = subprocess.run(
        ["bash", "-c", print_flags, "bash", "pairs.jsonl"], capture_output=True, text=True, check=True, env=os.environ
    ).stdout
    recipe = stands("tldr", [*out.splitlines(), f"output_dir={tmp_path}", "data.train=pairs.jsonl"])
    check(recipe, list(recipe.methods))
    for name in recipe.methods:
        training = recipe.training_for(name)
        assert (training["max_steps"], training["per_device_train_batch_size"]) == (2, 2)
