"""The command line: what it writes, and what it says of bad input: where, what was found, what to do; exit code 2."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from refusal import refused
from report_data import write_training

from distalign.methods import METHODS

ROOT = Path(__file__).parents[2]


def edit(place, **columns):
    """The pairs with other columns in line 7 (None: without the column)."""
    lines = (place / "pairs.jsonl").read_text().splitlines()
    row = {**json.loads(lines[6]), **columns}
    lines[6] = json.dumps({key: value for key, value in row.items() if value is not None})
    (place / "pairs.jsonl").write_text("\n".join(lines) + "\n")


def turn(role, text):
    """A message list of one message."""
    return [{"role": role, "content": text}]


# What works -----------------------------------------------------------------------------------------------------------


def test_compare_prints_a_table_and_writes_its_numbers(distalign, place):
    """The row of every policy, the change of the forward KL, and the same numbers in --json and results.json."""
    code, out, err = distalign("compare", "tiny.yaml", "--methods", "pmle", "--json", "numbers.json")
    assert code == 0, err
    for word in (
        "KL(π*‖π)",
        "reference",
        "pmle",
        "pmle: forward KL to the target",
        "paired, 95\u00a0%, 6\u00a0prompts",
    ):
        assert word in out
    numbers = json.loads((place / "numbers.json").read_text())
    assert numbers == json.loads((place / "runs" / "tiny" / "results.json").read_text())
    code, out, _ = distalign("report", "runs/tiny", "--json", "again.json")
    assert code == 0
    assert "KL(π*‖π)" in out
    assert json.loads((place / "again.json").read_text())["methods"] == numbers["methods"]
    assert (place / "runs" / "tiny" / "report.html").is_file()


def test_compare_on_data_and_a_model_of_ones_own(distalign, place):
    """`--data FILE --model FOLDER` on a recipe with a target: the target's rows are gone."""
    code, out, err = distalign(
        *("compare", "tiny.yaml", "--data", "pairs.jsonl", "--model", place / "model", "--methods", "dpo"),
        *("--set", "data.held_out=0.3", "--json", "numbers.json"),
    )
    assert code == 0, err
    assert "KL(π*‖π)" not in out
    assert set(json.loads((place / "numbers.json").read_text())["methods"]) == {"reference", "dpo"}


def test_train_and_go_on(distalign, place):
    """One method of a recipe; its held-out numbers are printed and written."""
    words = ("train", "own.yaml", "--method", "dpo", "--set", "training.learning_rate=1e-3")
    code, out, err = distalign(*words, "--json", "numbers.json")
    assert code == 0, err
    assert "rewards/accuracies" in out
    found = json.loads((place / "numbers.json").read_text())
    assert found["method"] == "dpo"
    assert found["held_out"]["loss"] > 0
    folder = Path("runs/own/train/dpo")
    assert {"recipe.yaml", "metrics.jsonl", "model", "report.html"} <= {path.name for path in folder.iterdir()}
    before = (folder / "recipe.yaml").read_text()
    assert "learning_rate: 0.001" in before
    refused(distalign(*words), "of an earlier run", "--resume", "--overwrite")
    # The weights of another data set are not taken for those of this one, and the folder's recipe stays.
    other = (*words, "--resume", "--set", "data.held_out=0.4")
    refused(distalign(*other), "data.held_out 0.3, the recipe has 0.4", "start over with --overwrite")
    assert (folder / "recipe.yaml").read_text() == before
    assert distalign(*words, "--resume")[0] == 0


