"""Filling a template of `assets`: what comes from files is escaped by Jinja, and a missing name is an error."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distalign.report.results import legible

__all__ = ["ASSETS", "as_yaml", "render"]

ASSETS = Path(__file__).parent / "templates"


def render(template: str, context: dict[str, Any], scripts: Sequence[str] = ()) -> str:
    """The page that a template of `assets` makes of the context, with scripts of `assets`: no others may run.

    What HTML does not admit is U+FFFD on it, wherever it came from.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    code = "\n".join((ASSETS / script).read_text(encoding="utf-8") for script in scripts)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    own = {"script": code, "script_source": f"'sha256-{digest}'" if code else "'none'"}
    return legible(environment.get_template(template).render(context | own))


def as_yaml(value: Any) -> str:
    """Settings as a recipe writes them; "" for nothing."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100) if value else ""
