"""`auto` in a recipe: what may be, the numbers that a run has instead, and going on with them."""

from __future__ import annotations

import logging
import re

import pytest
import tiny
import yaml

from distalign.data import encode_pairs, read_pairs
from distalign.engine import Group, score_in_batches
from distalign.errors import InputError
from distalign.experiments.auto import settle_gamma
from distalign.experiments.compare import compare
from distalign.experiments.recipe import load_recipe
from distalign.experiments.train import check, train, train_reward_model
from distalign.rewards import RewardError
from distalign.settings import RecipeError
from distalign.stats.calibration import calibrate

PAIRS = tiny.encoded_pairs(40)


@pytest.fixture
def made(tmp_path, tiny_folder):
    """A recipe of the tiny model, with a known target or on the user's pairs."""
    (tmp_path / "model").symlink_to(tiny_folder)
    tiny.write_pairs(tmp_path / "pairs.jsonl", 60)

    def build(methods, *overrides, data=False, **more):
        settings = {"methods": methods, "lora": None, **more}
        if data:
            settings |= {"target": None, "data": {"train": str(tmp_path / "pairs.jsonl"), "held_out": 0.2}}
        (tmp_path / "tiny.yaml").write_text(tiny.recipe_text(tmp_path, **settings))
        steps = ["training.max_steps=2", "training.eval_steps=1", "rollout.max_completion_length=4"]
        return load_recipe(tmp_path / "tiny.yaml", [*steps, *overrides])

    return build


def written(path):
    """A run's recipe.yaml."""
    return yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))


def test_auto_is_kept_until_the_pairs_are_read(made, tmp_path):
    """It is dumped and read back as it is, and until then the method needs what it will need."""
    recipe = made({"pmle": {"gamma": "auto", "beta": "auto"}, "dpo": {"gamma": "auto"}})
    assert (recipe.automatic("gamma"), recipe.automatic("beta")) == (["pmle", "dpo"], ["pmle"])
    assert recipe.method("pmle").needs.kl
    recipe.dump(tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_a_known_targets_gamma_is_its_own(made, caplog):
    """For every method with a γ; results, run folders and card have the number, not the word."""
    caplog.set_level(logging.INFO)
    recipe = made({"pmle": {"gamma": "auto", "beta": 0.0}, "dpo": {"gamma": "auto"}})
    content = compare(recipe, None, [0]).content
    assert "gamma auto (pmle, dpo) is 0.5: the known target's own" in caplog.text
    for settings in (content["settings"], written(recipe.run_dir), written(recipe.run_dir / "dpo")):
        assert settings["methods"]["dpo"]["gamma"] == 0.5
    assert "- gamma: 0.5" in (recipe.run_dir / "dpo" / "model" / "README.md").read_text(encoding="utf-8")


def test_on_the_users_pairs_gamma_is_the_calibration_of_the_start(made, tmp_path, tiny_folder):
    """All pairs are trained on: the number is what `calibrate` says of them, or the bound; a reward follows it."""
    recipe = made({"pmle": {"gamma": "auto", "beta": 0.0}}, "data.held_out=0.0", data=True)
    method = written(train(recipe).folder)["methods"]["pmle"]
    pairs, _ = encode_pairs(tiny.tokenizer(), read_pairs(str(tmp_path / "pairs.jsonl")), max_length=None)
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]
    model = tiny.AutoModelForCausalLM.from_pretrained(tiny_folder)
    logps = score_in_batches(model, groups, token_budget=512).logps.view(-1, 2)
    low, high = (bound / float((logps[:, 0] - logps[:, 1]).abs().median()) for bound in (0.1, 5.0))
    assert method["gamma"] == pytest.approx(min(max(calibrate(logps).gamma.mean, low), high), rel=0.01)


def test_gamma_at_another_temperature_is_told(made, caplog):
    """Of methods that draw: the others learn at temperature 1 whatever the rollout's is."""
    methods = {"pmle": {"gamma": "auto", "beta": 0.0}, "rkl": {"gamma": "auto", "beta": 0.1}}
    settle_gamma(made(methods, "rollout.temperature=0.5", data=True, reward={"train": {}}), tiny.model(), PAIRS)
    assert "gamma auto is found at temperature 1, and rkl learns at that of its rollout" in caplog.text


def test_a_reward_without_gamma_follows(made):
    """Trained alone or with its method, in its own files and in the run's recipe; a number of its own stays."""
    methods = {"rkl": {"gamma": "auto", "beta": 0.1}}
    recipe = made(methods, data=True, reward={"train": {}})
    alone = train_reward_model(recipe).reward.gamma
    settings = written(train(recipe).folder)
    assert settings["methods"]["rkl"]["gamma"] == settings["reward"][0]["train"]["gamma"] == alone
    own = made(methods, "name=own", data=True, reward={"train": {"gamma": 0.25}})
    assert train_reward_model(own).reward.gamma == 0.25
    with pytest.raises(RewardError, match="needs gamma"):
        train_reward_model(made({"rkl": {"gamma": 0.1}}, data=True, reward={"train": {}}))


