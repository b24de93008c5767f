"""From a recipe to a run folder, on a tiny model: a comparison with a known target, a user's own pairs, one method."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from types import ModuleType

import pytest
import tiny
import torch
import yaml
from acting import exit_code_elsewhere
from huggingface_hub.errors import HTTPError
from transformers import AutoModelForCausalLM, TrainingArguments

from distalign.errors import InputError
from distalign.evaluation.results import finite
from distalign.experiments import train as experiment
from distalign.experiments.compare import compare
from distalign.experiments.recipe import load_recipe
from distalign.experiments.setup import load_setup
from distalign.experiments.train import check, one_run, train, training_arguments
from distalign.report import write_report
from distalign.report.results import Results
from distalign.settings import RecipeError
from distalign.training.config import AlignmentConfig
from distalign.training.rollout_settings import TrainingError
from distalign.training.run_folder import locked

METRICS = {
    *("forward_kl", "reverse_kl", "kl_reference", "entropy", "accuracy", "nll", "ece", "distinct_2", "length"),
    "missing_end",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder):
    """A folder with the tiny model, and a user's pairs."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "model").symlink_to(tiny_folder)
    tiny.write_pairs(folder / "pairs.jsonl")
    return folder


def recipe(place, tmp_path, *overrides, method=None, **more):
    """The tiny recipe, written and read."""
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny.recipe_text(place, output_dir=str(tmp_path / "runs"), **more))
    return load_recipe(path, overrides, method)


@pytest.fixture(scope="module")
def compared(place, tmp_path_factory):
    """One comparison with a known target: results and run folder."""
    settings = recipe(place, tmp_path_factory.mktemp("compared"))
    return compare(settings, ["pmle", "dpo"], [0]).content, settings.run_dir


def test_results_are_what_the_report_reads(compared):
    """results.json has the documented shape, and is what `compare` returned."""
    results, folder = compared
    on_disk = json.loads((folder / "results.json").read_text())
    Results.parse(on_disk)
    assert on_disk["methods"].keys() == {"target", "reference", "pmle", "dpo"}
    assert on_disk["methods"]["pmle"]["forward_kl"].keys() == {"mean", "se", "n"}
    assert on_disk["paired"].keys() == {"pmle", "dpo"}
    assert on_disk["paired"]["pmle"]["forward_kl"].keys() == {"mean", "low", "high"}
    assert on_disk["methods"] == json.loads(json.dumps(results["methods"]))
    for name in ("reference", "pmle", "dpo"):
        assert set(on_disk["methods"][name]) >= METRICS
    assert "win_rate" in on_disk["methods"]["pmle"]
    assert "win_rate" not in on_disk["methods"]["reference"]


def test_the_rows_of_target_and_reference_are_where_they_must_be(compared):
    """The target is at no distance from itself and the reference from itself; differences are paired ones."""
    methods = compared[0]["methods"]
    assert methods["target"]["forward_kl"]["mean"] == 0
    assert abs(methods["target"]["reverse_kl"]["mean"]) < 1e-4
    assert methods["reference"]["kl_reference"]["mean"] == 0
    assert methods["reference"]["forward_kl"]["mean"] > 0.1
    assert methods["reference"]["forward_kl"]["n"] == 6
    assert methods["reference"]["accuracy"]["n"] == 6
    for name in ("pmle", "dpo"):
        change = compared[0]["paired"][name]["forward_kl"]
        gap = methods[name]["forward_kl"]["mean"] - methods["reference"]["forward_kl"]["mean"]
        assert change["mean"] == pytest.approx(gap, abs=1e-9)
        assert change["low"] <= change["mean"] <= change["high"]


