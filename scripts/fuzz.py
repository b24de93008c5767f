"""Damaged inputs, tried one by one: each must end in a success or in a message. Prints counts, and what did neither.

    python scripts/fuzz.py [--kinds data,recipes,flags,folders] [--cases 1000] [--seed 0] [--command 100] [--only N]
                           [--seconds S]

Valid small inputs are changed: values of other types, huge numbers, deep nesting, YAML's tags and aliases, bytes
that are flipped, cut or repeated. Everything runs in this process, under 10 s and a bound on memory, one case in
`--command` through the command in a process of its own. No weights are loaded: the file of
the model's is none, which ends a run. `--only N` runs case N of one kind alone and shows its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import faulthandler
import gzip
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "100"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import pyarrow
import report_data
import tiny
import typer
import yaml
from pyarrow import parquet

from distalign import cli
from distalign.data import encode_pairs, has_pairs, inspect_pairs, read_pairs, read_prompts
from distalign.errors import InputError
from distalign.evaluation.setup import load_evaluation
from distalign.experiments.recipe import load_recipe
from distalign.experiments.results import load_resume_record
from distalign.experiments.train import check
from distalign.models.load import find_model
from distalign.models.policy import trained_temperature
from distalign.report import page, write_report
from distalign.report.results import TRAINING, read_run
from distalign.training.checkpoint import newest_complete
from distalign.training.run_folder import cut_log, remove

# Seconds of processor time, and of a clock: other processes may have the processors.
LIMIT, PATIENCE, MEMORY = 10, 60, 4 << 30
Case = tuple[list[str], Callable[[], object]]  # the same as a command, and as a call


class Hang(BaseException):
    """A case that took longer than `LIMIT`."""


def deep(levels: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


# fmt: off
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 0.5, 1e-300, 1e300, 2**31, 2**63, 10**400, -(10**30), math.nan, math.inf, -math.inf,
    "", " ", "x", "0", "1e400", "nan", "auto", "no", "null", "a" * 5000, "\0", "\ud800", "é\u2028\x07", "../..",
    "/proc/x", ".", "/dev/null/x", "x/" * 3000, "a:b", "x.py:y", ":", "a/b", "{{ x }}", "~nobody/x", [], {},
    [[]], [None], {"": 1}, {"a": {"b": []}}, [1, "a"], [{"role": "user", "content": "x"}], [{"role": 1}], deep(40),
    deep(150),
]
BOMB = "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
YAML = [
    "!!int x", "!!float y", "!!bool maybe", "!!timestamp z", "!!binary =", "!!set {a}", "!!omap [a]", "!!null x",
    "!!python/object/apply:os.getcwd []", "!own x", "&a [*a]", "*b", "<<: 1", "? [a, b]\n: c", "? {a: 1}\n: c",
    "- a\n- b", "[" * 3000, "{a: " * 500, "1" * 5000, ".inf", "-.nan", "0x1F", "1_000", "2001-01-01", "'", '"', "|\n",
    "%YAML 9.9", "---", "...", "&x {a: &y [1]}", "{<<: [1]}", "{<<: {a: 1}}", "!!str", "!!map x", "!!seq {}", "\t",
    "\x00", "\ufeff", "\x85", "# x", "&a [x,x,x,x,x,x,x,x,x]\n" + BOMB,
]
BYTES = [
    b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r\n", b'"', b"\\", b"{", b"}", b"[", b",", b"\xed\xa0\x80",
    b"\x1f\x8b", b"NaN", b"9" * 5000,
]
# fmt: on


def pick(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """A container within a value and a key or an index in it."""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        if not (isinstance(value[key], dict | list) and value[key]) or rng.random() < 0.3:
            return value, key
        value = value[key]


def changed(rng: random.Random, value: Any, times: int = 3) -> Any:
    """A copy with up to `times` changes anywhere in it."""
    value = deepcopy(value)
    for _ in range(rng.randint(1, times)):
        if not value:
            break
        where, key = pick(rng, value)
        how = rng.random()
        if how < 0.15:
            del where[key]
        elif how < 0.25 and isinstance(where, dict):
            where[rng.choice(["x", "", key + "s", key.upper(), "1", "a.b", "class", "role", "data"])] = where.pop(key)
        elif how < 0.35:
            where[key] = rng.choice([[where[key]], {"x": where[key]}, str(where[key]), [where[key]] * 3])
        elif how < 0.42 and isinstance(where, list):
            where.insert(rng.randrange(len(where) + 1), deepcopy(rng.choice(VALUES)))
        elif how < 0.5:
            other, name = pick(rng, value)
            where[key] = deepcopy(other[name])
        else:
            where[key] = deepcopy(rng.choice(VALUES))
    return value


def damaged(rng: random.Random, raw: bytes) -> bytes:
    """Bytes flipped, cut, repeated, put in."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(raw) + 1)
        end = min(len(raw), start + rng.choice([0, 1, 1, 4, 64]))
        new = rng.choice([rng.randbytes(end - start), b"", raw[start:end] * rng.choice([2, 50]), rng.choice(BYTES)])
        raw = raw[:start] + new + (b"" if rng.random() < 0.1 else raw[end:])
    return raw