def test_beta_is_a_number_for_all_seeds_and_when_going_on(made, caplog):
    """The first seed's pairs choose it; a resumed comparison trains nothing again, a resumed run keeps the number."""
    caplog.set_level(logging.INFO)
    methods = {"pmle": {"gamma": "auto", "beta": "auto"}, "rkl": {"gamma": "auto", "beta": "auto"}}
    recipe = made(methods, "training.save_strategy=steps", "training.save_steps=1", reward={"train": True})
    content = compare(recipe, None, [0, 1]).content
    pmle, rkl = (content["settings"]["methods"][name]["beta"] for name in methods)
    assert pmle > 0
    assert 0 < rkl <= 0.5
    for seed in (0, 1):
        assert written(recipe.run_dir / f"seed-{seed}" / "rkl")["methods"]["rkl"]["beta"] == rkl
    assert caplog.text.count("beta auto (rkl) is ") == 1
    assert compare(recipe, None, [0, 1], resume=True).content["settings"] == content["settings"]
    assert caplog.text.count("done before") == 4
    folder = train(recipe, "pmle").folder
    (folder / "recipe.yaml").write_text(
        (folder / "recipe.yaml").read_text().replace(f"beta: {pmle}", "beta: 0.0625"), encoding="utf-8"
    )
    with pytest.raises(InputError, match=r"another method: it had .*this run has PMLE .beta: 0.0625"):
        train(recipe, "pmle", resume=True)


def test_an_exact_reward_has_no_noise(made, caplog):
    """So β is 0; a reward that says nothing of the labels' noise is refused before a model is loaded."""
    caplog.set_level(logging.INFO)
    methods = {"rkl": {"gamma": "auto", "beta": "auto"}}
    assert written(train(made(methods, reward={"exact": True})).folder)["methods"]["rkl"]["beta"] == 0.0
    assert "the exact reward has no noise" in caplog.text
    with pytest.raises(RewardError, match=r"beta of rkl is auto.*give beta a number"):
        check(made(methods, reward={"function": "my.py:reward"}), ["rkl"])


def test_a_run_says_where_its_settings_end(made, caplog):
    """What each method tends to; how fast, or how far from the target where that is known."""
    caplog.set_level(logging.INFO)
    methods = {
        "pmle": {"gamma": 0.5, "beta": 0.0},
        "rkl": {"gamma": 0.5, "beta": 0.1},
        "far": {"class": "rkl", "gamma": 0.5, "beta": 50.0},
        "rlhf": {"beta": 0.1},
    }
    compare(made(methods, "training.max_steps=1", reward={"exact": True}), None, [0])
    lines = {line.split(": ")[0]: line for line in caplog.messages if "with endless pairs" in line}
    assert lines["pmle"].endswith("β = 0, else between π* and π₀; its distance falls like 1/n (theorem 4)")
    assert lines["rlhf"].endswith("it ends at π₀ exp(R̂/β); beta is 0.1")
    near, far = (re.search(r"beta is .*, (.*) ± .* nats .* \(π₀ (.*)\)", lines[name]) for name in ("rkl", "far"))
    assert near is not None
    assert far is not None
    assert 0 <= float(near[1]) < 0.2 * float(near[2])
    assert float(far[1]) == pytest.approx(float(far[2]), rel=0.3)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"rlhf": {"beta": "auto"}}, r"methods\.rlhf: beta is auto, but this β decides .*π₀ exp\(R̂/β\).*give a number"),
        ({"rebel": {"beta": "auto"}}, r"methods\.rebel: beta is auto, but this β decides"),
        ({"rkl": {"gamma": 0, "beta": "auto"}}, r"methods\.rkl: beta is auto, but this β decides"),
        ({"rlhf": {"gamma": "auto"}}, r"gamma"),
        ({"pmle": {"gamma": "often"}}, r"pmle\.gamma is 'often'"),
        ({"rebel": {"eta": "auto"}}, r"eta is 'auto'"),
    ],
)
def test_what_cannot_be_auto_is_refused(made, methods, message):
    """With what to do instead."""
    with pytest.raises(RecipeError, match=message):
        made(methods)


def test_pairs_that_do_not_say_are_refused(made, tmp_path):
    """One pair has no calibration."""
    (tmp_path / "one.jsonl").write_text((tmp_path / "pairs.jsonl").read_text().split("\n")[0] + "\n")
    recipe = made({"dpo": {"gamma": "auto"}}, f"data.train={tmp_path / 'one.jsonl'}", "data.held_out=0.0", data=True)
    with pytest.raises(InputError, match="gamma is auto, which these pairs do not say"):
        train(recipe)
