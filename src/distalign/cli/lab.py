"""`distalign lab`: the theory, measured on targets that are known exactly."""

from __future__ import annotations

import json
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distalign.cli import shared

if TYPE_CHECKING:
    from distalign.lab.experiment import Experiment, Row
    from distalign.progress import Advance

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
    json_path: shared.JsonOption = None,
) -> None:
    """Measure what the theory promises, on targets known exactly; writes numbers, figures and one report."""
    shared.check_path(json_path)
    shared.quiet()
    from distalign.errors import InputError
    from distalign.progress import progress
    from distalign.report import write_report
    from distalign.training.run_folder import write_text

    flags = {"seeds": seeds, "max_n": max_n, "seed": seed}
    chosen = _experiments(experiment, {key: value for key, value in flags.items() if value is not None}, set_ or [])
    folder = out if experiment == _ALL else out / chosen[0].name
    results: dict[str, Row] = {}
    try:
        for each in chosen:
            _make(out / each.name)
            with progress(each.name, 1) as advance:
                results[each.name] = _measure(each, advance)
            text = json.dumps(results[each.name], indent=1, ensure_ascii=False, allow_nan=False)
            write_text(out / each.name / "lab.json", text)
    except BaseException:
        # Stopped or refused in the middle: what is done has its page, where that can be written.
        if results:
            with suppress(InputError, OSError):
                print(f"results: {folder}\nreport: {write_report(folder)}")
        raise
    print(f"results: {folder}\nreport: {write_report(folder)}")
    words = {True: "yes", False: "NO", None: "not judged"}
    rows = [
        [name, claim["promised"], claim["found"], words[claim["holds"]]]
        for name, numbers in results.items()
        for claim in numbers["shown"]["claims"]
    ]
    shared.print_words(["experiment", "promised", "found", "holds"], rows)
    shared.write_json(json_path, {"experiments": results} if experiment == _ALL else results[chosen[0].name])


def _measure(experiment: Experiment, advance: Advance) -> Row:
    """Its numbers. Settings at which a search does not end, or a matrix cannot be inverted, are refused by name."""
    from distalign.lab import measure
    from distalign.progress import in_words

    try:
        return measure(experiment, advance)
    except (RuntimeError, ArithmeticError) as error:
        changed = experiment.model_dump(exclude_defaults=True)
        if not changed:
            raise
        return shared.refuse(
            f"lab {experiment.name}: cannot be measured at {in_words(changed)} ({type(error).__name__}: {error}); "
            "go back towards its defaults"
        )


def _experiments(name: str, flags: dict[str, int], overrides: list[str]) -> list[Experiment]:
    """The experiments with their settings, all of them checked before the first is run."""
    from distalign.lab import EXPERIMENTS, configure
    from distalign.settings import parse_value, read_yaml

    settings: dict[str, object] = {}
    where = f"lab {name}"
    if name.endswith((".yaml", ".yml")):
        settings, where = read_yaml(Path(name)), name
        name = str(settings.pop("experiment", None))
        if name not in EXPERIMENTS:
            shared.refuse(f"{where}: experiment is {name!r}; write experiment: {' | '.join(EXPERIMENTS)}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            shared.refuse(f"--set {override}: write key=value")
        settings[key.strip()] = parse_value(value, override)
    if name == _ALL:
        if settings:
            shared.refuse("--set goes with one experiment, not with all: each has its own settings")
        # Of the flags those that the experiment has.
        return [
            configure(each, {key: value for key, value in flags.items() if key in each.model_fields}, where)
            for each in EXPERIMENTS.values()
        ]
    if name not in EXPERIMENTS:
        near = "".join(f'; did you mean "{match}"?' for match in get_close_matches(name, EXPERIMENTS, 1))
        shared.refuse(
            f'lab: there is no experiment "{name}"; choose {", ".join(EXPERIMENTS)}, {_ALL} or a recipe{near}'
        )
    return [configure(EXPERIMENTS[name], settings | flags, where)]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        shared.refuse(f"--out {folder}: cannot be made ({error.strerror}); choose another place")