def test_the_run_folder_is_enough_to_look_again(compared, place):
    """Recipe, samples, curves, models that load, and a report without the network."""
    results, folder = compared
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6
    assert samples[0]["responses"].keys() == {"target", "reference", "pmle", "dpo"}
    assert load_recipe(folder / "recipe.yaml").name == "tiny"
    for name in ("pmle", "dpo"):
        points = results["curves"][name]
        assert points[0]["step"] == 0
        assert points[0]["forward_kl"]["mean"] == pytest.approx(results["methods"]["reference"]["forward_kl"]["mean"])
        assert results["kept_step"][name][0] in {point["step"] for point in points}
        AutoModelForCausalLM.from_pretrained(folder / name / "model")
        assert yaml.safe_load((folder / name / "model" / "README.md").read_text().split("---")[1])["tags"]
    page = write_report(folder).read_text()
    assert "KL(π*‖π)" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("base_url: http://127.0.0.1", "")


def test_the_same_recipe_gives_the_same_numbers(compared, place, tmp_path):
    """On one machine, whatever ran before."""
    torch.rand(5)
    again = compare(recipe(place, tmp_path), ["pmle", "dpo"], [0]).content
    assert json.dumps(again["methods"]) == json.dumps(compared[0]["methods"])


def test_several_seeds_have_a_folder_each_and_are_told_apart(place, tmp_path):
    """Averages over seeds on the same prompts; each seed's own numbers too."""
    settings = recipe(place, tmp_path, "training.num_train_epochs=1")
    results = compare(settings, ["pmle"], [0, 3]).content
    Results.parse(json.loads((settings.run_dir / "results.json").read_text()))
    assert results["seeds"] == [0, 3]
    assert {p.name for p in settings.run_dir.glob("seed-*")} == {"seed-0", "seed-3"}
    both = [row["forward_kl"]["mean"] for row in results["by_seed"]["pmle"]]
    assert both[0] != both[1]
    assert results["methods"]["pmle"]["forward_kl"]["mean"] == pytest.approx(sum(both) / 2)
    assert results["methods"]["pmle"]["forward_kl"]["n"] == 6
    assert results["methods"]["pmle"]["accuracy"]["n"] == 6


OWN = ("target=null", "early_stopping.patience=1")


def own_data(place):
    """The user's pairs instead of the target."""
    return (*OWN, f"data.train={place / 'pairs.jsonl'}", "data.held_out=0.3")


def test_own_pairs_are_compared_without_a_target(place, tmp_path):
    """No rows and no numbers that need one; also over seeds, which then share their held-out pairs."""
    settings = recipe(place, tmp_path, *own_data(place))
    results = compare(settings, ["dpo"], [0, 1]).content
    Results.parse(json.loads((settings.run_dir / "results.json").read_text()))
    assert results["methods"].keys() == {"reference", "dpo"}
    for row in results["methods"].values():
        assert not row.keys() & {"forward_kl", "reverse_kl", "win_rate"}
        assert row["accuracy"]["n"] == results["pairs"]["held_out"]
    assert results["methods"]["dpo"]["accuracy"]["mean"] > 0.8
    write_report(settings.run_dir)


def test_prompts_that_are_held_out_too_are_told(place, tmp_path, caplog):
    """`data.prompts` may be the file of the pairs: its prompts stand once, and those held out are named."""
    settings = recipe(place, tmp_path, *own_data(place), f"data.prompts={place / 'pairs.jsonl'}", "compare=[pd]",
                      methods={"pd": {"gamma": 0.5}}, reward={"train": {"gamma": 0.5}})  # fmt: skip
    setup = load_setup(settings, 0, measured=False)
    prompts = {tuple(one.prompt) for one in setup.prompts}
    assert len(prompts) == len(setup.prompts)
    shared = len(prompts & {tuple(pair.prompt) for pair in setup.held})
    assert shared
    assert f"{shared} held-out prompts are answered in training too" in caplog.text


def test_columns_that_a_reward_function_will_not_see_are_told(place, tmp_path, caplog):
    """A prompt is answered once, as the last of the rows that have it."""
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    same = [{**row, "answer": answer} for row in rows for answer in (1, 2)]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in same))
    (tmp_path / "mine.py").write_text("def mine(completions, answer):\n    return answer\n")
    settings = recipe(place, tmp_path, "target=null", f"data.train={tmp_path / 'same.jsonl'}",
                      methods={"rkl": {"gamma": 0.5}}, reward={"function": f"{tmp_path / 'mine.py'}:mine"})  # fmt: skip
    setup = load_setup(settings, 0, measured=False)
    assert f"rkl: {len(setup.train) // 2} pairs have the prompt of another and other columns" in caplog.text


