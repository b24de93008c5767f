"""Kill runs with SIGKILL, resume them, and compare with the run that nothing disturbed. Prints a table in Markdown.

    python scripts/kill_points.py [--random 100] [--seed 0] [--methods pmle,pd,rkl] [--kinds random,files,resume,torn]

Points: after a random time, where every fourth is killed a second time while it resumes (random); before each file that
the run opens for writing, renames or removes (files), in a run that resumes too (resume); while a line of a log is
written (torn). Weights, samples.jsonl and metrics.jsonl (but what a clock measured) must be the same to the last bit.

Every run is a process of its own, forked from one that has imported everything and run nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny
import torch
import tqdm.auto
from safetensors.torch import load_file

from distalign.errors import InputError
from distalign.experiments.recipe import Recipe, load_recipe
from distalign.experiments.train import train
from distalign.training import checkpoint as checkpoints
from distalign.training import resumable as trainers

REWARD = "def reward(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"
TRAINING = {"learning_rate": 3e-3, "per_device_train_batch_size": 4, "use_cpu": True, "save_steps": 2, "max_steps": 5}
ROLLOUT = {"num_generations": 2, "max_completion_length": 4, "minibatches": 2, "num_iterations": 2}
# Between them: full weights and LoRA, evaluations with the best step kept, a reference, rounds that are gone through
# several times, a value head, log lines over several steps.
SETTINGS = {
    "pmle": {"methods": {"pmle": {"gamma": 0.5, "beta": 0.0}}, "lora": None, "eval": {"eval_steps": 2}},
    "pd": {"methods": {"pd": {"gamma": 0.5, "beta": 0.1, "pairs": "data+policy"}}, "training": {"logging_steps": 3}},
    "rkl": {"methods": {"rkl": {"gamma": 0.5, "beta": 0.1, "estimator": "ppo"}}, "rollout": ROLLOUT},
}
LONG = 120.0
CLOCK = ("time", "per_second", "runtime")


def recipe(place: Path, method: str, name: str) -> Recipe:
    """The recipe of a run in a folder of its own."""
    settings = SETTINGS[method]
    return load_recipe(
        {
            "name": name,
            "output_dir": str(place / "runs"),
            "model": str(place / "model"),
            "lora": settings.get("lora", {"r": 4, "alpha": 8}),
            "data": {"train": str(place / "pairs.jsonl"), "held_out": 0.3},
            "methods": settings["methods"],
            "reward": {"function": f"{place / 'reward.py'}:reward"},
            "training": {**TRAINING, **settings.get("training", {}), **settings.get("eval", {"eval_strategy": "no"})},
            "rollout": {"num_generations": 2, "max_completion_length": 4, **settings.get("rollout", {})},
            "token_budget": 512,
        }
    )


# Processes ------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """The process was killed, as it was to be."""


def in_child(work: Callable[[], object], *, after: float | None = None) -> object:
    """What `work` returns in a process of its own, as JSON; killed `after` so many seconds. Raises Killed if it was."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            torch.set_num_threads(1)
            # tqdm's lock is shared with the other forks, and stays locked when one is killed. transformers' bars are of
            # a class that may have one of its own.
            for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):
                bar.set_lock(threading.RLock())
            # What SIGKILL leaves does not depend on it.
            os.fsync = lambda _: None
            # What libraries print is not wanted; what a failure says is returned.
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            try:
                result: object = work()
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"}
            os.write(write, json.dumps(result).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    deadline = None if after is None else time.monotonic() + after
    while deadline is not None and time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.002)
    if deadline is not None:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise Killed
    return json.loads(text)


