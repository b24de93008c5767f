"""No secret is written: not by its setting's name, not by what it looks like."""

from __future__ import annotations

import sys

import pytest
import tiny
import yaml

from distalign.cli.shared import command_line
from distalign.errors import InputError
from distalign.experiments.recipe import load_recipe
from distalign.experiments.train import train
from distalign.settings import HIDDEN, RecipeError, dump_yaml, masked

TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    "name", ["hub_token", "token", "api_key", "HF_TOKEN", "passwd", "wandb_key", "secret", "X-Api-Key"]
)
def test_settings_with_the_name_of_a_secret_are_hidden(name):
    """Whatever their value looks like; names that only sound like it are kept."""
    assert masked({"training": [{name: "hf_NOT_A_REAL_ONE"}]}) == {"training": [{name: HIDDEN}]}
    assert masked({"credentials": {"user": "me"}, "api_keys": ["x"], "password": 1}) == dict.fromkeys(
        ("credentials", "api_keys", "password"), HIDDEN
    )
    kept = {"token_budget": 512, "end_token": "</s>", "pad_token_id": 0, "tokenizer": "a/b", "monkey": "x", name: None}
    assert masked(kept) == kept


@pytest.mark.parametrize(
    "value", [TOKEN, "sk-" + "x1" * 12, "ghp_" + "a" * 36, "https://me:pass@host/v1", "Bearer abcdefgh123"]
)
def test_what_looks_like_a_secret_is_hidden_anywhere(value):
    """In any setting, and in the middle of a text."""
    written = dump_yaml({"note": f"see {value} there"})
    assert HIDDEN in written
    assert value not in written
    assert masked({"model": "hf_models/task-long-name-of-a-model"}) == {"model": "hf_models/task-long-name-of-a-model"}


def test_no_file_of_a_run_holds_the_token(tmp_path, monkeypatch):
    """Recipe, card, results, report; nor does the line that says how to go on."""
    tiny.save(tmp_path / "model")
    settings = yaml.safe_load(tiny.recipe_text(tmp_path))
    settings["training"] = {**settings["training"], "hub_token": "hf_NOT_A_REAL_ONE", "max_steps": 1}
    train(load_recipe(settings), "dpo")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if b"hf_NOT_A_REAL_ONE" in path.read_bytes()]
    monkeypatch.setattr(sys, "argv", ["distalign", "train", "--set", "training.hub_token=hf_NOT_A_REAL_ONE", TOKEN])
    assert "NOT_A_REAL" not in command_line()
    assert command_line().startswith("distalign ")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_line().startswith("torchrun --nproc_per_node 2 -m distalign ")
    assert TOKEN not in command_line()


def test_a_secret_of_a_method_is_written_nowhere_and_may_change(tmp_path):
    """A run goes on with another key, and a refusal shows neither."""
    tiny.save(tmp_path / "model")
    (tmp_path / "asking.py").write_text(
        "from dataclasses import dataclass\nfrom distalign.methods import PMLE\n"
        "@dataclass(frozen=True)\nclass Asking(PMLE):\n    api_key: str = ''\n"
    )
    settings = yaml.safe_load(tiny.recipe_text(tmp_path))
    settings |= {"early_stopping": False}
    settings["training"] |= {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    method = {"class": f"{tmp_path}/asking.py:Asking", "gamma": 0.5, "beta": 0.0}
    for key in ("a-secret-word", "a-newer-word"):
        settings["methods"] = {"asking": {**method, "api_key": key}}
        train(load_recipe(settings), "asking", resume=key == "a-newer-word")
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    settings["methods"]["asking"]["gamma"] = 0.4
    with pytest.raises(InputError, match=r"methods.asking.gamma 0.5, the recipe has 0.4"):
        train(load_recipe(settings), "asking", resume=True)


@pytest.mark.parametrize(
    "wrong", [["trainin.x=1"], ["training.hub_token.x=1"], ["training.hub_token={"], ["training.hub_token=[SECRET]"]]
)
def test_no_refusal_of_a_recipe_shows_the_token(tmp_path, wrong):
    """Not in the name of the settings' source, nor where the value itself is refused."""
    settings = yaml.safe_load(tiny.recipe_text(tmp_path))
    flags = ["training.hub_token=hf_NOT_A_REAL_ONE", *(word.replace("SECRET", "hf_NOT_A_REAL_ONE") for word in wrong)]
    with pytest.raises(RecipeError) as refused:
        load_recipe(settings, flags)
    assert "NOT_A_REAL" not in str(refused.value)
    assert "--set" in str(refused.value) or HIDDEN in str(refused.value)


def test_a_flag_that_is_joined_to_its_setting_is_hidden_too(monkeypatch):
    """`--set=…`, a setting within a value, and an address that holds a key."""
    secret = "NOT_A_REAL_ONE"
    words = [f"--set=training.hub_token={secret}", f"judge.url=https://a.example/x?api_key={secret}", "note=a=b"]
    words.insert(0, "training={hub_token: 'NOT_A_REAL_ONE', max_steps: 3}")
    monkeypatch.setattr(sys, "argv", ["distalign", *words])
    assert secret not in command_line()
    assert "max_steps: 3" in command_line()
    assert command_line().endswith("note=a=b")