def test_training_writes_the_documented_folder(place, tmp_path):
    """recipe.yaml, metrics.jsonl, model/ with its card; the held-out numbers are those of the step that was kept."""
    settings = recipe(place, tmp_path, *own_data(place), method="dpo")
    found = train(settings, "dpo").held_out
    folder = settings.train_dir / "dpo"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert found["loss"] == min(row["eval_loss"] for row in rows if "eval_loss" in row)
    assert found["rewards/accuracies"] > 0.8
    assert {"recipe.yaml", "model"} <= {path.name for path in folder.iterdir()}
    card = (folder / "model" / "README.md").read_text()
    assert "eval_loss" in card
    assert "kept_step" in card
    write_report(folder)


def test_a_run_whose_push_fails_is_whole(place, tmp_path, monkeypatch, caplog):
    """The model is saved, and how to push it again is said."""

    def fail(*_, **__):
        raise HTTPError("Server disconnected")

    made = type("Repository", (), {"repo_id": "me/mine"})
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: made)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", fail)
    result = train(recipe(place, tmp_path, "training.push_to_hub=true", "training.max_steps=1", method="pmle"), "pmle")
    assert (result.model / "README.md").is_file()
    assert "not pushed to the hub (Server disconnected); push it again with hf upload me/mine FOLDER" in caplog.text


def test_recompute_changes_no_number(place, tmp_path):
    """Whatever the backward pass computes again, a run learns the same."""
    losses = []
    for setting in ("none", "selective", "full"):
        flags = (f"recompute={setting}", f"name={setting}", "training.max_steps=2")
        settings = recipe(place, tmp_path, *own_data(place), *flags, method="dpo")
        losses.append(train(settings, "dpo").held_out["loss"])
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


def test_a_setting_without_effect_is_refused(place, tmp_path):
    """The engine never calls the forward that torch_compile compiles."""
    settings = recipe(place, tmp_path, *own_data(place), "training.torch_compile=true", method="dpo")
    with pytest.raises(TrainingError, match="torch_compile is True; it would compile"):
        train(settings, "dpo")


def test_training_without_held_out_pairs_says_so(place, tmp_path):
    """All pairs are learned from, nothing is measured, and the last step is kept."""
    settings = recipe(place, tmp_path, *own_data(place), "data.held_out=0.0", method="pmle")
    assert train(settings, "pmle").held_out == {}
    folder = settings.train_dir / "pmle"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "eval_loss" in row]
    assert rows[-1]["step"] == 10
    assert "Not measured" in (folder / "model" / "README.md").read_text()
    with pytest.raises(InputError, match=r"0 held-out prompts.*data.held_out"):
        compare(settings, ["pmle"], [0])


