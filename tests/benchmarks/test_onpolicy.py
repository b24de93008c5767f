"""The benchmark of on-policy steps runs both sides on the same prompts and writes what it shows."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("trl", reason="TRL needs Python 3.11")
import onpolicy
import sides
import small_job


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_onpolicy_writes_what_it_measures(tmp_path, capsys, monkeypatch):
    """RLHF beside RLOO: a ratio within its spread, and memory of both."""
    monkeypatch.setattr(onpolicy, "Job", small_job.SmallJob)
    monkeypatch.setattr(sides, "START", small_job.FORKED)
    place = tmp_path / "onpolicy.json"
    sizes = ["--models", "small-32k", "--methods", "rlhf", "--prompts", "1", "--rounds", "1"]
    rows = onpolicy.main([*sizes, "--json", str(place)])
    assert json.loads(place.read_text(encoding="utf-8"))["rows"] == rows
    (row,) = rows
    assert row["low"] <= row["time_ratio"] <= row["high"]
    assert min(row["seconds"], row["rloo_seconds"], row["memory_ratio"]) > 0
    assert "A whole on-policy step" in capsys.readouterr().out
