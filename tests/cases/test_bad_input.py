"""Inputs that once ended in a traceback or hung (`scripts/fuzz.py` found them): each is one of a kind."""

from __future__ import annotations

import json
import math

import pytest
import report_data
import tiny
import torch

from distalign.cli.shared import read_seeds
from distalign.data import DataError, encode_pairs, read_pairs
from distalign.engine import Group
from distalign.errors import InputError
from distalign.evaluation.evaluate import evaluate
from distalign.experiments.recipe import load_recipe
from distalign.experiments.results import is_of
from distalign.experiments.train import check
from distalign.models.load import Source, find_model
from distalign.models.policy import Lora, make_policy, trained_temperature
from distalign.models.verify import ModelError
from distalign.report import ReportError, write_report
from distalign.report.numbers import format_estimate, format_seconds
from distalign.rewards.reward_model import is_reward_model
from distalign.settings import RecipeError, find_recipe, parse_value, read_yaml
from distalign.training.checkpoint import checkpoints, defect
from distalign.user_code import load_named

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: !!int x\n", "a value is not of its kind: invalid literal"),
        ("a: !!bool maybe\n", "a value is not of its kind: .maybe"),
        ("a: !!timestamp z\n", "a value is not of its kind"),
        ("a: !!map x\n", "expected a mapping node"),
        ("a: " + "1" * 5000 + "\n", "a value is not of its kind: Exceeds the limit"),
        (BOMB, "aliases that make it too large"),
        ("a: &a [*a]\n", "an alias of what it stands in"),
        ("a: " + "[" * 3000 + "\n", "too many levels"),
        ("a: " + "{a: " * 500 + "\n", "too many levels"),
    ],
    ids=[
        "tag",
        "tag of a word",
        "tag of a date",
        "tag of a mapping",
        "number",
        "bomb",
        "loop",
        "deep",
        "deep mapping",
    ],
)
def test_yaml_is_bounded_and_its_tags_are_checked(tmp_path, text, said):
    """In a file and in a flag, at once."""
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        read_yaml(tmp_path / "x.yaml")
    with pytest.raises(RecipeError, match=r"--set a=.*not YAML"):
        parse_value(text, "a=…")


def test_half_a_character_is_named():
    """YAML writes it as an escape; no setting can hold it."""
    with pytest.raises(RecipeError, match=r"a text holds .ud800, half a character"):
        load_recipe({**read_yaml(find_recipe("pairs")), "training": {"\ud800": 1}})


def test_an_alias_of_a_few_settings_stays(tmp_path):
    """It is the bound that refuses, not the alias."""
    (tmp_path / "x.yaml").write_text("a: &a {r: 1}\nb: *a\nc: {<<: *a, s: 2}\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": {"r": 1}, "b": {"r": 1}, "c": {"r": 1, "s": 2}}


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-of-that-name/x", "x/" * 3000])
def test_a_name_that_no_system_takes_is_no_file(name):
    """Wherever a name may be one of a file."""
    for read in (load_recipe, read_pairs, find_model):
        with pytest.raises(InputError):
            read(f"{name}/a/b/c.yaml")
    with pytest.raises(InputError):
        load_recipe(name)
    with pytest.raises(InputError):
        load_named(f"{name}.py:f", "function", callable, label="x", error=InputError)
    assert not is_reward_model(name)


@pytest.mark.parametrize("name", ["", "."])
def test_a_folder_is_no_recipe(name, tmp_path):
    """Nor is the empty name."""
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(name)
    with pytest.raises(RecipeError, match="is no file; give a recipe's file"):
        load_recipe(f"{tmp_path}/")


def test_a_device_is_no_recipe():
    """It would be read without end."""
    with pytest.raises(RecipeError, match=r"/dev/zero: is no file; give a recipe's file"):
        load_recipe("/dev/zero")


def test_an_empty_list_of_messages_is_an_empty_prompt():
    """Not an IndexError."""
    with pytest.raises(DataError, match="prompt is empty"):
        read_pairs([{"prompt": [], "chosen": "a", "rejected": "b"}])


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("results.json", "[" * 100_000, r"results.json:1: numbers too long or levels too many"),
        ("results.json", f'{{"a": {"1" * 5000}}}', r"results.json:1: numbers too long"),
        (
            "pmle/metrics.jsonl",
            '{"step": 1}\n' + "[" * 100_000,
            r"metrics.jsonl:2: numbers too long or levels too many",
        ),
        ("samples.jsonl", f'{{"prompt": {"1" * 5000}}}', r"samples.jsonl:1: numbers too long"),
    ],
)
def test_json_of_a_run_that_cannot_be_read_is_named(tmp_path, file, text, said):
    """With its line."""
    folder = report_data.write_evaluation(tmp_path / "run")
    (folder / file).write_text(text)
    with pytest.raises(ReportError, match=said):
        write_report(folder, files=False)


