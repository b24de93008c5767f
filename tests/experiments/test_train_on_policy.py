"""From a recipe to a run folder for methods that act: rewards, the step that is kept, what may change on the way."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny

from distalign.errors import InputError
from distalign.experiments.compare import compare
from distalign.experiments.recipe import load_recipe
from distalign.experiments.train import check, labels_choose_step, train, train_reward_model
from distalign.rewards import RewardError

METHODS = {
    "pmle": {"gamma": 0.5, "beta": 0.1},
    "pd": {"gamma": 0.5, "beta": 0.1},
    "rkl": {"gamma": 0.5, "beta": 0.1, "estimator": "split"},
    "dpo": {"gamma": 0.5},
    "rebel": {"eta": 1.0, "beta": 0.0},
    "rlhf": {"beta": 0.1, "estimator": "ppo"},
}
FUNCTION = "def reward(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"


@pytest.fixture
def made(tmp_path, tiny_folder):
    """A recipe of the tiny known target with all methods, changed as asked."""
    (tmp_path / "model").symlink_to(tiny_folder)

    def build(*overrides, **more):
        path = tmp_path / "tiny.yaml"
        settings = {"methods": METHODS, "reward": {"train": True}, "lora": None, **more}
        path.write_text(tiny.recipe_text(tmp_path, **settings))
        return load_recipe(path, ["training.max_steps=2", "training.eval_steps=1", *overrides])

    return build


def test_all_six_train_without_an_adapter_and_at_a_temperature(made):
    """Full training, every kind of need: each kept a step that it evaluated, and has a reward for every prompt."""
    recipe = made("rollout.temperature=0.7", "rollout.num_iterations=2", "evaluation.prompts=4")
    results = compare(recipe, list(METHODS), [0]).content
    assert set(results["methods"]) == {"target", "reference", *METHODS}
    for name in METHODS:
        (kept,) = results["kept_step"][name]
        told = {p["step"]: p["eval_loss"] for p in results["curves"][name]}
        rows = [json.loads(line) for line in (recipe.run_dir / name / "metrics.jsonl").read_text().splitlines()]
        assert {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row} == told
        assert kept in told
        assert results["methods"][name]["reward"]["n"] == 4
    assert (recipe.run_dir / "reward" / "results.json").is_file()


def test_pairs_are_measured_at_the_temperature_of_the_run(made):
    """What compare says of held-out labels is what the run's last evaluation says."""
    from distalign.experiments import compare as comparison

    seen = {}
    original = comparison.measure_pairs

    def spy(measured, logps, pairs, implied, target_logit=None):
        original(measured, logps, pairs, implied, target_logit)
        seen.setdefault("rewards", []).append(implied(logps))

    recipe = made("rollout.temperature=0.5", "early_stopping=null", "training.eval_strategy=steps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "measure_pairs", spy)
        compare(recipe, ["pd"], [0])
    rows = [json.loads(line) for line in (recipe.run_dir / "pd" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval_rewards/chosen" in row][-1]
    assert float(seen["rewards"][-1][:, 0].mean()) == pytest.approx(last["eval_rewards/chosen"], rel=1e-5)


def test_labels_choose_the_step_only_where_they_can(made, tmp_path):
    """Not for a function's reward, nor for RLHF at β = 0: those keep their last step."""
    (tmp_path / "r.py").write_text(FUNCTION)
    trained, function = made(), made(reward={"function": f"{tmp_path / 'r.py'}:reward"})
    assert all(labels_choose_step(trained, name) for name in METHODS)
    assert [name for name in METHODS if labels_choose_step(function, name)] == ["pmle", "dpo"]
    collapsing = made("methods.rlhf={beta: 0.0}")
    assert not labels_choose_step(collapsing, "rlhf")
    train(function, "rkl")
    rows = [json.loads(line) for line in (function.train_dir / "rkl" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 1, 2]
    assert [path.name for path in (function.train_dir / "rkl").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_mended_reward_goes_on(made, tmp_path):
    """The advice of the error works: another function in the recipe, and --resume."""
    (tmp_path / "bad.py").write_text(FUNCTION.replace("    return", "    raise KeyError('lost')\n    return"))
    (tmp_path / "good.py").write_text(FUNCTION)
    bad, good = (made(reward={"function": f"{tmp_path / name}.py:reward"}) for name in ("bad", "good"))
    with pytest.raises(RewardError, match="--resume"):
        train(bad, "rkl")
    train(good, "rkl", resume=True)
    assert (good.train_dir / "rkl" / "model" / "README.md").is_file()
    with pytest.raises(InputError, match="another batches: it had"):
        train(made("training.per_device_train_batch_size=4", reward=good.reward[0].model_dump()), "rkl", resume=True)


def test_a_reward_can_be_trained_alone_and_named(made):
    """`distalign reward` writes a folder that another recipe names; both score alike, so both learn the same."""
    alone = made("name=alone")
    results = train_reward_model(alone).results
    assert set(results) >= {"accuracy", "nll", "ece"}
    with pytest.raises(InputError, match=r"reward: is there already; start over with --overwrite"):
        train_reward_model(made("name=alone", "seed=1"))
    assert train_reward_model(alone, overwrite=True).results == results
    named = made("name=named", reward={"model": str(alone.train_dir / "reward")})
    fresh = made("name=fresh")
    for recipe in (named, fresh):
        compare(recipe, ["rkl"], [0])
    # Which step is kept may differ: only labels that the reward was learned from choose it.
    first, second = (
        [json.loads(line) for line in (r.run_dir / "rkl" / "metrics.jsonl").read_text().splitlines()]
        for r in (named, fresh)
    )
    told = [row["objective/reward"] for row in first if "objective/reward" in row]
    assert len(told) == 2
    assert told == pytest.approx([row["objective/reward"] for row in second if "objective/reward" in row])
    first, second = (json.loads((r.run_dir / "results.json").read_text()) for r in (named, fresh))
    assert first["methods"]["reference"]["reward"] == pytest.approx(second["methods"]["reference"]["reward"])


def test_refusals_before_a_model_is_loaded(made, monkeypatch):
    """Each with what to do."""
    monkeypatch.setattr("distalign.models.load.Source.model", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(RewardError, match="add reward to the recipe"):
        check(made(reward=None), ["rkl"])
    data = {"train": "x.jsonl", "held_out": 0.0}
    with pytest.raises(RewardError, match="stops by held-out pairs and there are none"):
        check(made(target=None, data=data, reward={"train": {"gamma": 0.1}}), ["rkl"])


@pytest.mark.parametrize("pairs", ["reference", "data+reference", "data+policy"])
def test_pd_takes_other_pairs_in_a_recipe(tmp_path, tiny_folder, pairs):
    """By name, with a known target's reward; what π₀ drew is printed once, what the policy drew at every round."""
    methods = {"pd": {"gamma": 0.5, "beta": 0.0, "pairs": pairs}}
    text = tiny.recipe_text(tmp_path, model=str(tiny_folder), methods=methods, reward={"exact": True})
    (tmp_path / "recipe.yaml").write_text(text)
    done = train(tmp_path / "recipe.yaml")
    steps = {json.loads(line)["step"] for line in (done.folder / "samples.jsonl").read_text().splitlines()}
    assert (steps == {0}) == ("reference" in pairs)
    assert (done.model / "adapter_config.json").is_file()


def test_what_would_be_written_down_and_not_used_is_refused(made):
    """The optimizer's rate comes from the checkpoint, a trained reward from its folder; a model is not written over."""
    train(made(), "rkl")
    for change in ("training.learning_rate=0.5", "reward.train={gamma: 0.123}"):
        with pytest.raises(InputError, match=r"had batches\.learning_rate|trained with other settings"):
            train(made(change), "rkl", resume=True)
    for old in (made().train_dir / "rkl").glob("checkpoint-*"):
        shutil.rmtree(old)
    with pytest.raises(InputError, match=r"holds model of an earlier run"):
        train(made(), "rkl")
