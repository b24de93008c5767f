"""`distalign report`: a page of one run or several, from their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from distalign.cli import shared


def report(
    runs: Annotated[list[Path], typer.Argument(help="A run folder, or several for one page of them.", metavar="RUN…")],
    out: Annotated[Path | None, typer.Option(help="Folder of the page; needed for several runs.")] = None,
    files: Annotated[bool, typer.Option(help="Write tables as CSV and figures as PNG beside the page.")] = True,
    wide: shared.WideOption = False,
    json_path: shared.JsonOption = None,
    markdown: shared.MarkdownOption = None,
) -> None:
    """Draw the report of a run again, from its folder, or of several on one page; loads no model."""
    from distalign.report import results_table, write_report

    shared.check_path(json_path)
    shared.check_path(markdown, "--markdown")
    if len(runs) > 1:
        if markdown is not None or json_path is not None:
            shared.refuse("--json and --markdown are of one run; leave them out for several")
        print(f"report: {write_report(runs, out, files=files)}")
        return
    (run,) = runs
    page = write_report(run, out, files=files)
    results = run / "results.json"
    if results.is_file():
        content = json.loads(results.read_text(encoding="utf-8"))  # write_report has checked it
        shared.print_numbers(results_table(content), wide)
        shared.write_json(json_path, content)
        shared.write_markdown(markdown, content, "")
    elif markdown is not None or json_path is not None:
        shared.refuse(f"{run}: holds no results.json of a comparison to write from; leave --markdown and --json out")
    print(f"report: {page}")
