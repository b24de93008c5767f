"""Do the tests see faults that matter? Writes one at a time into a copy of the tree and runs the tests meant for it.

    python scripts/mutants.py                 all of them, some 20 minutes on one core
    python scripts/mutants.py NAME [NAME ...]
    python scripts/mutants.py --list

scripts/mutants.yaml has the faults. Each replaces a fragment that occurs exactly once in src/distalign, whichever file
that is. A fault is caught if a test fails, or does not end; it is stale if its fragment, a test file or all chosen
tests are gone, or if the faulty code cannot be imported. Run it on a tree whose tests pass. The exit status is 0 if all
faults are caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SECONDS = 300
# What a copy can do without: history, environments, results.
LEFT_OUT = (".*", "__pycache__", "*.egg-info", "runs", "dist", "build")


@dataclass(frozen=True)
class Mutant:
    """One fault: `find` becomes `replace`; `tests` are names of files, `only` says which tests of them (pytest -k)."""

    name: str
    find: str
    replace: str
    tests: list[str]
    only: str = ""

    def place(self, root: Path) -> tuple[Path | None, str]:
        """The one file that has the fragment, and its faulty text; or None, and why there is none."""
        texts = {path: path.read_text(encoding="utf-8") for path in sorted((root / "src" / "distalign").rglob("*.py"))}
        found = {path: text.count(self.find) for path, text in texts.items() if self.find in text}
        if sum(found.values()) != 1:
            return None, f"its fragment occurs {sum(found.values())} times"
        (path,) = found
        return path, texts[path].replace(self.find, self.replace)

    def test_files(self, root: Path) -> list[Path]:
        """Where its test files are, by name. Raises FileNotFoundError."""
        found = [sorted((root / "tests").rglob(name)) for name in self.tests]
        for name, paths in zip(self.tests, found, strict=True):
            if not paths:
                raise FileNotFoundError(f"there is no {name}")
        return [path for paths in found for path in paths]


def read_mutants() -> list[Mutant]:
    """The faults of mutants.yaml, in its order."""
    entries = yaml.safe_load((ROOT / "scripts" / "mutants.yaml").read_text(encoding="utf-8"))
    return [Mutant(name, **{**entry, "tests": entry["tests"].split()}) for name, entry in entries.items()]


def try_mutant(mutant: Mutant, copy: Path) -> tuple[str, str]:
    """ "caught", "survived" or "stale", and a few words; the copy is left as it was."""
    path, text = mutant.place(copy)
    if path is None:
        return "stale", text
    try:
        files = mutant.test_files(copy)
    except FileNotFoundError as error:
        return "stale", str(error)
    original = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    try:
        return _verdict(*_run(files, mutant.only, copy))
    finally:
        path.write_text(original, encoding="utf-8")


def _run(files: list[Path], only: str, copy: Path) -> tuple[int | None, str]:
    """Exit status of pytest in the copy (None: it did not end), and what it said."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--durations=0", *map(str, files)]
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {**threads, **os.environ, "PYTHONPATH": str(copy / "src")}
    settings = {"cwd": copy, "env": environment, "capture_output": True, "text": True, "timeout": SECONDS}
    try:
        done = subprocess.run([*command, *(["-k", only] if only else [])], check=False, **settings)
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout


def _verdict(status: int | None, output: str) -> tuple[str, str]:
    lines = output.splitlines()
    if status is None:
        return "caught", f"no end after {SECONDS} s"
    if status == 1 and not any(line.startswith("ERROR") and "::" not in line for line in lines):
        failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        return "caught", failed[0].partition(" ")[2].partition(" - ")[0].rpartition("/")[2] if failed else ""
    if status == 0:
        return "survived", ""
    return "stale", "no test was chosen" if status == 5 else f"pytest ended with {status}: {' '.join(lines[-2:])[:100]}"


def main() -> int:
    """Try the faults named, or all; 1 if one is stale or survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the names and where each fault goes")
    given = parser.parse_args()
    mutants = read_mutants()
    unknown = set(given.names) - {mutant.name for mutant in mutants}
    if unknown:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    stale = False
    for mutant in mutants:
        path, why = mutant.place(ROOT)
        stale |= path is None
        if path is None:
            print(f"{mutant.name}: stale, {why}", flush=True)
        elif given.list:
            print(f"{mutant.name}: {path.relative_to(ROOT)}; {' '.join(mutant.tests)}")
    if given.list:
        return int(stale)
    mutants = [mutant for mutant in mutants if not given.names or mutant.name in given.names]
    verdicts: Counter[str] = Counter()
    bad = stale
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for number, mutant in enumerate(mutants, 1):
            started = time.perf_counter()
            verdict, words = try_mutant(mutant, copy)
            verdicts[verdict] += 1
            bad |= verdict != "caught"
            shown = verdict.upper() if verdict == "survived" else verdict
            seconds = time.perf_counter() - started
            print(f"{number:3}  {mutant.name:<50}{shown:<10}{seconds:5.0f} s  {words}", flush=True)
    counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in ("caught", "survived", "stale"))
    print(f"{len(mutants)} mutants: {counts}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
