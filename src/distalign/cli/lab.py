"""`distalign lab`: the theory, measured on targets that are known exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from distalign.cli.shared import JsonOption, check_path, print_table, quiet, refuse, write_json

_ALL = "all"


def lab(
    experiment: Annotated[
        str, typer.Argument(help="The name of an experiment, a recipe of one (.yaml), or all.", metavar="EXPERIMENT")
    ],
    seeds: Annotated[int | None, typer.Option(help="Independent repetitions: worlds and draws of the data.")] = None,
    max_n: Annotated[int | None, typer.Option(help="The largest number of labelled pairs.")] = None,
    seed: Annotated[int | None, typer.Option(help="What all randomness follows from.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results; each experiment gets a subfolder.")] = Path(
        "runs/lab"
    ),
    json_path: JsonOption = None,
) -> None:
    """Measure what the theory promises, on targets known exactly; writes numbers, figures and one report."""
    check_path(json_path)
    quiet()
    from distalign.progress import progress
    from distalign.report import write_report

    flags = {"seeds": seeds, "max_n": max_n, "seed": seed}
    chosen = _experiments(experiment, {key: value for key, value in flags.items() if value is not None}, set_ or [])
    found: dict[str, Any] = {}
    alone = experiment != _ALL
    try:
        for one in chosen:
            _make(out / one.name)
            with progress(one.name, 1) as advance:
                found[one.name] = _measured(one, advance)
            text = json.dumps(found[one.name], indent=1, ensure_ascii=False, allow_nan=False)
            (out / one.name / "lab.json").write_text(text, encoding="utf-8")
    finally:
        # Stopped or refused in the middle: what is done has its page.
        if found:
            page = write_report(out / chosen[0].name if alone else out)
            print(f"results: {out / chosen[0].name if alone else out}\nreport: {page}")
    words = {True: "yes", False: "NO", None: "not judged"}
    rows = [
        [name, claim["promised"], claim["found"], words[claim["holds"]]]
        for name, numbers in found.items()
        for claim in numbers["shown"]["claims"]
    ]
    print_table(["experiment", "promised", "found", "holds"], rows)
    write_json(json_path, found[chosen[0].name] if alone else {"experiments": found})


def _measured(experiment: Any, advance: Any) -> dict[str, Any]:
    """Its numbers. Settings at which a search does not end, or a matrix cannot be inverted, are refused by name."""
    from distalign.lab import measure

    try:
        return measure(experiment, advance)
    except (RuntimeError, ArithmeticError) as error:
        changed = {
            name: getattr(experiment, name)
            for name, field in experiment.__dataclass_fields__.items()
            if getattr(experiment, name) != field.default
        }
        if not changed:
            raise
        return refuse(
            f"lab {experiment.name}: cannot be measured at {changed} ({type(error).__name__}: {error}); "
            "go back towards its defaults"
        )


def _experiments(text: str, flags: dict[str, int], overrides: list[str]) -> list[Any]:
    """The experiments with their settings, all of them checked before the first is run."""
    from distalign.lab import EXPERIMENTS, configure
    from distalign.settings import parse_value, read_yaml

    settings: dict[str, Any] = {}
    name, where = text, f"lab {text}"
    if text.endswith((".yaml", ".yml")):
        settings, where = read_yaml(Path(text)), text
        name = settings.pop("experiment", None)
        if name not in EXPERIMENTS:
            refuse(f"{text}: experiment is {name!r}; write experiment: {' | '.join(EXPERIMENTS)}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            refuse(f"--set {override}: write key=value")
        settings[key.strip()] = parse_value(value)
    if name == _ALL:
        if settings:
            refuse("--set goes with one experiment, not with all: each has its own settings")
        return [configure(one, _own(one, flags), where) for one in EXPERIMENTS.values()]
    if name not in EXPERIMENTS:
        refuse(f'lab: there is no experiment "{name}"; choose {", ".join(EXPERIMENTS)}, {_ALL} or a recipe (.yaml)')
    return [configure(EXPERIMENTS[name], settings | flags, where)]


def _own(experiment: Any, flags: dict[str, int]) -> dict[str, int]:
    """Of the flags for all experiments those that this one has."""
    return {key: value for key, value in flags.items() if key in experiment.__dataclass_fields__}


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--out {folder}: cannot be made ({error.strerror}); choose another place")
