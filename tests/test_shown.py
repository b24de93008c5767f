"""Everything shown is run: the commands and Python blocks of README and docs, and every recipe, on a tiny model."""

from __future__ import annotations

import difflib
import doctest
import importlib.util
import inspect
import json
import math
import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from judge_server import Server
from sampled import sampled

import distalign
from distalign import DPO, METHODS, AlignmentConfig, AlignmentTrainer, RewardTraining, cli
from distalign.experiments.recipe import Recipe, load_recipe
from distalign.experiments.train import check
from distalign.lab import EXPERIMENTS
from distalign.models.targets import Target, make_pairs
from distalign.settings import RECIPES

ROOT = Path(__file__).parents[1]
NAMES = sorted(RECIPES.glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = list(
    dict.fromkeys(
        line.split("#")[0].strip()
        for page in PAGES
        for block in BLOCK.findall(page.read_text(encoding="utf-8"))
        for line in block.splitlines()
        if line.startswith("distalign ")
    )
)
# What makes any run small: two steps of four pairs, responses of four tokens.
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "eval_steps": 2}
SMALL = {
    "lora": "{r: 4, alpha: 8, layers: 1}",
    "evaluation.prompts": 4,
    "evaluation.samples": 1,
    "evaluation.max_new_tokens": 4,
    "rollout.max_completion_length": 4,
    "rollout.min_new_tokens": 0,
    "health.prompts": 2,
}
SMALL_TARGET = {
    "target.words": "[happy, kind]",
    "target.end_bonus": 0,
    "target.pairs": 8,
    "target.eval_pairs": 8,
    "target.max_new_tokens": 4,
}
# The hub is not asked, and the tiny model has 64 positions.
SMALL_DATA = {
    "data.max_length": "null",
    "data.eval": "null",
    "data.prompts": "null",
    "data.held_out": 0.2,
    "data.eval_limit": 4,
}


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_folder):
    """A folder with the data and the model that the commands name."""
    tiny.write_pairs(tmp_path / "pairs.jsonl")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    method = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    (tmp_path / "my_method.py").write_text(re.findall(r"^```python\n(.*?)^```", method, re.MULTILINE | re.DOTALL)[0])
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, arguments: list[str]) -> None:
    """Run a command as the shell would, in this process."""
    monkeypatch.setattr(sys, "argv", ["distalign", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code


def own(recipe: Recipe, section: str, values: dict[str, object]) -> dict[str, object]:
    """The same values where a method has its own: those come before the recipe's."""
    return {
        f"methods.{name}.{section}.{key}": values[key]
        for name, settings in recipe.methods.items()
        for key in settings.get(section, ())
        if key in values
    }


def small(path: str, tiny_folder: Path) -> list[str]:
    """Flags that make a recipe's run small, on the tiny model, with rewards that need no network."""
    recipe = load_recipe(path)
    settings = SMALL | {f"training.{key}": value for key, value in TRAINING.items()}
    settings |= own(recipe, "training", TRAINING) | own(
        recipe, "rollout", {"max_completion_length": 4, "min_new_tokens": 0}
    )
    settings |= SMALL_DATA if recipe.target is None else SMALL_TARGET
    if any(one.model or (one.train and one.train.backbone != "frozen") for one in recipe.reward):
        settings["reward"] = "{train: {init: scratch, backbone: frozen}}"
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["--model", str(tiny_folder), *flags]


def test_there_are_commands_to_run():
    """The pages show commands; a change of their form must not empty the test below."""
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shown_command_runs(command, here, monkeypatch, tiny_folder):
    """Each command of the pages ends without an error (training ones with a tiny model, two steps)."""
    arguments = shlex.split(command)[1:]
    if "quantization=4bit" in arguments and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed; `make install` installs it")
    if arguments[0] in ("train", "compare", "reward"):
        given = dict(pairwise(arguments))
        recipe = "pairs" if arguments[1].startswith("--") else arguments[1]
        for option in ("--model", "--data", "--seeds"):
            if option in given:
                at = arguments.index(option)
                del arguments[at : at + 2]
        if load_recipe(recipe).target is None or "--data" in given:
            arguments += ["--data", "pairs.jsonl"]
        arguments += small(recipe, tiny_folder)
    elif arguments[0] == "report":
        arguments[1] = make_report(monkeypatch, tiny_folder)
    elif arguments[0] == "merge":
        run(monkeypatch, ["train", "pairs", "--method", "pmle", "--data", "pairs.jsonl", *small("pairs", tiny_folder)])
    elif arguments[0] in ("evaluate", "frontier"):
        # Places of policies that earlier commands would have made.
        arguments = [f"{word.split('=')[0]}={tiny_folder}" if "=runs/" in word else word for word in arguments]
        fewer = ("limit=3", "max_new_tokens=4", "rows=8")
        arguments += ["--model", str(tiny_folder), *(part for one in fewer for part in ("--set", one))]
        arguments = without(arguments, "--samples", "--kl-budget")
    elif arguments[0] == "calibrate":
        arguments[1] = str(tiny_folder)
    elif arguments[0] == "lab":
        quick = {name: EXPERIMENTS[name] for name in ("gamma", "estimators")}
        monkeypatch.setattr("distalign.lab.EXPERIMENTS", quick if "all" in arguments else EXPERIMENTS)
        given = {"--seeds": "2", "--max-n": "512"}
        arguments = without(arguments, *given) + [part for pair in given.items() for part in pair]
    run(monkeypatch, arguments)


def without(arguments: list[str], *options: str) -> list[str]:
    """The arguments without some options and their values."""
    dropped = {at + i for at, word in enumerate(arguments) if word in options for i in (0, 1)}
    return [word for at, word in enumerate(arguments) if at not in dropped]


def make_report(monkeypatch, tiny_folder: Path) -> str:
    """A run folder that a report can be drawn from."""
    flags = ["--methods", "pmle", "--data", "pairs.jsonl", *small("pairs", tiny_folder)]
    run(monkeypatch, ["compare", "pairs", *flags])
    return "runs/pairs"


@pytest.mark.parametrize("path", sampled([path.stem for path in NAMES], "quickstart", "tldr"))
def test_a_recipe_runs(path, here, monkeypatch, tiny_folder):
    """Each recipe compares all its methods and writes results and report."""
    settings = load_recipe(path)
    data = ["--data", "pairs.jsonl"] if settings.target is None else []
    run(monkeypatch, ["compare", path, "--full", *data, *small(path, tiny_folder)])
    results = json.loads((here / "runs" / path / "results.json").read_text(encoding="utf-8"))
    assert set(settings.methods) < set(results["methods"])
    for name in settings.methods:
        log = here / "runs" / path / name / "metrics.jsonl"
        losses = [row["loss"] for row in map(json.loads, log.read_text().splitlines()) if "loss" in row]
        assert len(losses) == 2
        assert all(map(math.isfinite, losses))
    assert (here / "runs" / path / "report.html").is_file()


@pytest.mark.parametrize("recipe", NAMES, ids=lambda path: path.stem)
def test_a_recipe_is_accepted_as_it_stands(recipe, here):
    """Each recipe passes every check that needs no model, and reads back equal as resolved."""
    settings = load_recipe(recipe)
    check(settings, list(settings.methods))
    settings.dump(here / "again.yaml")
    assert load_recipe(here / "again.yaml") == settings


# Python blocks --------------------------------------------------------------------------------------------------------

# What the blocks name, and what stands in its place here.
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
JUDGE_URL = "http://127.0.0.1:8123/v1"


def python_blocks(page: Path) -> list[str]:
    """The Python blocks of a page, in order."""
    return PYTHON_BLOCK.findall(page.read_text(encoding="utf-8"))


def make_small(monkeypatch, folder: Path) -> None:
    """Every `AlignmentConfig` has two steps and short responses, and `datasets` keeps its cache in the folder."""
    original = AlignmentConfig.__post_init__

    def shrink(self) -> None:
        self.max_steps = 2
        self.use_cpu = True
        self.max_completion_length = min(self.max_completion_length, 4)
        for name in ("eval_steps", "save_steps"):
            if getattr(self, name) is not None:
                setattr(self, name, 1)
        original(self)

    monkeypatch.setattr(AlignmentConfig, "__post_init__", shrink)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")


def run_blocks(page: Path, replace: dict[str, str]) -> dict:
    """Run the blocks of a page in order, in one namespace; those with prompts (>>>) must give what they show."""
    names: dict = {"__name__": page.stem}
    for number, block in enumerate(python_blocks(page), 1):
        for shown, here in replace.items():
            block = block.replace(shown, here)
        place = f"{page.name}, block {number}"
        if block.startswith(">>> "):
            examples = doctest.DocTestParser().get_doctest(block, names, place, str(page), 0)
            result = doctest.DocTestRunner(verbose=False).run(examples, clear_globs=False)
            assert result.attempted > 0
            assert result.failed == 0
            names |= examples.globs
        else:
            # The blocks do not have this file's `from __future__`.
            exec(compile(block, place, "exec", dont_inherit=True), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.stem)
def test_the_python_blocks_of_a_page_run(page, here, monkeypatch, tiny_folder):
    """As they stand, but for the model's name, the judge's address and the length of training."""
    make_small(monkeypatch, here)
    with Server(answer=lambda question: "A") as server:
        run_blocks(page, {HUB_MODEL: str(tiny_folder), JUDGE_URL: server.url})


def test_no_python_block_is_passed_over():
    """Every fence of Python is one that the test above finds, and the pages that must have blocks have them."""
    for page in PAGES:
        fences = re.findall(
            r"^\s*```\s*(?:py|python|pycon)\b.*$", page.read_text(encoding="utf-8"), re.MULTILINE | re.I
        )
        assert len(fences) == len(python_blocks(page)), page.name
    assert {"python", "choosing", "faq"} <= {page.stem for page in PAGES if python_blocks(page)}


def test_the_index_has_every_page():
    """One line for each page, and no line for a page that there is not."""
    listed = re.findall(r"^\d+\. \[[^]]+\]\(([^)]+)\)", (ROOT / "docs/index.md").read_text(), re.MULTILINE)
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert sorted(listed) == sorted(pages | {"../README.md"})


# From TRL -------------------------------------------------------------------------------------------------------------

TRL_SCRIPT = """\
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

model_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(model_id)
tokenizer = AutoTokenizer.from_pretrained(model_id)
dataset = load_dataset("json", data_files="pairs.jsonl", split="train").train_test_split(test_size=0.1)

config = DPOConfig(
    output_dir="dpo",
    beta=0.1,
    learning_rate=5e-6,
    lr_scheduler_type="cosine",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_train_epochs=1,
    max_length=1024,
    logging_steps=10,
    eval_strategy="epoch",
    save_strategy="epoch",
    report_to="none",
)
trainer = DPOTrainer(
    model=model,
    args=config,
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model("dpo-final")
"""


def trl_table() -> list[tuple[str, str]]:
    """The first two cells of each row of the tables from TRL in docs/python.md."""
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", page[page.index("## From TRL") :], re.MULTILINE)
    assert len(rows) > 30
    return rows


def switch(script: str) -> str:
    """A TRL script with the names of the table: classes and β; nothing else is touched."""
    ours = dict(trl_table())
    for theirs in ("`DPOTrainer`", "`DPOConfig`"):
        script = script.replace(theirs.strip("`"), ours[theirs].strip("`"))
    assert ours["`beta`"].startswith(("`DPO(gamma=", "`RLHF(beta="))
    script = script.replace(
        "from trl import AlignmentConfig, AlignmentTrainer",
        "from distalign import DPO, AlignmentConfig, AlignmentTrainer",
    )
    (beta,) = re.findall(r"^ *beta=(.*),\n", script, re.MULTILINE)
    script = re.sub(r"^ *beta=.*\n", "", script, flags=re.MULTILINE)
    return script.replace("AlignmentTrainer(\n", f"AlignmentTrainer(\n    method=DPO(gamma={beta}),\n")


def test_a_trl_script_is_switched_by_five_lines(here, monkeypatch, tiny_folder):
    """The table is enough; what comes out trains and saves."""
    switched = switch(TRL_SCRIPT)
    before, after = TRL_SCRIPT.splitlines(), switched.splitlines()
    changes = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    assert sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in changes if tag != "equal") <= 5
    make_small(monkeypatch, here)
    names: dict = {"__name__": "__main__"}
    exec(compile(switched.replace(HUB_MODEL, str(tiny_folder)), "switched", "exec", dont_inherit=True), names)
    assert names["trainer"].method == DPO(gamma=0.1)
    assert (here / "dpo-final" / "adapter_model.safetensors").is_file()
    assert "eval_rewards/accuracies" in names["trainer"].last_evaluation()


def test_the_table_from_trl_has_the_names_that_there_are():
    """Every name of TRL's is one of TRL's, every name of ours one of ours."""
    trl = pytest.importorskip("trl")
    classes = [f"{name}{kind}" for name in ("DPO", "RLOO", "GRPO", "Reward") for kind in ("Trainer", "Config")]
    theirs = {*classes}.union(*(inspect.signature(getattr(trl, name)).parameters for name in classes))
    ours = {*dir(distalign)}.union(
        *(inspect.signature(one).parameters for one in (AlignmentConfig, AlignmentTrainer, *METHODS.values())),
        RewardTraining.model_fields,
    )
    for first, second in trl_table():
        for name in re.findall(r"`(\w+)", first):
            assert name in theirs, name
        for code in re.findall(r"`([^`]*)`", second):
            for name in re.findall(r"^(\w+)|(\w+)=", code):
                assert "".join(name) in ours, code


def test_the_target_of_the_docs_can_label_pairs(here, monkeypatch, tiny_folder):
    """The page's own target class is a target: strength 0 is the base, 1 the tuned model, and it labels pairs."""
    make_small(monkeypatch, here)
    names = run_blocks(ROOT / "docs/targets.md", {HUB_MODEL: str(tiny_folder)})
    base, tuned = tiny.model(), tiny.model(num_hidden_layers=2)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.1)
    tuned.save_pretrained(here / "tuned")
    target = names["FineTuned"](str(here / "tuned"))
    assert isinstance(target, Target)
    ids = torch.tensor([[2, 4, 9]])
    assert torch.equal(target.model(base, None, 0.0)(ids).logits, base(ids).logits)
    torch.testing.assert_close(target.model(base, None)(ids).logits, tuned(ids).logits)
    settings = {"gamma": 0.5, "strengths": [0.0, 1.0], "temperature": 1.0, "max_new_tokens": 4, "token_budget": 256}
    found = make_pairs(target, base, tiny.tokenizer(), [[2, 4, 9, 3], [2, 4, 7, 8, 3]], n=6, seed=0, **settings)
    assert len(found.pairs) == len(found.logit) == 6