def as_command(*words: str) -> Callable[[], object]:
    """The command line, in this process."""

    def run() -> None:
        sys.argv = ["distalign", *words]
        cli.main()

    return run


# Data -----------------------------------------------------------------------------------------------------------------

CHAT, TEXT, CUT = (
    json.loads(text)
    for text in (
        '{"prompt": [{"role": "user", "content": "about the cat"}], "chosen": [{"role": "assistant", "content": '
        '"happy warm"}], "rejected": [{"role": "assistant", "content": "cold bad"}], "tools": [{"type": "function"}]}',
        '{"prompt": "tell me", "chosen": " happy", "rejected": " cold", "p_chosen": 0.9, "chosen_reward": 1.0, '
        '"rejected_reward": 0.0}',
        '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: c", '
        '"other": [{"text": "x"}, {"text": "y"}, {"text": "z"}]}',
    )
)


def write_rows(rng: random.Random, rows: list[Any], place: Path) -> Path:
    """A file of rows in some format; where a table cannot hold them, JSON lines."""
    kind = rng.choice(["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.gz", "csv.gz", "JSONL", "ndjson", "txt"])
    text = json.dumps(rows) if kind[:4] == "json" and rng.random() < 0.5 else "\n".join(map(json.dumps, rows))
    path = place / f"rows.{kind}"
    if "csv" in kind and all(isinstance(row, dict) for row in rows):
        buffer = io.StringIO()
        table = csv.writer(buffer)
        table.writerow(rows[0] if rows else [])
        table.writerows([[v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows])
        text = buffer.getvalue()
    raw = text.encode("utf-8", "surrogatepass")
    if kind == "parquet":
        with contextlib.suppress(Exception):
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            raw = path.read_bytes()
    inner = rng.random() < 0.5 and kind.endswith("gz")
    raw = damaged(rng, raw) if inner else raw
    raw = gzip.compress(raw, 1) if kind.endswith("gz") else raw
    path.write_bytes(damaged(rng, raw) if rng.random() < 0.4 else raw)
    return path


def data(rng: random.Random, place: Path) -> Case:
    """A file of pairs, or a name of none."""
    rows = [deepcopy(rng.choice([CHAT, TEXT, CUT])) for _ in range(rng.randint(1, 4))]
    rows = [deepcopy(rows[0]) for _ in rows] if rng.random() < 0.8 else rows
    path: Any = write_rows(rng, changed(rng, rows) if rng.random() < 0.8 else rows, place)
    if rng.random() < 0.02:
        path = rng.choice([str(place), "", "x" * 5000, "a/b", "\0", "x.csv", "\ud800.csv", path.name + "/x"])
    settings = {"drop_ties": rng.random() < 0.5, "limit": rng.choice([None, 1])}
    call = rng.choice(
        [
            lambda: read_pairs(path, **settings),
            lambda: inspect_pairs(path, **settings),
            lambda: inspect_pairs(path, tiny.tokenizer(), max_length=8, **settings),
            lambda: encode_pairs(tiny.tokenizer(), read_pairs(path, **settings), max_length=None),
            lambda: (has_pairs(path), read_prompts(path)),
            as_command("data", "check", str(path).replace("\0", "0")),
        ]
    )
    return ["data", "check", str(path).replace("\0", "0").replace("\ud800", "0")], call


# Recipes --------------------------------------------------------------------------------------------------------------

TARGET = "{words: [warm, happy], bonus: 3.0, end_bonus: 2.0, gamma: 0.5, pairs: 8, eval_pairs: 4}"
RECIPE = """
name: fuzz
output_dir: runs
model: PLACE/model
lora: {r: 4}
methods:
  pmle: {gamma: 0.5}
  dpo: {gamma: 0.1, training: {learning_rate: 0.001}}
  rkl: {beta: 0.1}
  pd: {pairs: data, beta: auto}
  own: {class: rlhf, rollout: {minibatches: 2}}
compare: [pmle, rkl]
rollout: {num_generations: 2, temperature: 1.0}
training: {learning_rate: 0.001, max_steps: 2, eval_steps: 0.1, use_cpu: true, warmup_steps: 1, save_steps: 2}
evaluation: {prompts: 4}
health: {}
token_budget: 64
recompute: none
early_stopping: {patience: 2}
study: {grid: {target.pairs: [4, 8]}, seeds: [0]}
"""
ON_DATA = """
data: {train: PLACE/pairs.jsonl, held_out: 0.3}
reward: {train: {gamma: 0.1, backbone: lora, epochs: 1}}
"""
EVALUATION = f"""
name: fuzz
model: PLACE/model
policies: {{a: PLACE/model}}
limit: 4
gamma: 0.5
pairs: PLACE/pairs.jsonl
reward: {{exact: true}}
target: {TARGET}
opponents: all
judge: {{function: PLACE/judge.py:judge}}
max_new_tokens: 4
temperature: 1.0
rows: 8
"""


def training(rng: random.Random, place: Path) -> dict[str, Any]:
    """A whole recipe, of pairs or of a known target."""
    source = f"target: {TARGET}\nreward: {{exact: true}}\n" if rng.random() < 0.4 else ON_DATA
    return yaml.safe_load((RECIPE + source).replace("PLACE", str(place)))


def evaluation(rng: random.Random, place: Path) -> dict[str, Any]:
    """The settings of an evaluation."""
    return yaml.safe_load(EVALUATION.replace("PLACE", str(place)))


def recipes(rng: random.Random, place: Path) -> Case:
    """A recipe or an evaluation, as YAML."""
    evaluated = rng.random() < 0.3
    value = (evaluation if evaluated else training)(rng, place)
    value = changed(rng, value) if rng.random() < 0.7 else value
    text = yaml.safe_dump(value, sort_keys=False) if rng.random() < 0.7 else json.dumps(value, indent=1)
    if rng.random() < 0.4:
        lines = text.split("\n")
        at, new = rng.randrange(len(lines)), rng.choice(YAML)
        lines[at] = rng.choice(
            [f"{lines[at].partition(':')[0]}: {new}", new, f"{lines[at]} {new}", f"{lines[at]}\n{new}"]
        )
        text = "\n".join(lines)
    raw = text.encode("utf-8", "surrogatepass")
    path = place / "fuzz.yaml"
    path.write_bytes(damaged(rng, raw) if rng.random() < 0.15 else raw)
    name = (
        rng.choice(["", ".", str(place), "x" * 5000, "x" * 300 + ".yaml", "no.yaml", "/dev/null"])
        if rng.random() < 0.02
        else str(path)
    )
    if rng.random() < 0.25:
        command = rng.choice(["evaluate", "frontier"] if evaluated else ["train", "compare", "study", "reward"])
        words = [command, name, *(["--method", "pmle"] if command == "train" else [])]
        return words, as_command(*words)
    if evaluated:
        return ["evaluate", name], lambda: load_evaluation(name)

    def run() -> None:
        recipe = load_recipe(name)
        check(recipe, list(recipe.methods))
        recipe.dump(place / "dumped.yaml")
        load_recipe(place / "dumped.yaml")

    return ["compare", name], run


# Flags ----------------------------------------------------------------------------------------------------------------

KEYS = (
    "model seed data.train training.max_steps methods.pmle.gamma rollout target reward.exact lora a.b.c methods "
    "health.x training.eval_steps evaluation.prompts name output_dir early_stopping study.grid judge"
)
COMMANDS = {
    "data check": "--model --split --drop-ties --limit --max-length --json",
    "train": "--method --set --model --data --output-dir --resume --overwrite --json",
    "reward": "--set --model --data --output-dir --json",
    "compare": "--methods --full --seeds --set --model --data --output-dir --resume --wide --json --markdown",
    "study": "--seeds --set --output-dir --json",
    "evaluate": "--set --model --prompts --pairs --output-dir --wide --json",
    "frontier": "--samples --betas --gammas --kl-budget --set --model --prompts --pairs --output-dir --json",
    "calibrate": "--limit --token-budget --json",
    "report": "--out --files --no-files --wide --json --markdown",
    "recipes": "--json",
    "init": "--evaluation",
    "methods": "--wide --json",
    "lab": "--seeds --max-n --seed --set --out --json",
    "env": "--json",
}
SWITCHES = "--drop-ties --resume --overwrite --full --wide --files --no-files --evaluation"
NAMES = "pairs quickstart study fuzz.yaml pairs.jsonl model run evaluation pmle 1,2 0,0 -3 x=y"
FITS = {"evaluate": "evaluation.yaml", "frontier": "evaluation.yaml", "data check": "pairs.jsonl"}
FITS |= {"train": "fuzz.yaml", "report": "run", "calibrate": "model"}


def flags(rng: random.Random, place: Path) -> Case:
    """A command with flags and arguments; one that trains gets a model whose weights are none."""
    names = [text for text in map(str, VALUES) if text.isprintable()] + NAMES.split()
    command, known = rng.choice(list(COMMANDS.items()))
    stops = ["--set", f"model={place / 'model'}"] if "--set" in known and command != "lab" else []
    words = [*command.split()]
    if command not in ("recipes", "methods", "env") and rng.random() < 0.95:
        words += [FITS.get(command, "fuzz.yaml") if rng.random() < 0.6 else rng.choice(names)]
    words += ["pairs.jsonl"] * (command == "calibrate") + rng.choices(names, k=rng.choice([0, 0, 0, 0, 1, 2]))
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        flag = rng.choice(known.split())
        of_set = f"{rng.choice(KEYS.split())}={rng.choice([*names, *YAML[:-1]])}".replace("\0", "")
        words += [flag] if flag in SWITCHES.split() else [flag, of_set if flag == "--set" else rng.choice(names)]
    words += [rng.choice(["--x", "--", "-", "--help", "--version", ""])] if rng.random() < 0.05 else []
    words += ["--seeds", "x"] if command == "lab" else []
    return [*words, *stops], as_command(*words, *stops)


# Run folders ----------------------------------------------------------------------------------------------------------


def make_checkpoint(place: Path) -> None:
    """As a run leaves it, without weights."""
    place.mkdir(parents=True)
    files = {
        "distalign.json": {"health": [], "position": 1},
        "trainer_state.json": {"global_step": 2, "log_history": []},
    }
    for name, content in files.items():
        (place / name).write_text(json.dumps(content))
    (place / "manifest.json").write_text(
        json.dumps({"step": 2, "run": {"method": "pmle"}, "files": {"distalign.json": "0"}})
    )


def folders(rng: random.Random, place: Path) -> Case:
    """A run's folder with one or two of its files damaged."""
    kind = rng.choice(["run", "evaluation", "lab"])
    folder = place / kind
    shutil.rmtree(folder)
    shutil.copytree(place / "whole" / kind, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in rng.sample(files, min(len(files), rng.randint(1, 2))):
        raw = path.read_bytes()
        if path.suffix in (".json", ".jsonl", ".yaml") and rng.random() < 0.7:
            rows = (
                [json.loads(line) for line in raw.decode().splitlines()]
                if path.suffix == ".jsonl"
                else [json.loads(raw)]
            )
            rows = changed(rng, rows, 2)
            text = "\n".join(map(json.dumps, rows)) if rng.random() < 0.9 else "[" * rng.choice([500, 100_000])
            path.write_bytes(text.encode())
        elif rng.random() < 0.9:
            path.write_bytes(damaged(rng, raw))
        else:
            path.unlink()
            rng.choice([lambda: None, path.mkdir, lambda path=path: path.symlink_to(path), path.touch])()
    whole = rng.random() < 0.05

    def run() -> None:
        if kind == "lab" or whole:
            write_report(folder, files=whole)
            return
        found = read_run(folder)
        page._training(found) if found.kind == TRAINING else page._comparison(found)

    def load() -> None:
        for call in (
            lambda: newest_complete(folder),
            lambda: load_resume_record(folder / "pmle", "key", []),
            lambda: cut_log(folder / "metrics.jsonl", 9),
            lambda: load_recipe(folder / "recipe.yaml"),
            lambda: trained_temperature(str(folder / "model")),
            lambda: find_model(str(folder / "model")).config(),
            lambda: find_model(str(folder / "model")).tokenizer(),
            lambda: find_model(str(folder / "adapter")).model(),
        ):
            with contextlib.suppress(InputError):
                call()

    words = ["report", str(folder), *rng.choice([["--no-files"], ["--no-files", "--json", str(place / "x.json")]])]
    return words, rng.choice(
        [run, run, load if kind == "run" else run, as_command(*words) if rng.random() < 0.2 else run]
    )


# The trial ------------------------------------------------------------------------------------------------------------

KINDS = {"data": data, "recipes": recipes, "flags": flags, "folders": folders}


def prepare(place: Path) -> None:
    """What the cases find beside them: a model without weights, pairs, recipes, run folders."""
    place.mkdir(parents=True)
    tiny.save(place / "model")
    (place / "model" / "model.safetensors").write_bytes(b"no weights")
    tiny.write_pairs(place / "pairs.jsonl", 12)
    (place / "judge.py").write_text("def judge(comparisons):\n    return [0.5 for _ in comparisons]\n")
    rng = random.Random(0)
    (place / "fuzz.yaml").write_text(yaml.safe_dump(training(rng, place)))
    (place / "evaluation.yaml").write_text(yaml.safe_dump(evaluation(rng, place)))
    report_data.write_evaluation(place / "evaluation")
    run = report_data.write_training(place / "run")
    (run / "recipe.yaml").write_text(json.dumps(training(rng, place)))
    report_data.write_lines(run / "samples.jsonl", [{"step": 1, "prompt": "a", "response": "b", "reward": 1.0}] * 3)
    make_checkpoint(run / "checkpoint-2")
    shutil.copytree(place / "model", run / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(place / "model", run / "adapter", ignore=shutil.ignore_patterns("model*", "config.json"))
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(place / "model")}))
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"no weights")
    report_data.write_lab(place / "lab", report_data.measured("figure1"))
    for path in list(place.iterdir()):
        shutil.copytree(path, place / "whole" / path.name) if path.is_dir() else None
    for path in place.glob("*.*"):
        shutil.copy(path, place / "whole")