def run(settings: Recipe, method: str, resume: bool) -> str:
    """Train, and say in a word how it began."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("distalign")
    logger.addHandler(Keep())
    logger.setLevel(logging.INFO)
    try:
        train(settings, method, resume=resume)
    except InputError as error:
        if "holds no checkpoint to continue from; leave --resume out" not in str(error):
            raise
        train(settings, method)
        return "refused: nothing was written yet; run again without --resume"
    text = "\n".join(lines)
    if "nothing is trained" in text:
        return "had ended: nothing is trained"
    if "the run begins anew" in text:
        return "no checkpoint yet: began anew"
    passed = " (a damaged one passed over)" if "is passed over" in text else ""
    return f"went on from a checkpoint{passed}"


def watch(folder: Path, hit: Callable[[int, str], None]) -> None:
    """Call `hit` with a number and words before each file of the folder that is opened to write, renamed or removed.

    torch.save and safetensors write without Python's open: they are watched by their functions.
    """
    count = 0

    def at(what: str, path: object) -> None:
        nonlocal count
        if isinstance(path, str | Path) and str(path).startswith(str(folder)):
            count += 1
            hit(count, f"{what} {Path(path).relative_to(folder)}")

    def audit(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            at("write", arguments[0])
        elif event in ("os.rename", "os.remove", "os.rmdir") or (
            event == "os.mkdir" and not Path(arguments[0]).exists()
        ):
            # Whole folders are removed by names within an open folder.
            inside = (
                f"/proc/self/fd/{arguments[1]}"
                if event in ("os.remove", "os.rmdir") and isinstance(arguments[1], int) and arguments[1] > 0
                else ""
            )
            path = Path(os.readlink(inside), arguments[0]) if inside and os.path.exists(inside) else arguments[0]
            at(event.removeprefix("os."), path)

    def watched(function: Callable, place: int) -> Callable:
        def call(*arguments: object, **given: object) -> object:
            at("write", arguments[place])
            return function(*arguments, **given)

        return call

    sys.addaudithook(audit)
    torch.save = watched(torch.save, 1)
    for module in (checkpoints, trainers):
        vars(module)["save_file"] = watched(vars(module)["save_file"], 1)


# Points ---------------------------------------------------------------------------------------------------------------


def outcome(settings: Recipe, method: str) -> dict[str, object]:
    """What a run's folder holds in the end."""
    folder = settings.train_dir / method
    weights = {}
    for file in sorted((folder / "model").glob("*.safetensors")):
        weights |= {name: tensor.numpy().tobytes().hex() for name, tensor in load_file(file).items()}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    samples = folder / "samples.jsonl"
    return {
        "weights": weights,
        "samples.jsonl": samples.read_text(encoding="utf-8") if samples.is_file() else "",
        "metrics.jsonl": [{key: row[key] for key in row if not key.endswith(CLOCK)} for row in rows],
    }


class Bench:
    """One method's undisturbed run, and the points that are compared with it."""

    def __init__(self, place: Path, method: str) -> None:
        self.place, self.method, self.number = place, method, 0
        whole = recipe(place, method, f"{method}-whole")
        in_child(lambda: run(whole, method, False))
        started = time.monotonic()
        whole = recipe(place, method, f"{method}-again")
        in_child(lambda: run(whole, method, False))
        self.seconds = time.monotonic() - started
        self.whole = outcome(whole, method)
        first = outcome(recipe(place, method, f"{method}-whole"), method)
        assert first == self.whole, f"{method}: two undisturbed runs differ"
        self.rows: list[tuple[str, str, bool]] = []

    def new(self) -> Recipe:
        """A recipe with a folder that is not there yet."""
        self.number += 1
        return recipe(self.place, self.method, f"{self.method}-{self.number}")

    def killed(self, settings: Recipe, *, resume: bool, at: int | None = None, after: float | None = None) -> None:
        """A run that is killed, if its end does not come first."""

        def work() -> str:
            if at is not None:

                def hit(number: int, _: str) -> None:
                    if number == at:
                        os.kill(os.getpid(), signal.SIGKILL)

                watch(settings.train_dir / self.method, hit)
            return run(settings, self.method, resume)

        with suppress(Killed):
            in_child(work, after=after)

    def points(self, settings: Recipe, *, resume: bool) -> list[str]:
        """What is written in a run, in order."""

        def work() -> list[str]:
            found: list[str] = []
            watch(settings.train_dir / self.method, lambda _, what: found.append(what))
            run(settings, self.method, resume)
            return found

        found = in_child(work)
        assert isinstance(found, list), found
        return found

    def compare(self, settings: Recipe, kind: str) -> None:
        """Resume, and take down how the run ended."""
        try:
            how = in_child(lambda: run(settings, self.method, True), after=LONG)
        except Killed:
            how = {"error": f"did not end within {LONG:g} s"}
        same = isinstance(how, str)
        if same:
            now = outcome(settings, self.method)
            differs = [name for name in now if now[name] != self.whole[name]]
            same = not differs
            how = how if same else f"{how}: DIFFERS in {', '.join(differs)}"
        self.rows.append((kind, str(how), same))
        if same:
            shutil.rmtree(settings.run_dir)
        else:
            print(self.method, *self.rows[-1], settings.run_dir, file=sys.stderr)

    def random_points(self, count: int, source: random.Random) -> None:
        """Killed after a random time."""
        for i in range(count):
            settings = self.new()
            self.killed(settings, resume=False, after=source.uniform(0, self.seconds))
            if i % 4 == 3:
                self.killed(settings, resume=True, after=source.uniform(0, self.seconds))
            self.compare(settings, "random, twice" if i % 4 == 3 else "random")

    def between_files(self) -> None:
        """Killed before each file that is written."""
        for at in range(1, len(self.points(self.new(), resume=False)) + 1):
            settings = self.new()
            self.killed(settings, resume=False, at=at)
            self.compare(settings, "between two files")

    def while_it_resumes(self) -> None:
        """Killed in the middle, and again before each file that the resumed run writes up to its first checkpoint."""
        settings, middle = self.new(), len(self.points(self.new(), resume=False)) // 2
        self.killed(settings, resume=False, at=middle)
        resumed = self.points(settings, resume=True)
        first = next((i for i, what in enumerate(resumed) if what.startswith("mkdir .saving")), len(resumed))
        for at in range(1, first + 1):
            settings = self.new()
            self.killed(settings, resume=False, at=middle)
            self.killed(settings, resume=True, at=at)
            self.compare(settings, "between two files, while it resumes")

    def torn_lines(self) -> None:
        """Killed in the middle, while a line of a log was written."""
        middle = len(self.points(self.new(), resume=False)) // 2
        for log in ("metrics.jsonl", "samples.jsonl"):
            settings = self.new()
            self.killed(settings, resume=False, at=middle)
            with (settings.train_dir / self.method / log).open("a", encoding="utf-8") as file:
                file.write('{"step": 4, "lo')
            self.compare(settings, "torn last line of a log")


