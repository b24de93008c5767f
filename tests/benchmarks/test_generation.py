"""The benchmark of rollouts runs, counts the same tokens on both sides, and writes what it shows."""

from __future__ import annotations

import json

import generation
import pytest
import tiny


def test_benchmark_writes_what_it_measures(tmp_path, monkeypatch, capsys):
    """A row for each number of samples, both sides with the same greedy tokens, and the ratio within its spread."""
    monkeypatch.setitem(generation.MODELS, "small-32k", tiny.model)
    sizes = ["--prompts", "2", "--samples", "1,3", "--tokens", "4", "--prompt-tokens", "5", "9", "--rounds", "2"]
    found = generation.main(["--model", "small-32k", *sizes, "--json", str(tmp_path / "generation.json")])
    written = json.loads((tmp_path / "generation.json").read_text(encoding="utf-8"))
    assert written == found
    assert [(row["samples"], row["prompts"], row["response_tokens"]) for row in found["rows"]] == [(1, 2, 4), (3, 2, 4)]
    assert found["greedy_agreement"] == 1
    for row in found["rows"]:
        assert row["low"] <= row["ratio"] <= row["high"]
        assert min(row["tokens_per_second"], row["generate_tokens_per_second"]) > 0
    assert "greedy tokens that agree with generate: 100.0%" in capsys.readouterr().out


def test_both_sides_must_give_all_tokens(monkeypatch):
    """A side that stops early would look fast; it is refused."""

    def lazy(model, prompts, samples, tokens, seed, greedy):
        return [[[5]] * samples for _ in prompts]

    with pytest.raises(RuntimeError, match="lazy did not give 2 x 3 tokens"):
        generation.seconds(tiny.model(), lazy, [[1], [2]], 2, 3, 0)