def test_a_run_goes_on_from_its_folder(place, tmp_path, monkeypatch):
    """Cut off in the middle and resumed: the same model and the same lines as without the cut."""
    steps = ("training.num_train_epochs=2", "training.save_total_limit=9", "early_stopping.patience=9")
    whole = recipe(place, tmp_path, *own_data(place), *steps, "name=whole", method="dpo")
    train(whole, "dpo")
    cut = recipe(place, tmp_path, *own_data(place), *steps, "name=cut", method="dpo")

    class Cut(Exception):
        pass

    original = experiment.AlignmentTrainer.training_step

    def failing(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise Cut
        return original(self, *args, **kwargs)

    monkeypatch.setattr(experiment.AlignmentTrainer, "training_step", failing)
    with pytest.raises(Cut):
        train(cut, "dpo")
    monkeypatch.setattr(experiment.AlignmentTrainer, "training_step", original)
    train(cut, "dpo", resume=True)
    lines = []
    for settings in (whole, cut):
        rows = [json.loads(line) for line in (settings.train_dir / "dpo" / "metrics.jsonl").read_text().splitlines()]
        lines.append([(row["step"], row.get("loss"), row.get("eval_loss")) for row in rows])
    assert lines[0] == lines[1]
    weights = [
        AutoModelForCausalLM.from_pretrained(settings.train_dir / "dpo" / "model").state_dict()
        for settings in (whole, cut)
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_run_and_a_comparison_of_one_name_have_folders_of_their_own(place, tmp_path):
    """Neither touches what the other wrote."""
    settings = recipe(place, tmp_path, *own_data(place), "training.max_steps=1", "early_stopping=null")
    folder = train(settings, "pmle").folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    root = compare(settings, ["pmle"], [0]).folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    before = {path: path.stat().st_mtime_ns for path in (root / "pmle").rglob("*")}
    train(settings, "pmle", overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in (root / "pmle").rglob("*")} == before


def test_a_new_run_in_an_old_folder_forgets_the_old_one(place, tmp_path):
    """Only when told to; then the checkpoints of the run before are not taken for its own."""
    settings = recipe(place, tmp_path, *own_data(place), method="dpo")
    old = settings.train_dir / "dpo" / "checkpoint-999"
    old.mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds checkpoint-999 of an earlier run.*--resume.*--overwrite"):
        train(settings, "dpo")
    assert old.exists()
    train(settings, "dpo", overwrite=True)
    assert not old.exists()
    with pytest.raises(InputError, match=r"holds no checkpoint to continue from"):
        train(recipe(place, tmp_path, *own_data(place), "name=other", method="dpo"), "dpo", resume=True)


# Arguments ------------------------------------------------------------------------------------------------------------


def test_the_best_step_is_kept_unless_the_recipe_says_otherwise(place, tmp_path):
    """Defaults, no evaluation at all, and settings of the user's own, which are never overruled."""

    def arguments(*overrides, held_out=True):
        settings = recipe(place, tmp_path, *overrides, training={"use_cpu": True})
        return training_arguments(settings, "pmle", tmp_path, held_out=held_out)

    default = arguments()
    assert default.load_best_model_at_end
    assert default.eval_on_start
    assert default.save_strategy == "steps"
    assert default.save_steps == default.eval_steps == 0.1
    assert not arguments("early_stopping=false").load_best_model_at_end
    never = arguments("training.eval_strategy=no")
    assert not never.load_best_model_at_end
    assert not never.eval_on_start
    assert arguments("training.save_steps=4", "training.eval_steps=2").save_steps == 4
    assert arguments(held_out=False).eval_strategy == "no"
    with pytest.raises(RecipeError, match="eval_strategy needs held-out pairs"):
        arguments("training.eval_strategy=steps", held_out=False)
    with pytest.raises(RecipeError, match="tiny: training of pmle"):
        arguments("training.save_steps=3", "training.eval_steps=2")


def test_a_comparison_saves_and_evaluates_at_steps_of_their_own(place, tmp_path):
    """It keeps the last step of every method; a training that is to keep its best is refused."""
    settings = recipe(place, tmp_path, "training.save_steps=1", "training.eval_steps=3", training={"use_cpu": True})
    check(settings, ["pmle"], compared=True)
    with pytest.raises(RecipeError, match=r"round multiple.*set eval_steps to what save_steps is"):
        check(settings, ["pmle"])


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_objective/kl", False),
        ("forward_kl", False),
        ("eval_rollout/mismatch_kl", False),
        ("nll", False),
        ("eval_ece", False),
        ("eval_second_loss", False),
        ("eval_rewards/accuracies", True),
        ("eval_objective/reward", True),
    ],
)
def test_the_best_step_is_that_of_the_smallest_kl(place, tmp_path, metric, greater):
    """In a recipe and in Python; greater_is_better is never overruled."""
    settings = recipe(place, tmp_path, f"training.metric_for_best_model={metric}", training={"use_cpu": True})
    assert training_arguments(settings, "pmle", tmp_path, held_out=True).greater_is_better is greater
    own = AlignmentConfig(
        output_dir=str(tmp_path), use_cpu=True, metric_for_best_model=metric, greater_is_better=not greater
    )
    assert own.greater_is_better is not greater