def test_methods_data_and_env_write_what_they_print(distalign, place):
    """Every command that prints a table takes --json."""
    code, out, _ = distalign("methods", "--json", "methods.json")
    assert code == 0
    rows = json.loads(Path("methods.json").read_text())["methods"]
    assert [row["method"] for row in rows] == list(METHODS)
    assert all(row["method"] in out and row["rate at β = 0"] in out for row in rows)
    code, out, _ = distalign("data", "check", "pairs.jsonl", "--model", place / "model", "--json", "data.json")
    assert code == 0
    assert "40 of 40 rows" in out
    assert json.loads(Path("data.json").read_text())["pairs"] == 40
    code, out, _ = distalign("env", "--device", "--json", "env.json")
    assert code == 0
    found = json.loads(Path("env.json").read_text())
    assert found["torch"] == torch.__version__ in out
    assert found["device"] in out


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"chosen": None}, ['no column "chosen"', "found"]),
        ({"chosen": turn("assistant", " ")}, ["chosen is empty", "fill it in or remove the line"]),
        ({"rejected": turn("assistant", "a"), "chosen": turn("assistant", "a")}, ["same text", "remove the line"]),
        ({"prompt": turn("user", "tea " * 80)}, ["the prompt has", "max_length is 64", "prompts are never cut"]),
        ({"chosen": turn("assistant", "tea " * 60)}, ["max_length is 64", "max_response_tokens"]),
        ({"p_chosen": 1.5}, ["p_chosen is 1.5", "between 0 and 1"]),
    ],
)
@pytest.mark.parametrize("command", [("train", "own.yaml", "--method", "pmle"), ("compare", "own.yaml")])
def test_a_bad_line_of_data_is_named(distalign, place, monkeypatch, command, columns, words):
    """File and line, before the model's weights are loaded."""
    monkeypatch.setattr("distalign.experiments.setup._load", lambda *_: pytest.fail("the weights were loaded"))
    edit(place, **columns)
    refused(distalign(*command), "pairs.jsonl:7: ", *words)


def test_a_line_that_is_not_json_is_named(distalign, place):
    """By training and by the check alike."""
    with (place / "pairs.jsonl").open("a") as file:
        file.write('{"prompt": \n')
    for command in (("train", "own.yaml", "--method", "pmle"), ("data", "check", "pairs.jsonl")):
        refused(distalign(*command), "pairs.jsonl:41: not JSON", "write one object per line")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "training.learning_rat=1"], ['no setting "learning_rat"', 'did you mean "learning_rate"?']),
        (["--set", "loar.r=4"], ['no setting "loar"', 'did you mean "lora"?']),
        (["--set", "learning_rate"], ["--set learning_rate: no setting and value; write section.key=value"]),
        (["--set", "seed=-1"], ["seed is -1"]),
        (["--set", "methods.pmle.gamma=-1"], ["gamma is -1"]),
        (["--set", "methods.ppo.gamma=1"], ['no method "ppo"', "it has pmle"]),
        (["--set", "training.optim=adm"], ["adm"]),
        (
            ["--set", "training.per_device_train_batch_size=0"],
            ["batch_size is 0; input should be greater than 0"],
        ),
        (["--methods", "pmle,ppo"], ['no method "ppo"', "it has pmle, dpo"]),
        (["--seeds", "many"], ["--seeds many: not a number"]),
        (["--seeds", "0"], ["--seeds 0: give at least one seed"]),
        (["--seeds", "1,-2"], ["none below 0"]),
        (["--seeds", "1,1"], ["none twice"]),
        (["--model", "no/such/model"], ["model no/such/model", "there is no such folder"]),
        (["--model", "nobody-here/nothing"], ["model nobody-here/nothing: cannot be loaded"]),
        (["--data", "nothing.jsonl"], ["nothing.jsonl: no such file"]),
        (["--set", "lora.layers=9"], ["lora.layers is 9 but the model has 2 layers"]),
        (["--set", "lora.target_modules=[wrong]"], ["lora.target_modules"]),
        (["--set", "target.words=[umbrella]"], ['"umbrella" is no single token']),
        (["--set", "target.prompts=nothing.txt"], ["nothing.txt"]),
        (["--set", "evaluation.temperature=0"], ["evaluation.temperature is 0"]),
        (["--json", "pairs.jsonl/numbers.json"], ["--json pairs.jsonl/numbers.json: cannot be written"]),
        (["--set", "output_dir=pairs.jsonl/runs"], ["cannot be written (Not a directory)", "--set output_dir="]),
    ],
)
def test_a_bad_setting_is_named(distalign, monkeypatch, words, told):
    """With what was found and what to do; nothing is trained before."""
    monkeypatch.setattr("distalign.experiments.train.AlignmentTrainer.train", lambda *_, **__: pytest.fail("it trains"))
    refused(distalign("compare", "tiny.yaml", *words), *told)