def main() -> None:
    """Run the points and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=100, help="random points, over all methods")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default="pmle,pd,rkl")
    parser.add_argument("--kinds", default="random,files,resume,torn")
    options = parser.parse_args()
    place, methods = Path(tempfile.mkdtemp(prefix="kill-points-")), options.methods.split(",")
    tiny.save(place / "model", num_hidden_layers=1)
    tiny.write_pairs(place / "pairs.jsonl", 20)
    (place / "reward.py").write_text(REWARD)
    # A first run tells what is to be imported, so that a fork has it.
    settings = recipe(place, methods[-1], "warm")

    def modules() -> list[str]:
        run(settings, methods[-1], False)
        return [name for name in sys.modules if name.split(".")[0] in ("transformers", "peft", "accelerate", "torch")]

    names = in_child(modules)
    assert isinstance(names, list), names
    for name in names:
        with suppress(ImportError):
            importlib.import_module(name)
    # The collector, which every training calls, need not look through what was imported.
    gc.collect()
    gc.freeze()
    started, source = time.monotonic(), random.Random(options.seed)
    table: dict[tuple[str, str], Counter[str]] = {}
    good = True
    for i, method in enumerate(methods):
        bench = Bench(place, method)
        print(f"{method}: {bench.seconds:.1f} s undisturbed", file=sys.stderr)
        count = options.random // len(methods) + (i < options.random % len(methods))
        kinds = {
            "random": lambda bench=bench, count=count: bench.random_points(count, source),
            "files": bench.between_files,
            "resume": bench.while_it_resumes,
            "torn": bench.torn_lines,
        }
        for kind in options.kinds.split(","):
            kinds[kind]()
        for kind, how, same in bench.rows:
            table.setdefault((kind, how), Counter())[method] += 1
            good &= same
    print(f"| killed | --resume | {' | '.join(methods)} |\n| --- | --- |{' --- |' * len(methods)}")
    for (kind, how), counts in sorted(table.items()):
        print(f"| {kind} | {how} | {' | '.join(str(counts[method]) for method in methods)} |")
    points = sum(sum(counts.values()) for counts in table.values())
    print(f"\n{points} points in {time.monotonic() - started:.0f} s: ", end="")
    print("all resumed to the same weights, samples and metrics." if good else "NOT all resumed to the same.")
    if good:
        shutil.rmtree(place)
    sys.exit(not good)


if __name__ == "__main__":
    main()
