"""The benchmark of evaluations measures both sides, tells where the time goes, and writes what it shows."""

from __future__ import annotations

import json

import evaluation
import pytest
import tiny
from transformers import TrainingArguments

from distalign.models.load import find_model

HERE = TrainingArguments(output_dir="unused").device.type


@pytest.mark.skipif(HERE != "cpu", reason="an evaluation takes the accelerator that it finds")
def test_benchmark_writes_what_it_measures(tmp_path, monkeypatch, capsys):
    """A round of both sides on the tiny model in bfloat16: seconds of the whole, of its parts, and their ratio."""
    monkeypatch.setattr(evaluation, "MODEL", str(tiny.save(tmp_path / "model")))
    dtypes = []

    def found(place):
        source = find_model(place)
        load = source.model

        class Noted:
            path, tokenizer = source.path, source.tokenizer

            def model(self, dtype="float32"):
                dtypes.append(dtype)
                return load(dtype)

        return Noted()

    monkeypatch.setattr(evaluation, "find_model", found)
    sizes = ["--prompts", "3", "--tokens", "4", "--rounds", "2", "--dtype", "bfloat16"]
    evaluation.main([*sizes, "--json", str(tmp_path / "evaluation.json")])
    written = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert len(written["rows"]) == 2
    assert set(dtypes) == {"float32", "bfloat16"}, "adapters are made in float32, policies sampled in bfloat16"
    for row in written["rows"]:
        assert row["ratio"] == pytest.approx(row["evaluation"] / row["generation"])
        assert list(row["parts"]) == ["reference", *(f"policy-{number}" for number in range(3))]
        for side in ("evaluation", "generation"):
            own = sum(part[side] for part in row["parts"].values())
            assert own <= row[side] * (1 + 1e-9)
    assert "drawing and scoring / drawing alone: reference" in capsys.readouterr().out.replace("\n", " ")


def test_a_device_that_an_evaluation_would_not_take_is_refused(capsys):
    """It takes the one that there is; to name another would put one side elsewhere."""
    with pytest.raises(SystemExit):
        evaluation.main(["--device", "cuda" if HERE == "cpu" else "cpu"])
    assert f"an evaluation takes what it finds, which is {HERE} here" in capsys.readouterr().err