def test_a_number_that_no_float_holds_is_left_out(tmp_path):
    """Of a log, as text is."""
    folder = report_data.write_training(tmp_path / "run")
    report_data.write_lines(folder / "metrics.jsonl", [{"step": 1, "loss": 1.0, "x": 10**400}])
    assert "0" * 300 not in write_report(folder, files=False).read_text()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json", "adapter_config.json"])
@pytest.mark.parametrize("text", ["[]", "[[1]]", '"x"', "{", "3"])
def test_a_damaged_file_of_a_model_is_one_message(tmp_path, file, text):
    """Whatever the library raises."""
    folder = tmp_path / "model"
    tiny.tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "adapter_model.safetensors").touch()
    (folder / file).write_text(text)

    def load():
        source = find_model(str(folder))
        return source.config(), source.tokenizer(), source.model()

    with pytest.raises(ModelError, match="cannot be loaded"):
        load()


@pytest.mark.parametrize("text", ["[]", '"x"', "{"])
def test_a_damaged_generation_config_is_named(tmp_path, text):
    """Before a policy is measured at its temperature."""
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        trained_temperature(str(tmp_path))


def test_a_template_that_reads_parts_is_given_parts():
    """As those of models that see images, which would write nothing for a text."""
    words = "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
    tokenizer, parts = tiny.tokenizer(), tiny.tokenizer()
    parts.chat_template = tiny.TEMPLATE.replace("{{ m['content'] }}", words)
    row = {"prompt": [{"role": "user", "content": "tell me"}]}
    row |= {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "warm"), ("rejected", "cold"))}
    (plain,), _ = encode_pairs(tokenizer, read_pairs([row]), max_length=None)
    (pair,), _ = encode_pairs(parts, read_pairs([row]), max_length=None)
    assert pair.key == plain.key


def test_a_template_that_fails_on_a_row_is_named():
    """Whatever it raises."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}<|im_end|>{{ 1 // (m.content | length - 3) }}{% endfor %}"
    )
    row = {"prompt": [{"role": "user", "content": "tell"}]}
    row |= {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "sun"), ("rejected", "cold"))}
    with pytest.raises(DataError, match="the chat template refuses the row"):
        encode_pairs(tokenizer, read_pairs([row]), max_length=None)


def test_a_prompt_of_one_turn_has_no_earlier_turns():
    """The message says what is rewritten."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ 'tell ' if messages | length == 1 }}" + tiny.TEMPLATE
    row = {"prompt": [{"role": "user", "content": "me"}]}
    row |= {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "sun"), ("rejected", "cold"))}
    with pytest.raises(DataError, match="rewrites the question where an answer follows"):
        encode_pairs(tokenizer, read_pairs([row]), max_length=None)


def test_what_is_far_from_every_setting_is_not_called_one(tmp_path):
    """A vocabulary is no misspelled evaluation."""
    with pytest.raises(RecipeError) as refused:
        load_recipe({"name": "x", "model": "m", "methods": {"dpo": None}, "vocabulary": 4, "data": {"train": "x"}})
    assert "did you mean" not in str(refused.value)
    assert json.dumps("vocabulary") in str(refused.value)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    """The folder of an evaluation, and of a report."""
    monkeypatch.chdir(tmp_path)
    settings = {"name": "x" * 5000, "model": "no-such/model", "pairs": "pairs.jsonl", "policies": {"a": "b/c"}}
    with pytest.raises(InputError, match="cannot be written"):
        evaluate(settings)
    folder = report_data.write_training(tmp_path / "run")
    with pytest.raises(ReportError, match="write the page elsewhere with --out"):
        write_report(folder, "/dev/null/x", files=False)
    with pytest.raises(ReportError, match="check the path"):
        write_report("x" * 5000)
    assert write_report(folder, tmp_path / "new" / "folder", files=False).is_file()


RECIPE = {"name": "x", "model": "m", "methods": {"dpo": None}, "data": {"train": "x.jsonl"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": {"eval_steps": math.inf}}, "training.eval_steps is inf; a finite number is needed"),
        ({"training": {"learning_rate": math.nan}}, "training.learning_rate is nan; a finite number is needed"),
        ({"methods": {"dpo": {"training": {"max_grad_norm": math.inf}}}}, "dpo.training.max_grad_norm is inf"),
        ({"methods": {1: {"class": "dpo"}}}, "methods: 1 is no name"),
        ({"seed": 2**32}, "seed is 4294967296; input should be less than 4294967296"),
        ({"token_budget": 10**400}, "token_budget is 1000.*…; input should be less than 2147483648"),
    ],
)
def test_numbers_that_no_run_takes_are_refused(change, said):
    """Before anything is loaded, and not written out in full."""
    with pytest.raises(RecipeError, match=said):
        load_recipe({**RECIPE, **change})


