"""Curves of what the lab's experiments measure; what they show is defined by the report, which reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distalign.report.shown import Claim, Curve, Panel, Shown, Table

__all__ = ["Claim", "Curve", "Panel", "Shown", "Table", "with_errors", "with_quartiles"]


def with_quartiles(label: str, x: Sequence[float | int], spreads: Sequence[Mapping[str, float | int]]) -> Curve:
    """Medians with the band between the quartiles, from mappings with median, q25, q75."""
    middle, low, high = ([spread[key] for spread in spreads] for key in ("median", "q25", "q75"))
    return Curve(label, x, middle, low, high)


def with_errors(label: str, x: Sequence[float | int], estimates: Sequence[Mapping[str, float | int]]) -> Curve:
    """Means with a band of one standard error either way, from mappings with mean, se."""
    low, high = ([one["mean"] + sign * one["se"] for one in estimates] for sign in (-1, 1))
    return Curve(label, x, [one["mean"] for one in estimates], low, high)
