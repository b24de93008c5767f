"""What a run found, for people: one self-contained HTML page, and the same numbers as tables.

Reads the files of a run folder and loads no model.
"""

from __future__ import annotations

from distalign.report.page import write_report
from distalign.report.results import ReportError
from distalign.report.tables import results_markdown, results_table

__all__ = ["ReportError", "results_markdown", "results_table", "write_report"]