@pytest.mark.parametrize(
    ("package", "setting"),
    [("wandb", "report_to=wandb"), ("deepspeed", "deepspeed=z.json"), ("bitsandbytes", "optim=adamw_bnb_8bit")],
)
def test_a_package_that_a_setting_needs_is_named(distalign, package, setting):
    """At once, or at the latest when training starts."""
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    result = distalign("train", "own.yaml", "--method", "pmle", "--set", f"training.{setting}")
    refused(result, "training of pmle", package)


def test_a_number_that_is_not_measured_cannot_choose_the_step(distalign):
    """It says which are."""
    result = distalign("train", "own.yaml", "--method", "pmle", "--set", "training.metric_for_best_model=foo")
    refused(result, "metric_for_best_model is eval_foo; take one of eval_loss")


def test_a_tokenizer_without_an_end_is_refused(distalign, place):
    """A target's responses could never end."""
    tiny.save(place / "endless")
    own = tiny.tokenizer(chat=False)
    own.eos_token = None
    own.save_pretrained(place / "endless")
    (place / "endless" / "chat_template.jinja").unlink()
    refused(distalign("compare", "tiny.yaml", "--model", "endless"), "no end-of-sequence token")


def test_a_tokenizer_of_another_model_is_refused(distalign, place):
    """Its tokens are not the model's."""
    tiny.save(place / "small", vocab_size=12)
    for recipe in ("tiny.yaml", "own.yaml"):
        refused(distalign("compare", recipe, "--model", "small"), "its tokenizer gives token", "but the model has 12")


@pytest.mark.parametrize("name", ["pd", "rkl", "rebel", "rlhf"])
def test_a_method_without_its_reward_is_refused_first(distalign, monkeypatch, name):
    """Before anything of the model is read."""
    for module in ("train", "compare"):
        monkeypatch.setattr(
            f"distalign.experiments.{module}.load_setup", lambda *_, **__: pytest.fail("the model was read")
        )
    for command in (("compare", "tiny.yaml", "--methods", name), ("train", "tiny.yaml", "--method", name)):
        refused(distalign(*command, "--set", f"methods.{name}={{}}"), name, "needs a reward for the responses")


def test_train_wants_one_method(distalign):
    """It says which there are."""
    refused(distalign("train", "tiny.yaml"), "has the methods pmle, dpo; choose one with --method")
    refused(distalign("train", "tiny.yaml", "--method", "pml"), 'no method "pml"', 'did you mean "pmle"?')


def test_going_on_needs_a_checkpoint(distalign, monkeypatch):
    """Said before the model is read."""
    for module in ("train", "compare"):
        monkeypatch.setattr(
            f"distalign.experiments.{module}.load_setup", lambda *_, **__: pytest.fail("the model was read")
        )
    refused(distalign("train", "own.yaml", "--method", "pmle", "--resume"), "holds no checkpoint to continue from")


def test_a_recipe_that_is_not_there_is_refused(distalign, place):
    """With those that are: files, or packaged recipes by name, whatever folders are called."""
    refused(distalign("compare", "tny.yaml"), "tny.yaml: cannot be read (No such file or directory)")
    (place / "quikstart").mkdir()
    packaged = ('there is no recipe "quikstart"', "give a .yaml file or one of", 'did you mean "quickstart"?')
    for command in ("train", "compare", "reward", "evaluate", "frontier"):
        refused(distalign(command, "quikstart"), *packaged)
        assert "packaged" in distalign(command, "--help")[1]


@pytest.mark.parametrize("name", ["empty", "missing", "own.yaml"])
def test_a_folder_without_a_run_has_no_report(distalign, place, name):
    """Whether it is empty, not there, or a file."""
    (place / "empty").mkdir()
    refused(distalign("report", name), name)


def test_a_word_that_typer_does_not_know_is_refused(distalign):
    """Also with exit code 2."""
    assert distalign("compare", "tiny.yaml", "--sed", "3")[0] == 2
    assert distalign("tran")[0] == 2


# As a program ---------------------------------------------------------------------------------------------------------


