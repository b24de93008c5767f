import json
import subprocess
import sys
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import HfArgumentParser

from distalign.experiments.recipe import EarlyStopping, Recipe, load_recipe
from distalign.methods import METHODS
from distalign.models.policy import Lora
from distalign.settings import RecipeError, dump_yaml, parse_value
from distalign.training.config import AlignmentConfig

TARGET = "model: tiny\ntarget: {words: [lovely]}\n"


@pytest.fixture
def write(tmp_path):
    """Writes a recipe and returns its path."""

    def write(text, name="x.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def refusal(path, *args, **kwargs):
    """The message that loading ends with, without the folder's name."""
    with pytest.raises(RecipeError) as refused:
        load_recipe(path, *args, **kwargs)
    return str(refused.value).replace(f"{path.parent}/", "")


def test_defaults_are_those_documented(write):
    """A model, a target and a method are enough; everything else has a default."""
    recipe = load_recipe(write(f"{TARGET}methods: {{pmle: }}"))
    assert (recipe.name, recipe.output_dir, recipe.seed, recipe.dtype) == ("x", "runs", 0, "float32")
    assert recipe.lora is None
    assert recipe.early_stopping == EarlyStopping(patience=3, min_delta=0.0)
    assert recipe.token_budget is None
    assert recipe.forward_budget == 4096
    assert str(recipe.run_dir) == "runs/x"
    assert recipe.method("pmle") == METHODS["pmle"]()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_reads_its_own_fields(write, name):
    """Every field of the method's dataclass is a setting, and gives that instance."""
    settings = {field.name: 0.25 for field in fields(METHODS[name]) if field.init and field.type == "float"}
    recipe = load_recipe(write(f"{TARGET}methods: {json.dumps({name: settings})}"))
    assert recipe.method(name) == METHODS[name](**settings)


def test_a_methods_training_changes_the_common_one(write):
    """`training` of a method wins over the recipe's, setting by setting."""
    text = (
        TARGET
        + "methods: {pmle: {training: {learning_rate: 1e-4}}, dpo: }\ntraining: {learning_rate: 1e-5, max_steps: 7}"
    )
    recipe = load_recipe(write(text))
    assert recipe.training_for("pmle") == {"learning_rate": 1e-4, "max_steps": 7}
    assert recipe.training_for("dpo") == {"learning_rate": 1e-5, "max_steps": 7}


@pytest.mark.parametrize("written", ["1e-5", '"1e-5"', "1.0e-5", "0.00001", "'0.00001'"])
def test_a_number_is_a_number_however_it_is_written(write, written):
    """YAML 1.1 reads 1e-5 as text; here it is a float, quoted or not."""
    text = f"{TARGET}methods: {{pmle: {{gamma: {written}}}}}\ntraining: {{learning_rate: {written}}}"
    recipe = load_recipe(write(text))
    assert recipe.training["learning_rate"] == 1e-5
    assert recipe.method("pmle").gamma == 1e-5


def test_words_stay_words(write):
    """YAML 1.1 reads yes, no, on and dates as something else."""
    text = "model: tiny\ntarget: {words: [yes, no, on, off, 2024-01-01, '12', 010]}\nmethods: {dpo: }"
    assert load_recipe(write(text)).target.words == ["yes", "no", "on", "off", "2024-01-01", "12", "010"]


@given(
    st.recursive(
        st.text() | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none(), st.lists, max_leaves=5
    )
)
def test_yaml_round_trip(value):
    """What is dumped is read back as it was, whatever the text looks like."""
    assert parse_value(dump_yaml(value), "x") == value


@pytest.mark.parametrize(
    "text",
    [
        "\x85",
        " \u2028x",
        "a\r",
        "\ufeff",
        "1e5",
        "true",
        "yes",
        "null",
        "~",
        "1.0",
        ".inf",
        "-3",
        "",
        "0o7",
        "1_000",
        "12:30",
        "=",
    ],
)
def test_text_that_looks_like_something_else_round_trips(text):
    """Text stays text in a list too."""
    assert parse_value(dump_yaml([text]), "x") == [text]


def test_dump_round_trip(write, tmp_path):
    """A dumped recipe holds every default and loads as the same recipe."""
    text = (
        "name: quick\nmodel: tiny\nlora: {r: 4, layers: 12}\ndata: {train: a.jsonl, too_long: drop}\n"
        "early_stopping: false\n"
        "methods: {pmle: {training: {learning_rate: 1e-4}}, rebel: }\ntraining: {max_steps: 3, report_to: [none]}"
    )
    recipe = load_recipe(write(text))
    recipe.dump(tmp_path / "runs" / "quick" / "recipe.yaml")
    again = load_recipe(tmp_path / "runs" / "quick" / "recipe.yaml")
    assert again == recipe
    assert again.early_stopping is None


def test_a_recipe_is_read_beside_a_command_line_parser(write):
    """transformers' parser changes the types of the fields of TrainingArguments."""
    HfArgumentParser(AlignmentConfig)
    recipe = load_recipe(
        write("name: quick\nmodel: tiny\ndata: {train: a}\nmethods: {pmle: }\ntraining: {report_to: [none]}")
    )
    assert recipe.training == {"report_to": ["none"]}


def test_sections_switch_on_and_off(write):
    """true is a section's defaults, false and null none of it."""
    on = load_recipe(write(TARGET + "methods: {dpo: }\nlora: true\nearly_stopping: true"))
    off = load_recipe(write(TARGET + "methods: {dpo: }\nlora: false\nearly_stopping: null"))
    assert (on.lora, on.early_stopping) == (Lora(), EarlyStopping())
    assert (off.lora, off.early_stopping) == (None, None)


def test_overrides(write):
    """--set reaches every section, also one that the file leaves out, and its values are YAML."""
    path = write(f"{TARGET}methods: {{pmle: , dpo: }}")
    flags = ["training.learning_rate=1e-5", "lora.r=4", "methods.pmle.gamma=0.2", "target.words=[a, b]", "seed = 3"]
    recipe = load_recipe(path, flags)
    assert recipe.training == {"learning_rate": 1e-5}
    assert (recipe.lora.r, recipe.method("pmle").gamma, recipe.target.words, recipe.seed) == (4, 0.2, ["a", "b"], 3)
    assert list(load_recipe(path, method="dpo").methods) == ["dpo"]


def test_data_is_found_beside_the_recipe(write, tmp_path, monkeypatch):
    """A relative path counts from the working directory, or else from the recipe's folder; a hub id stays."""
    (tmp_path / "pairs.jsonl").write_text("{}")
    path = write("model: tiny\ndata: {train: pairs.jsonl, eval: owner/name}\nmethods: {dpo: }")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_recipe(path).data.train == str(tmp_path / "pairs.jsonl")
    assert load_recipe(path).data.eval == "owner/name"
    (elsewhere / "pairs.jsonl").write_text("{}")
    assert load_recipe(path).data.train == "pairs.jsonl"


ALL = ", ".join(METHODS)
REFUSALS = {
    "methods: {pmle: {gama: 1}}": 'x.yaml: pmle has no setting "gama"; did you mean "gamma"?',
    "methods: {dpo: {beta: 0.1}}": 'x.yaml: dpo has no setting "beta"; DPO\'s beta is the preference sharpness, '
    "which is called gamma here: write gamma",
    "methods: {dppo: }": f'x.yaml: distalign has no method "dppo"; it has {ALL}; did you mean "dpo"?',
    "methods: {pmle: {gamma: abc}}": "x.yaml: pmle.gamma is 'abc'; input should be a valid number, "
    "unable to parse string as a number",
    "methods: {pmle: 3}": "x.yaml: methods.pmle is 3; write its settings below it, setting: value",
    "methods: {}": f"x.yaml: methods is {{}}; name at least one of {ALL}, each with its settings",
    "methods: {dpo: {training: {lerning_rate: 1}}}": 'x.yaml: dpo.training has no setting "lerning_rate"; '
    'did you mean "learning_rate"?',
    "methods: {dpo: }\ntraining: {max_step: 1}": 'x.yaml: training has no setting "max_step"; '
    'did you mean "max_steps"?',
    "methods: {dpo: }\ntraining: {max_steps: 1.5}": "x.yaml: training.max_steps is 1.5; "
    "input should be a valid integer, "
    "got a number with a fractional part",
    "methods: {dpo: }\ntraining: {output_dir: a}": 'x.yaml: training has no setting "output_dir"; '
    "the run's folder is output_dir and name at the top of the recipe",
    "methods: {dpo: }\ntraining: {resume_from_checkpoint: a}": "x.yaml: training has no setting "
    '"resume_from_checkpoint"; a run goes on with --resume',
    "methods: {dpo: }\nreward: {train: {init: scratch, gamma: 0.1}}": "x.yaml: reward.train: init is scratch, which "
    "reads no gamma; leave out gamma: 0.1",
    "methods: {dpo: }\ntraining: fast": "x.yaml: training is 'fast'; "
    "write setting: value with transformers.TrainingArguments' settings",
    "methods: {dpo: }\nevaluation: {sample: 2}": 'x.yaml: evaluation has no setting "sample"; did you mean "samples"?',
    "methods: {dpo: }\nlora: {r: 0}": "x.yaml: lora.r is 0; input should be greater than 0",
    "methods: {dpo: }\nqqq: 1": 'x.yaml: recipe has no setting "qqq"; it has name, output_dir, seed, model, dtype, '
    "trust_remote_code, quantization, lora, data, target, methods, compare, rollout, reward, health, training, "
    "token_budget, recompute, early_stopping, evaluation, study",
    "methods: {rkl: {rollout: {num_generations: 0}}}": "x.yaml: methods.rkl.rollout.num_generations is 0; input "
    "should be greater than 0",
    "methods: {dpo: }\ncompare: [pmle]": 'x.yaml: compare: recipe has no method "pmle"; it has dpo',
    "methods: {dpo: }\nreward: {weight: 2}": "x.yaml: reward names 0 of model, train, function, exact, columns; give "
    "one each",
    "methods: {dpo: }\nreward: a.py:b": "x.yaml: reward is the text 'a.py:b'; write {function: FILE.py:NAME} or "
    "{model: ID}",
    "methods: {dpo: }\nreward: {modle: a}": 'x.yaml: reward.0 has no setting "modle"; did you mean "model"?',
    "methods: {dpo: }\ndata: {train: a}": "x.yaml: recipe has both data and target; "
    "give one of them: your pairs, or a known target that makes pairs",
    "methods: {dpo: }\nname: a/b": "x.yaml: name is 'a/b'; string should match pattern '^\\w[\\w.-]*$'",
    "": 'x.yaml: recipe has no "methods"; add it',
    "methods: {dpo: }\nmethods: {pmle: }": 'x.yaml:4: not YAML ("methods" stands twice, keep one of them); '
    "check the indentation and quotes",
    "methods: {dpo: ": "x.yaml:4: not YAML (expected the node content, but found '<stream end>'); "
    "check the indentation and quotes",
}


@pytest.mark.parametrize(("text", "message"), REFUSALS.items())
def test_refusals_say_where_what_and_what_to_do(write, text, message):
    """Every refusal names the file, what it found and what to do."""
    assert refusal(write(f"{TARGET}{text}\n")) == message


def test_a_methods_own_check_is_reported(write):
    """What the method's dataclass refuses is told with the file and the key."""
    message = refusal(write(f"{TARGET}methods: {{pd: {{gamma: -1}}}}"))
    assert message.startswith("x.yaml: methods.pd: gamma is -1")


def test_whole_numbers_are_numbers(write):
    """gamma: 1 is 1.0 to the method; what TrainingArguments gets is as written."""
    recipe = load_recipe(write(f"{TARGET}methods: {{pmle: {{gamma: 1}}}}\ntraining: {{eval_steps: 10}}"))
    assert type(recipe.method("pmle").gamma) is float
    assert type(recipe.training["eval_steps"]) is int


def test_all_problems_are_told_at_once(write):
    """One line a problem, each with the file."""
    text = "modle: a\ndata: {held_out: 1.5}\nmethods: {pmle: {gama: 1}, dppo: }"
    lines = refusal(write(text)).splitlines()
    assert lines == [
        'x.yaml: recipe has no "model"; add it',
        'x.yaml: data has no "train"; add it',
        "x.yaml: data.held_out is 1.5; input should be less than 1",
        'x.yaml: pmle has no setting "gama"; did you mean "gamma"?',
        f'x.yaml: distalign has no method "dppo"; it has {ALL}; did you mean "dpo"?',
        'x.yaml: recipe has no setting "modle"; did you mean "model"?',
    ]


def test_neither_data_nor_target(write):
    """Pairs must come from somewhere."""
    message = refusal(write("model: tiny\nmethods: {dpo: }"))
    assert message.startswith("x.yaml: recipe has neither data nor target; give one of them")


def test_refused_flags(write):
    """A flag gets the same errors as the file, and the message shows the flag."""
    path = write(f"{TARGET}methods: {{dpo: }}")
    message = (
        'x.yaml --set training.lerning_rate=1: training has no setting "lerning_rate"; did you mean "learning_rate"?'
    )
    assert refusal(path, ["training.lerning_rate=1"]) == message
    assert refusal(path, ["seed"]) == "--set seed: no setting and value; write section.key=value"
    assert refusal(path, ["model.name=a"]) == "--set model.name=a: model is no section; set it as a whole"
    assert refusal(path, ["seed=[1"]).startswith("--set seed=[1: the value is not YAML")
    assert refusal(path, method="pd") == 'x.yaml: recipe has no method "pd"; it has dpo; add it under methods'
    with pytest.raises(RecipeError, match=r'x: recipe has no method "pd"; it has dpo'):
        load_recipe(path).method("pd")


def test_unreadable_files(write, tmp_path):
    """A missing file, a file without settings, a file in another encoding."""
    told = "tdlr.yaml: cannot be read (No such file or directory); give a recipe's file, in UTF-8"
    assert refusal(tmp_path / "tdlr.yaml") == told
    assert refusal(write("- a", "list.yaml")) == "list.yaml: list, not settings; write setting: value lines"
    (tmp_path / "latin.yaml").write_bytes("model: café".encode("latin-1"))
    assert "latin.yaml: cannot be read ('utf-8' codec can't decode byte 0xe9" in refusal(tmp_path / "latin.yaml")


def test_a_recipe_cannot_be_changed(write):
    """The recipe that was checked is the recipe that runs."""
    recipe = load_recipe(write(f"{TARGET}methods: {{dpo: }}"))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
    assert isinstance(recipe, Recipe)


def test_importing_loads_no_model_library():
    """Checking data stays quick."""
    code = "import sys, distalign.settings, distalign.data\n"
    code += "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_method_may_change_the_rollouts(tmp_path):
    """methods.X.rollout changes single settings of rollout, for that method alone, and survives the way to YAML."""
    path = tmp_path / "x.yaml"
    path.write_text(
        "model: m\ndata: {train: a}\nrollout: {num_generations: 4, num_iterations: 4}\n"
        "methods: {pmle: {rollout: {num_iterations: 1}}, rkl: }\n"
    )
    recipe = load_recipe(path)
    assert recipe.rollout_for("pmle").num_iterations == 1
    assert (
        recipe.rollout_for("pmle").num_generations
        == recipe.rollout_for("rkl").num_generations
        == recipe.rollout_for("rkl").num_iterations
    )
    assert recipe.method("pmle").needs.samples
    recipe.dump(tmp_path / "y.yaml")
    assert load_recipe(tmp_path / "y.yaml") == recipe.model_copy(update={"name": "x"})
    assert list(recipe.only(["rkl"]).methods) == ["rkl"]


def test_a_folder_is_no_recipe(tmp_path, monkeypatch):
    """Not even one that is named like a packaged recipe: a path is a path."""
    (tmp_path / "pairs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("./pairs", "pairs/", str(tmp_path / "pairs")):
        with pytest.raises(RecipeError, match="is no file; give a recipe's file"):
            load_recipe(name)
    assert load_recipe("pairs").name == "pairs"
