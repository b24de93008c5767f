"""A comparison that was stopped goes on: nothing that is done is done again, and the numbers come out the same."""

from __future__ import annotations

import json
import logging
import shutil
import sys

import pytest
import tiny

from distalign import cli
from distalign.errors import InputError
from distalign.experiments import compare as comparison
from distalign.experiments.compare import compare
from distalign.experiments.recipe import load_recipe
from distalign.experiments.results import run_key
from distalign.training import trainer

REWARDED = (
    "reward={train: {init: scratch}}",
    "methods={rkl: {gamma: 0.5, beta: 0.1}}",
    "rollout.num_generations=2",
)


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """The tiny recipe with its own folder."""
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny.recipe_text(tmp_path, model=str(tiny_folder)))

    def make(*overrides):
        return load_recipe(path, overrides)

    return make


@pytest.fixture
def trained(monkeypatch):
    """The methods that are trained from now on, and whether each went on from a checkpoint."""
    seen = []
    real = comparison.train_method

    def note(setup, name, folder, *, resume=False, **more):
        seen.append((setup.seed, name, resume))
        return real(setup, name, folder, resume=resume, **more)

    monkeypatch.setattr(comparison, "train_method", note)
    return seen


def numbers(results):
    """What must not depend on a stop in between."""
    kept = ("methods", "paired", "curves", "kept_step", "calibration", "by_seed", "significance")
    return json.loads(json.dumps({key: results[key] for key in kept}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder):
    """The run folders of a comparison of two methods with two seeds, and of one with a reward that was trained."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "tiny.yaml"
    path.write_text(tiny.recipe_text(folder, model=str(tiny_folder)))
    results = compare(load_recipe(path, ["name=whole"]), ["pmle", "dpo"], [0, 1]).content
    compare(load_recipe(path, ["name=rewarded", *REWARDED]), ["rkl"], [0])
    return results, folder / "runs"


@pytest.fixture
def begun(finished, recipe):
    """Copies a finished run, or one seed of it, to the folder of this test's recipe."""

    def copy(name):
        folder = recipe().run_dir
        shutil.copytree(finished[1] / name, folder)
        return folder

    return copy


def test_a_stopped_comparison_goes_on_and_ends_the_same(finished, begun, recipe, trained, monkeypatch):
    """Stopped in the middle of the second method of the second seed, which goes on from its checkpoint."""
    whole, folder = finished[0], begun("whole")
    shutil.rmtree(folder / "seed-1" / "dpo")
    real, steps = trainer.AlignmentTrainer.training_step, []

    def stop(self, *args, **more):
        steps.append(None)
        if self.state.global_step == self.state.max_steps - 1:
            raise KeyboardInterrupt
        return real(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.AlignmentTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            compare(recipe(), ["pmle", "dpo"], [0, 1], resume=True)
    assert trained == [(1, "dpo", False)]
    assert steps
    trained.clear()
    assert numbers(compare(recipe(), ["pmle", "dpo"], [0, 1], resume=True).content) == numbers(whole)
    assert trained == [(1, "dpo", True)]
    trained.clear()
    assert numbers(compare(recipe(), ["pmle", "dpo"], [0, 1], resume=True).content) == numbers(whole)
    assert trained == []


def test_what_has_changed_is_done_again(begun, recipe, trained):
    """Another setting of one method, other pairs, a torn record; and with overwrite everything."""
    folder = begun("whole/seed-0")

    def again(*overrides, methods=("pmle",), resume=True):
        trained.clear()
        compare(recipe(*overrides), list(methods), [0], resume=resume, overwrite=not resume)
        return trained

    assert again("methods.dpo.gamma=0.3", methods=("pmle", "dpo")) == [(0, "dpo", False)]
    (folder / "pmle" / "finished.safetensors").write_bytes(b"torn")
    assert [name for _, name, _ in again()] == ["pmle"]
    assert again("target.pairs=20") == [(0, "pmle", False)]
    with pytest.raises(InputError, match=r"holds results\.json of an earlier comparison; go on with --resume"):
        compare(recipe("target.pairs=20"), ["pmle"], [0])
    assert again("target.pairs=20", resume=False) == [(0, "pmle", False)]


@pytest.mark.parametrize("left", ["pmle/finished.json", "pmle/model", "pmle/checkpoint-3"])
@pytest.mark.parametrize("seed", [".", "seed-1"])
def test_any_rest_of_a_comparison_is_refused(recipe, left, seed):
    """Killed before results.json was written, with one seed or several, with checkpoints or without."""
    (recipe().run_dir / seed / left).mkdir(parents=True)
    with pytest.raises(InputError, match=rf"holds .*{left} of an earlier comparison; go on with --resume"):
        compare(recipe(), ["pmle"], [0])


def test_a_killed_runs_new_reward_is_nobodys(begun, recipe):
    """It waited for a method to begin, and none did."""
    folder = begun("rewarded")
    shutil.copytree(folder / "reward", folder / "reward.new")
    (folder / "reward.new" / "mark").touch()
    compare(recipe(*REWARDED), ["rkl"], [0], resume=True)
    assert not (folder / "reward.new").exists()
    assert not (folder / "reward" / "mark").exists()


def test_the_marks_are_of_all_methods_together(finished):
    """Holm's p is never below the bootstrap's own, and stars go by it."""
    marks = finished[0]["significance"]
    assert set(marks) == {"pmle", "dpo"}
    for row in marks.values():
        assert "forward_kl" in row
        for mark in row.values():
            assert mark["p"] <= mark["holm"] <= 1
            assert (mark["stars"] != "") == (mark["holm"] < 0.05)


def test_seeds_and_methods_that_would_be_lost_are_told(begun, recipe, trained, caplog):
    """One seed lies elsewhere than several: nothing would be found. A method that is not named leaves the results."""
    begun("whole")
    with pytest.raises(InputError, match="of a comparison of several seeds; go on with the seeds it had"):
        compare(recipe(), ["pmle"], [0], resume=True)
    compare(recipe(), ["pmle"], [0, 1], resume=True)
    assert "its results hold dpo too, and are replaced" in caplog.text
    shutil.rmtree(recipe().run_dir)
    begun("whole/seed-0")
    with pytest.raises(InputError, match="of a comparison of one seed"):
        compare(recipe(), ["pmle"], [0, 1], resume=True)
    assert trained == []


def test_a_model_that_is_gone_is_trained_again(begun, recipe, trained):
    """Its record alone is not what was asked for."""
    folder = begun("whole/seed-0")
    for file in (folder / "pmle" / "model").glob("*.safetensors"):
        file.unlink()
    compare(recipe(), ["pmle"], [0], resume=True)
    assert [name for _, name, _ in trained] == ["pmle"]
    assert list((folder / "pmle" / "model").glob("*.safetensors"))


def test_the_command_goes_on(begun, trained, tmp_path, monkeypatch):
    """distalign compare … --resume."""
    begun("whole/seed-0")
    words = ["compare", str(tmp_path / "tiny.yaml"), "--methods", "pmle", "--resume"]
    monkeypatch.setattr(sys, "argv", ["distalign", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert trained == []


def test_other_weights_or_labels_under_the_same_names_start_over(recipe, trained, tmp_path, tiny_folder, caplog):
    """The model's folder and the pairs' file keep their names, not their content; a lost model is trained again."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    pairs = tiny.write_pairs(tmp_path / "pairs.jsonl")
    own = (f"model={tmp_path}/model", "target=null", f"data.train={pairs}", "data.held_out=0.3")

    def again():
        trained.clear()
        compare(recipe(*own), ["pmle"], [0], resume=True)
        return [name for _, name, _ in trained]

    compare(recipe(*own), ["pmle"], [0])
    assert again() == []
    moved = tmp_path / "elsewhere.jsonl"
    pairs.rename(moved)
    compare(recipe(*own, f"data.train={moved}"), ["pmle"], [0], resume=True)
    moved.rename(pairs)
    assert trained == []
    assert "is trained again" not in caplog.text
    tiny.model(initializer_range=0.3).save_pretrained(tmp_path / "model")
    assert again() == ["pmle"]
    assert "pmle, seed 0: is trained again: its settings, data or weights are not those it had" in caplog.text
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in swapped))
    assert again() == ["pmle"]
    shutil.rmtree(recipe().run_dir / "pmle" / "model")
    assert again() == ["pmle"]
    assert (recipe().run_dir / "pmle" / "model").is_dir()


def test_a_reward_of_other_pairs_is_trained_again(begun, recipe, caplog):
    """A reward stays with the pairs that it was trained on, and goes with others."""
    (weights,) = (begun("rewarded") / "reward").glob("*.safetensors")
    before, stamp = weights.read_bytes(), weights.stat().st_mtime_ns
    with caplog.at_level(logging.INFO, "distalign.experiments.compare"):
        compare(recipe(*REWARDED), ["rkl"], [0], resume=True)
    assert weights.stat().st_mtime_ns == stamp
    assert "trained anew" not in caplog.text
    compare(recipe(*REWARDED, "target.gamma=0.9"), ["rkl"], [0], resume=True)
    assert weights.read_bytes() != before


@pytest.mark.parametrize("torn", ["model.safetensors", "reward.json", "run.json"])
def test_a_reward_that_was_not_written_to_its_end_is_trained_anew(begun, recipe, trained, caplog, torn):
    """Weights or settings cut in the middle, or a training that was stopped: the same reward, and a line in the log."""
    folder = begun("rewarded") / "reward"
    whole = (folder / "model.safetensors").read_bytes()
    (folder / torn).write_bytes((folder / torn).read_bytes()[:-20])
    with caplog.at_level(logging.INFO, "distalign.experiments.compare"):
        compare(recipe(*REWARDED), ["rkl"], [0], resume=True)
    assert "trained anew" in caplog.text
    assert str(folder) in caplog.text
    assert (folder / "model.safetensors").read_bytes() == whole
    assert trained == []


@pytest.mark.parametrize("by_module", [True, False])
def test_a_changed_reward_function_is_another_run(recipe, tmp_path, monkeypatch, by_module):
    """By path and by module, which is found without being run; to a method that takes no reward it does not matter."""
    package = tmp_path / "rewards_of_resume"
    package.mkdir()
    (package / "__init__.py").write_text("")
    own = package / "own.py"
    own.write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    place = "rewards_of_resume.own" if by_module else own
    made = recipe(f"reward={{function: '{place}:short'}}", "methods={rkl: {gamma: 0.5}, pmle: {gamma: 0.5, beta: 0}}")

    def keys():
        return [run_key(made, name, 0, "weights", "data") for name in ("rkl", "pmle")]

    before = keys()
    assert keys() == before
    own.write_text("raise SystemExit  # for another reason")
    after = keys()
    assert after[0] != before[0]
    assert after[1] == before[1]
    assert "rewards_of_resume.own" not in sys.modules