def test_a_run_without_evaluation_trains(place, tmp_path):
    """Early stopping is on by default, and has nothing to go by where evaluation is off."""
    settings = recipe(place, tmp_path, *own_data(place), "training.eval_strategy=no", method="pmle")
    assert train(settings, "pmle").held_out == {}
    assert (settings.train_dir / "pmle" / "model" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("off", ["training.eval_strategy=no", "data.held_out=0"])
def test_early_stopping_without_evaluation_is_told(place, tmp_path, caplog, off):
    """Where it is set; a comparison keeps the last step whatever it says, and the default means nothing."""
    settings = recipe(place, tmp_path, *own_data(place), "early_stopping.patience=2", off)
    check(settings, ["pmle"], compared=True)
    check(recipe(place, tmp_path, *own_data(place), "early_stopping=true", off), ["pmle"])
    assert "early_stopping" not in caplog.text
    check(settings, ["pmle"])
    assert "tiny: early_stopping is set and nothing is evaluated: it has no effect on pmle" in caplog.text


def test_prompts_that_nothing_reads_are_told(place, tmp_path, caplog):
    """Methods that draw no responses learn from the pairs alone."""
    settings = recipe(place, tmp_path, *own_data(place), "data.prompts=no-such-file.jsonl",
                      methods={"pmle": {"beta": 0.0}, "dpo": {}, "rkl": {}}, reward={"exact": True})  # fmt: skip
    check(settings, ["pmle", "rkl"])
    assert "is not read" not in caplog.text
    check(settings, ["pmle", "dpo"])
    assert "data.prompts no-such-file.jsonl is not read: no method draws responses (pmle, dpo)" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["target.max_new_tokens=60"], r"target.max_new_tokens is 60, but the model has 64 positions; lower"),
        (["evaluation.max_new_tokens=60"], r"evaluation.max_new_tokens is 60, but the model has 64 positions"),
        (["evaluation.prompts=1"], r"measured on 1 held-out prompts and 12 pairs"),
        (["target.eval_pairs=1"], r"and 1 pairs; standard errors need two"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_weights_are_loaded(
    place, tmp_path, monkeypatch, overrides, message
):
    """Not after an hour of training."""
    monkeypatch.setattr("distalign.experiments.setup._load", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(InputError, match=message):
        compare(recipe(place, tmp_path, *overrides), ["pmle"], [0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.max_length=5000"], r"data.max_length is 5000, but the model has 64 positions; lower it"),
        (["data.max_length=8"], r"max_length is 8"),
        (["evaluation.max_new_tokens=60"], r"evaluation.max_new_tokens is 60"),
    ],
)
def test_own_pairs_that_do_not_fit_are_refused_before_the_weights_are_loaded(
    place, tmp_path, monkeypatch, overrides, message
):
    """With what to change."""
    monkeypatch.setattr("distalign.experiments.setup._load", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(InputError, match=message):
        compare(recipe(place, tmp_path, *own_data(place), *overrides), ["pmle"], [0])


def test_numbers_that_could_not_be_computed_are_null():
    """JSON has no NaN."""
    found = finite({"a": [math.nan, 1.0], "b": (math.inf, "x"), "c": {"d": 2}})
    assert json.loads(json.dumps(found, allow_nan=False)) == {"a": [None, 1.0], "b": [None, "x"], "c": {"d": 2}}


def test_loggers_are_told_the_run_and_its_group(place, tmp_path):
    """A name for each method and seed, and one project; what the recipe says itself stays."""

    def arguments(*overrides, seed=0):
        settings = recipe(place, tmp_path, *own_data(place), *overrides)
        return experiment.training_arguments(settings, "dpo", tmp_path, held_out=True, seed=seed)

    made = arguments(seed=3)
    assert (made.run_name, made.project) == ("tiny-dpo-seed-3", "tiny")
    assert arguments("training.run_name=mine").run_name == "mine"


def test_wandb_has_one_run_for_each_method_in_the_recipes_group(monkeypatch, tmp_path):
    """Its group is in the environment while a run is logged, which is closed after it; the user's own run stays."""
    calls = []

    class Wandb(ModuleType):
        run = None

        def finish(self):
            calls.append("finish")
            self.run = None

    wandb = Wandb("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    args.report_to = ["wandb"]
    for _ in range(2):
        with one_run(args, "mine"):
            assert wandb.run is None
            assert os.environ["WANDB_RUN_GROUP"] == "mine"
            wandb.run = object()
        assert "WANDB_RUN_GROUP" not in os.environ
    assert calls == ["finish", "finish"]
    wandb.run = object()
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    with one_run(args, "mine"):
        assert os.environ["WANDB_RUN_GROUP"] == "theirs"
    assert os.environ["WANDB_RUN_GROUP"] == "theirs"
    assert wandb.run is not None


# A folder that is kept ------------------------------------------------------------------------------------------------


RKL = {"rkl": {"gamma": 0.5, "beta": 0.1}}


def contents(folder):
    """Files and when they were written, but for the lock and the probe whether a folder can be written."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_nothing_is_deleted_before_everything_is_checked(place, tmp_path, monkeypatch):
    """What cannot be used is found in the data, the settings, or only by the trainer; or another process is there."""
    short = (*own_data(place), "training.max_steps=1", "reward={train: {gamma: 0.5}}")
    settings = recipe(place, tmp_path, *short, methods=RKL)
    folder = train(settings, "rkl").folder
    before = contents(folder)

    def again(*overrides):
        train(recipe(place, tmp_path, *short, "methods.rkl.gamma=0.4", *overrides, methods=RKL), "rkl", overwrite=True)

    for wrong in ("data.train=nowhere.jsonl", "training.optim=adamm"):
        with pytest.raises(InputError):
            again(wrong)
    with monkeypatch.context() as patch:
        patch.setattr("distalign.training.inputs.check_trained", refuse)
        with pytest.raises(TrainingError, match="seen by the trainer"):
            again()
    with locked(folder):
        assert exit_code_elsewhere(again) == 2
    assert before.items() <= contents(folder).items()
    again()
    assert not before.items() & {path: time for path, time in contents(folder).items() if "reward" in str(path)}.items()


def refuse(*_):
    """What only the trainer sees."""
    raise TrainingError("seen by the trainer")


def test_a_comparison_keeps_its_results_until_another_begins(place, tmp_path):
    """Data that cannot be read, or another process in the folder, costs nothing."""
    settings = recipe(place, tmp_path, *own_data(place), "training.max_steps=1", method="dpo")
    folder = compare(settings, ["dpo"], [0]).folder
    before = contents(folder)
    lost = recipe(place, tmp_path, *own_data(place), "data.train=nowhere.jsonl", method="dpo")
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        compare(lost, ["dpo"], [0], overwrite=True)
    with locked(folder):
        assert exit_code_elsewhere(lambda: compare(settings, ["dpo"], [0])) == 2
    assert contents(folder) == before


@pytest.mark.parametrize("again", [{"resume": True}, {"overwrite": True}])
def test_a_comparison_deletes_nothing_before_everything_is_checked(place, tmp_path, monkeypatch, again):
    """Also where only the trainer refuses, after another reward was trained: results, record, model and reward stay."""
    own = (*own_data(place), "training.max_steps=1", "reward={train: {gamma: 0.5}}")
    folder = compare(recipe(place, tmp_path, *own, methods=RKL), ["rkl"], [0]).folder
    before = contents(folder)
    changed = recipe(place, tmp_path, *own, "reward={train: {gamma: 0.4}}", methods=RKL)
    with monkeypatch.context() as patch:
        patch.setattr("distalign.training.inputs.check_trained", refuse)
        with pytest.raises(TrainingError, match="seen by the trainer"):
            compare(changed, ["rkl"], [0], **again)
    assert before.items() <= contents(folder).items()
    compare(changed, ["rkl"], [0], **again)
    after = contents(folder)
    for file in ("results.json", "rkl/finished.json", "rkl/run.json", "reward/reward.json"):
        assert before[folder / file] != after[folder / file]
    assert not (folder / "reward.new").exists()


@pytest.mark.parametrize("link", [".", "seed-0", "seed-1/pmle", "seed-0/reward"])
@pytest.mark.parametrize("again", [{}, {"resume": True}, {"overwrite": True}])
def test_a_comparison_does_not_go_through_a_link(place, tmp_path, link, again):
    """Its folder, a seed's, a method's or a reward's."""
    settings = recipe(place, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "tables").mkdir(parents=True)
    (settings.run_dir / link).parent.mkdir(parents=True)
    (settings.run_dir / link).symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"is a link to .*elsewhere, and nothing is deleted through a link"):
        compare(settings, ["pmle"], [0, 1], **again)
    assert [path.name for path in elsewhere.rglob("*")] == ["tables"]


def test_overwrite_does_not_go_through_a_link(place, tmp_path):
    """A folder of the run that is a link is refused; a link in it goes, and what it points to stays."""
    settings = recipe(place, tmp_path, *own_data(place), "training.max_steps=1", method="pmle")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "checkpoint-9").mkdir(parents=True)
    folder = settings.train_dir / "pmle"
    settings.train_dir.mkdir(parents=True)
    folder.symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"pmle: is a link to .*elsewhere, and nothing is deleted through a link"):
        train(settings, "pmle", overwrite=True)
    folder.unlink()
    folder.mkdir()
    for name in ("checkpoint-9", "tables", "model", "samples.jsonl"):
        (folder / name).symlink_to(elsewhere)
    train(settings, "pmle", overwrite=True)
    assert not (folder / "checkpoint-9").is_symlink()
    assert not (folder / "model").is_symlink()
    assert [path.name for path in elsewhere.rglob("*")] == ["checkpoint-9"]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(place, tmp_path, monkeypatch, caplog):
    """Also with only a damaged one: --resume begins it again and says so, and the reward that was trained is kept."""
    settings = recipe(
        place, tmp_path, *own_data(place), "training.max_steps=2", "reward={train: {gamma: 0.5}}", methods=RKL
    )
    whole = train(settings, "rkl")
    weights = (whole.model / "adapter_model.safetensors").read_bytes()
    lines = (whole.folder / "samples.jsonl").read_text()
    for checkpoint in whole.folder.glob("checkpoint-*"):
        (checkpoint / "manifest.json").unlink()
    monkeypatch.setattr("distalign.experiments.train.train_reward", lambda *_, **__: pytest.fail("trained again"))
    train(settings, "rkl", resume=True)
    assert "holds no complete checkpoint: the run begins anew" in caplog.text
    assert "is of an earlier run" not in caplog.text
    assert (whole.model / "adapter_model.safetensors").read_bytes() == weights
    assert (whole.folder / "samples.jsonl").read_text() == lines


def test_a_merged_model_stays_when_a_run_goes_on(place, tmp_path, caplog):
    """With what the user has put there, with a checkpoint and without one; it is said that it may be an older one."""
    settings = recipe(place, tmp_path, *own_data(place), "training.max_steps=1", method="pmle")
    folder = train(settings, "pmle").folder
    own = folder / "merged" / "model.gguf"
    own.parent.mkdir()
    own.write_text("weights")
    train(settings, "pmle", resume=True)
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "manifest.json").unlink()
    train(settings, "pmle", resume=True)
    assert own.read_text() == "weights"
    assert caplog.text.count(f"run distalign merge {folder} --overwrite") == 2


