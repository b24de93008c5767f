"""Filling a template of `assets`: what comes from files is escaped by Jinja, and a missing name is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

__all__ = ["ASSETS", "as_yaml", "render"]

ASSETS = Path(__file__).parents[1] / "assets"


def render(template: str, context: dict[str, Any]) -> str:
    """The page that a template of `assets` makes of the context."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)


def as_yaml(value: Any) -> str:
    """Settings as a recipe writes them; "" for nothing."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100) if value else ""
