"""What a run found, told to people: one self-contained HTML page, and the same numbers as a terminal table.

Reads the files of a run folder and loads no model.
"""

from __future__ import annotations

from .markdown import results_markdown
from .numbers import format_estimate, format_interval
from .page import write_report
from .results import ReportError, Results
from .tables import results_table

__all__ = [
    "ReportError",
    "Results",
    "format_estimate",
    "format_interval",
    "results_markdown",
    "results_table",
    "write_report",
]