@pytest.mark.parametrize("given", ["model", "link", "file", "adapter", "out", "merged", "checkpoint", "samples"])
def test_a_run_does_not_replace_what_it_reads(place, tmp_path, given):
    """Its model by name, by a link to it, its files or out of it, an adapter's base, a merged one, data: all stay."""
    own = (*own_data(place), "training.max_steps=1", "lora=false")
    folder = train(recipe(place, tmp_path, *own, method="pmle"), "pmle").folder
    model, other = folder / "model", tmp_path / "other"
    (folder / "merged").symlink_to(model)
    read = {"merged": folder / "merged", "checkpoint": next(folder.glob("checkpoint-*"))}.get(given, model)
    if given == "link":
        other.symlink_to(model)
    elif given == "file":
        other.mkdir()
        for path in model.iterdir():
            (other / path.name).symlink_to(path)
    elif given == "adapter":
        more = recipe(place, tmp_path, *own_data(place), "training.max_steps=1", f"model={model}", "name=more")
        read = train(more, "pmle").model
    elif given == "out":
        shutil.rmtree(model)
        model.symlink_to(place / "model")
    elif given == "samples":
        (folder / "samples.jsonl").write_bytes((place / "pairs.jsonl").read_bytes())
        own, read = (*own, f"data.train={folder / 'samples.jsonl'}"), place / "model"
    read = other if other.exists() else read
    before = contents(folder)
    settings = recipe(place, tmp_path, *own, f"model={read}", "lora=true", method="pmle")
    with pytest.raises(InputError, match=r"is read by this run, and .* lies in .*; copy it to another place, or give"):
        train(settings, "pmle", overwrite=True)
    assert contents(folder) == before