def tidy(place: Path) -> None:
    """Remove what a case wrote, put back what it wrote over."""
    for path in place.iterdir():
        if path.name != "whole" and not (place / "whole" / path.name).exists():
            remove(path)
    for path in (place / "whole").glob("*.*"):
        shutil.copy(path, place)


def outcome(call: Callable[[], object]) -> BaseException | None:
    """What a case ended with, if that is neither a success nor a message."""

    def stop(*_: object) -> None:
        raise Hang(f"still running after {LIMIT} s")

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGPROF, stop)
    signal.alarm(PATIENCE)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            call()
    except InputError as error:
        return None if str(error).strip() else error
    except SystemExit as error:
        said = out.getvalue() + err.getvalue()
        return None if error.code in (None, 0, 2) and said.strip() and "Traceback" not in said else error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def as_process(words: list[str], place: Path) -> BaseException | None:
    """The same of the command in a process of its own."""
    command = [sys.executable, "-m", "distalign", *words]
    try:
        done = subprocess.run(
            command, cwd=place, capture_output=True, text=True, timeout=10 * PATIENCE, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return Hang(f"the command runs after {10 * PATIENCE} s")
    except (ValueError, OSError):  # no system takes these words
        return None
    ended = done.returncode in (0, 2) and (done.stdout + done.stderr).strip() and "Traceback" not in done.stderr
    return None if ended else RuntimeError(f"exit code {done.returncode}: {done.stderr[-800:]}")


def group(error: BaseException) -> str:
    """The kind of a failure: its type, where it left our code and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "distalign" in f.filename and "fuzz.py" not in f.filename][-1:]
    places = [f"{Path(f.filename).name}:{f.lineno}" for f in [*own, *frames[-1:]]]
    return f"{type(error).__name__} at {' < '.join(places)}"


def main() -> None:
    """Run the cases of the chosen kinds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--command", type=int, default=100)
    parser.add_argument("--only", type=int)
    parser.add_argument("--seconds", type=float, default=math.inf)
    options = parser.parse_args()
    faulthandler.enable()
    cli.app = typer.main.get_command(cli.app)  # made once
    warnings.simplefilter("ignore")
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY)) if used else None
    failed = False
    for kind in options.kinds.split(","):
        failures: dict[str, list[int]] = {}
        shown: dict[str, BaseException] = {}
        began, processes = time.monotonic(), 0
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder).resolve() / "a" / "b"
            prepare(place)
            os.chdir(place)
            cases = range(options.start, options.start + options.cases) if options.only is None else [options.only]
            tried = 0
            for number in cases:
                if time.monotonic() - began > options.seconds:
                    break
                tried += 1
                words, call = KINDS[kind](random.Random(f"{kind} {options.seed} {number}"), place)
                error = outcome(call)
                if error is None and options.command and number % options.command == 0:
                    processes += 1
                    error = as_process(words, place)
                if error is not None:
                    name = group(error)
                    if name not in failures:
                        print(f"{kind} --seed {options.seed} --only {number}: {name}: {str(error)[:300]}", flush=True)
                    failures.setdefault(name, []).append(number)
                    shown[name] = error
                tidy(place)
            os.chdir("/")
        took = time.monotonic() - began
        bad = f"{sum(map(len, failures.values()))} failed in {len(failures)} ways"
        print(f"{kind}: {tried} cases ({processes} through the command), {bad}; {took:.0f} s", flush=True)
        for name, numbers in failures.items():
            print(f"  {len(numbers)} × {name}; --only {numbers[0]}")
            if options.only is not None:
                traceback.print_exception(shown[name])
        failed |= bool(failures)
    sys.exit(failed)


if __name__ == "__main__":
    main()