@pytest.mark.parametrize("text", [str(2**63), "0," + "9" * 40, "1000"])
def test_seeds_that_no_run_takes_are_refused(text):
    """Not a list of as many numbers."""
    with pytest.raises(InputError, match="too many, or too large a seed"):
        read_seeds(text, 0)


def test_a_training_setting_that_its_library_refuses_is_one_message():
    """Whatever it raises: here it looks for a file."""
    recipe = load_recipe({**RECIPE, "training": {"use_cpu": True, "accelerator_config": "no-such.json"}})
    with pytest.raises(RecipeError, match=r"x: training of dpo: .*no-such\.json"):
        check(recipe, ["dpo"])


def test_bf16_without_a_device_names_the_setting(monkeypatch):
    """And says how a CPU is meant."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"x: training of dpo: bf16 .* only a CPU; .* set use_cpu: true"):
        check(load_recipe({**RECIPE, "training": {"bf16": True}}), ["dpo"])


@pytest.mark.parametrize("text", ["a: !!int x", "[" * 3000, "a: &a [*a]", "\x00"])
def test_a_damaged_recipe_of_a_run_is_named_by_its_report(tmp_path, text):
    """It is read as recipes are."""
    folder = report_data.write_training(tmp_path / "run")
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(ReportError, match=r"recipe\.yaml: not YAML"):
        write_report(folder, files=False)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", '"x"', '{"step": 2, "files": [], "run": {}}', '{"step": 2, "files": {}, "run": "x"}']
)
def test_a_damaged_manifest_is_a_checkpoint_passed_over(tmp_path, text):
    """And a damaged key a result that is made again."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "manifest.json").write_text(text)
    assert defect(folder)
    (folder / "key.json").write_text(text)
    assert not is_of(folder, "key")


def test_a_folder_that_is_almost_a_checkpoint_is_none(tmp_path):
    """Its name ends like one."""
    for name in ("checkpoint-best-3", "checkpoint-3", "my-checkpoint-4"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]


@pytest.mark.parametrize("line", ["import sys; sys.exit(0)", "import argparse; argparse.ArgumentParser().error('x')"])
def test_code_that_ends_the_program_is_named(tmp_path, line):
    """A script with a reward in it: the command would end with code 0, and nothing trained."""
    (tmp_path / "script.py").write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"importing .*script\.py raised SystemExit: [02]; fix it"):
        load_named(f"{tmp_path}/script.py:f", "function", callable, label="x", error=InputError)


def test_data_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Whatever the system says."""
    (tmp_path / "pairs.jsonl").touch()

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match=r"pairs\.jsonl: cannot be read \(Permission denied\)"):
        read_pairs(tmp_path / "pairs.jsonl")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    """With the variable."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("DISTALIGN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"file/cache: .*cannot be written \(Not a directory\); .* DISTALIGN_CACHE"):
        find_model("everyday")


def test_durations_and_errors_that_are_no_plain_numbers():
    """A JSON file may hold NaN, and the least float."""
    assert format_seconds(math.nan) == "n/a"
    assert format_seconds(math.inf) == "∞"
    assert format_estimate(1.0, 5e-324) == "1 ± 0"


def test_weights_that_give_no_numbers_are_not_called_an_adapter(monkeypatch):
    """The message is about the weights."""
    base, tokenizer = tiny.model(), tiny.tokenizer()
    policy = make_policy(base, tokenizer, Source("tiny", "tiny", "a test"), lora=Lora(r=2), reference=True)
    with torch.no_grad():
        base.model.norm.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="log-probabilities are not finite"):
        policy.assert_starts_at_reference([Group([2, 4, 7], [[8, 3], [9, 3]])])


def test_points_that_no_axis_holds_are_left_out(tmp_path):
    """Their sums and squares are not finite."""
    curve = report_data.curve(y=(1.0, 1e300, 1e-300), low=[-1e300, 1, 1], high=[1e308, 1e308, 1])
    report_data.write_lab(
        tmp_path, report_data.measured("figure1", panels=[report_data.panel(curve, y_scale="linear")])
    )
    assert "Not drawn: 1 point" in write_report(tmp_path).read_text(encoding="utf-8")