def test_a_comparison_does_not_replace_what_it_reads(place, tmp_path):
    """A model that it trained before, of one seed or of several, and code beside the reward that it would train."""
    root = recipe(place, tmp_path).run_dir
    code = root / "reward" / "code.py"
    code.parent.mkdir(parents=True)
    code.touch()
    reading = {
        "pmle/model": f"model={root}/pmle/model",
        "seed-1/pmle/model": f"model={root}/seed-1/pmle/model",
        "reward": f"reward=[{{train: {{gamma: 0.5}}}}, {{function: '{code}:reward'}}]",
    }
    for name, read in reading.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        with pytest.raises(InputError, match=rf"is read by this run, and .* lies in {root / name}, which"):
            compare(recipe(place, tmp_path, *own_data(place), read), ["pmle"], [0, 1] if "seed" in name else [0])


@pytest.mark.parametrize("again", [{"resume": True}, {"overwrite": True}])
def test_the_users_files_beside_the_model_stay(place, tmp_path, again):
    """Where a run that had ended is resumed, and where another takes its place; what the earlier one wrote goes."""
    own = (*own_data(place), "training.max_steps=1")
    folder = train(recipe(place, tmp_path, *own, method="pmle"), "pmle").model
    (folder / "model-q4.gguf").write_text("mine")
    (folder / "plots").mkdir()
    (folder / "chat_template.jinja").write_text("of another tokenizer")
    before = {path.name for path in folder.iterdir()}
    settings = recipe(place, tmp_path, *own, *(["lora=false"] if "overwrite" in again else []), method="pmle")
    after = {path.name for path in train(settings, "pmle", **again).model.iterdir()}
    assert (folder / "model-q4.gguf").read_text() == "mine"
    assert (folder / "chat_template.jinja").read_text() != "of another tokenizer"
    gone = {"adapter_config.json", "adapter_model.safetensors", "base.sha256"}
    assert before - after == (gone if "overwrite" in again else set())


def test_a_reward_is_there_whole_or_not_at_all(place, tmp_path, monkeypatch):
    """Lost while it is written, it is trained again by --resume."""
    settings = recipe(
        place, tmp_path, *own_data(place), "training.max_steps=1", "reward={train: {gamma: 0.5}}", methods=RKL
    )

    def lost(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "potential", lost)
        with pytest.raises(KeyboardInterrupt):
            train(settings, "rkl")
    assert not list((settings.train_dir / "rkl").rglob("reward.json"))
    train(settings, "rkl", resume=True)
    assert (settings.train_dir / "rkl" / "reward" / "reward.json").is_file()