def program(*words, cwd=None):
    """The installed program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "distalign", *words], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_the_program_ends_with_code_2_and_no_traceback(tmp_path):
    """As a shell sees it."""
    (tmp_path / "bad.jsonl").write_text("{}\n")
    done = program("data", "check", "bad.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith('error: bad.jsonl:1: no column "chosen"')
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_terminal_without_our_letters_shows_others(place):
    """± and γ where the output is ASCII."""
    command = [sys.executable, "-m", "distalign", "methods"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "120"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "?" in done.stdout


def test_a_system_that_refuses_a_file_is_one_message(distalign, place):
    """Wherever it is: the message has the file's name."""
    (place / "runs" / "tiny" / "train" / "pmle" / ".lock").mkdir(parents=True)
    refused(distalign("train", "tiny.yaml", "--method", "pmle"), "Is a directory", "pmle/.lock", "check this path")


def test_code_that_ends_the_program_is_an_error(distalign, place):
    """A method that calls sys.exit(0) while it trains: not a command that went well."""
    (place / "mine.py").write_text(
        "from distalign.methods import PMLE\nclass Mine(PMLE):\n    def loss(self, *_, **__): raise SystemExit(0)\n"
    )
    words = ("train", "tiny.yaml", "--method", "mine.py:Mine", "--set", "methods.mine={gamma: 0.5, beta: 0}")
    refused(distalign(*words), "a sys.exit(0) in code that the command called")


def test_a_pipe_may_be_closed_early():
    """`distalign methods | head -1` prints no traceback."""
    command = f"{sys.executable} -m distalign methods | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_help_answers_in_half_a_second():
    """Processor time of the quickest of three."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run(
            [sys.executable, "-m", "distalign", "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "COLUMNS": "120"},
        )
        spent.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert "compare" in done.stdout
    assert min(spent) < 0.5


def test_threads_wait_without_spinning_long(distalign, monkeypatch):
    """Said before torch is loaded, which a recipe needs to be read: here nothing is."""
    for name, value in {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}.items():
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
        assert distalign("--version")[0] == 0
        assert os.environ[name] == value


def test_check_refuses_what_training_refuses(distalign, place, tiny_folder):
    """Ties and pairs beyond the context, each with a way out."""
    tie = {"prompt": "tell", "chosen": "tea", "rejected": "tea"}
    good = {"prompt": "tell", "chosen": "tea", "rejected": "milk"}
    Path("ties.jsonl").write_text("\n".join(json.dumps(row) for row in (good, tie)))
    refused(distalign("data", "check", "ties.jsonl"), "ties.jsonl:2", "same text")
    assert distalign("data", "check", "ties.jsonl", "--drop-ties")[0] == 0
    Path("long.jsonl").write_text(json.dumps({**good, "prompt": "tell me about tea " * 40}))
    refused(distalign("data", "check", "long.jsonl", "--model", str(tiny_folder)), "1 pairs are longer than 64 tokens")
    refused(distalign("data", "check", "long.jsonl", "--max-length", "5"), "--max-length", "needs --model")


def test_what_is_written_replaces_nothing_that_is_read(distalign, place):
    """Numbers go over a file of earlier ones, not over the pairs, nor over the table."""
    pairs = Path("pairs.jsonl").read_bytes()
    for path in ("pairs.jsonl", "./pairs.jsonl", str(Path("pairs.jsonl").resolve())):
        refused(distalign("data", "check", "pairs.jsonl", "--json", path), f"--json {Path(path)}", "name another")
    assert Path("pairs.jsonl").read_bytes() == pairs
    for _ in range(2):
        assert distalign("data", "check", "pairs.jsonl", "--json", "numbers.json")[0] == 0
    refused(distalign("report", "runs", "--json=numbers.json", "--markdown=numbers.json"), "--json", "name another")


def test_several_runs_have_one_page(distalign, place):
    """distalign report RUN RUN --out FOLDER; without --out, and with a file of one run's numbers, it is refused."""
    for name in ("one", "two"):
        write_training(place / name)
    code, out, _ = distalign("report", "one", "two", "--out", "both", "--no-files")
    assert code == 0
    assert str(Path("both/report.html")) in out
    page = Path("both/report.html").read_text(encoding="utf-8")
    assert "one" in page
    assert "two" in page
    refused(distalign("report", "one", "two"), "say with --out")
    refused(distalign("report", "one", "two", "--out", "both", "--json", "x.json"), "--json and --markdown are of one")
