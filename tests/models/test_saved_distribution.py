"""The saved policy is the trained one: its temperature, its ends, its card; what goes to the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub.errors import HTTPError
from transformers import AutoModelForCausalLM

from distalign import PMLE, RKL, AlignmentConfig, AlignmentTrainer
from distalign.engine import Group, score_in_batches
from distalign.evaluation.answers import content_key, draw_answers, load_answers
from distalign.evaluation.setup import load_evaluation, load_setup
from distalign.models.card import add_licence
from distalign.models.policy import trained_temperature
from distalign.training.rollout_settings import TrainingError

ROWS = [{"prompt": p, "chosen": " happy tea", "rejected": " cold bad rain"} for p in tiny.prompts(8)]


def trainer(folder, method, **settings):
    """One step of two prompts on the tiny model."""
    args = AlignmentConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, max_completion_length=4, token_budget=512,
        use_cpu=True, **settings,
    )  # fmt: skip
    reward = (lambda completions, **_: [float(len(one)) for one in completions]) if method.needs.reward else None
    model = AutoModelForCausalLM.from_pretrained(tiny.save(folder.parent / "base"))
    model.generation_config.update(do_sample=True, top_k=5, eos_token_id=[tiny.END, 7])
    return AlignmentTrainer(model, method, args, ROWS, processing_class=tiny.tokenizer(), reward_funcs=reward)


def test_the_temperature_is_saved_said_and_evaluated_with(tmp_path, caplog):
    """softmax(z/T) was trained: generate draws from it, and evaluate measures it, unless told otherwise."""
    run = trainer(tmp_path / "run", RKL(gamma=0.5), temperature=0.5)
    run.train()
    run.save_model(str(tmp_path / "model"))
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert [saved[name] for name in ("do_sample", "temperature", "top_p", "top_k")] == [True, 0.5, 1.0, 0]
    assert saved["eos_token_id"] == [tiny.END, 7]
    assert "temperature 0.5, top_p 1, top_k 0" in (tmp_path / "model" / "README.md").read_text()
    assert trained_temperature(str(tmp_path / "model")) == 0.5
    assert trained_temperature(str(tmp_path / "base")) is None
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in ROWS))
    settings = {"name": "t", "model": str(tmp_path / "base"), "prompts": str(prompts), "max_new_tokens": 4}
    evaluation = load_evaluation({**settings, "policies": {"mine": str(tmp_path / "model")}})
    setup = load_setup(evaluation)
    assert setup.settings.temperature == 0.5
    # What it says of pairs, too, and the γ that fits it.
    pairs = [Group(row.prompt, [row.prompt[:2], row.prompt[:1]]) for row in run.rows[:3]]
    answers = draw_answers(setup, "mine", "key", pairs)
    measured = score_in_batches(setup.policy("mine"), pairs, token_budget=512, temperature=0.5).logps
    assert answers.pair_logps.flatten().tolist() == pytest.approx(measured.tolist())
    # And what it is compared with.
    base = score_in_batches(setup.base, pairs, token_budget=512, temperature=0.5).logps
    answers.save(tmp_path / "kept")
    kept = load_answers(tmp_path / "kept", "mine", "key")
    for one in (answers, kept):
        assert one.reference_pair_logps.flatten().tolist() == pytest.approx(base.tolist())
    # Where a response ends is a part of what is kept.
    before = content_key(setup, "mine", pairs)
    ends = tmp_path / "model" / "generation_config.json"
    ends.write_text(ends.read_text().replace(f"{tiny.END}", "9"))
    assert content_key(setup, "mine", pairs) != before
    other = load_evaluation({**settings, "policies": {"mine": str(tmp_path / "model")}, "temperature": 1.0})
    assert load_setup(other).settings.temperature == 1.0
    assert "mine at 0.5" in caplog.text


def test_pairs_are_learned_at_temperature_one(tmp_path):
    """Whatever the base samples with."""
    run = trainer(tmp_path / "run", PMLE(gamma=0.5, beta=0.0), temperature=0.7)
    run.train()
    run.save_model(str(tmp_path / "model"))
    assert trained_temperature(str(tmp_path / "model")) == 1.0


def test_the_kept_model_goes_to_the_hub_once(tmp_path, monkeypatch):
    """With card and sampling settings; no checkpoint, no samples, no pickle."""
    made = type("Repository", (), {"repo_id": "me/mine"})
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: made)
    sent = []

    def upload(self, *, repo_id, folder_path, **_):
        model = AutoModelForCausalLM.from_pretrained(folder_path)
        sent.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir()), model))

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    settings = {"push_to_hub": True, "hub_model_id": "mine", "save_strategy": "steps", "save_steps": 1}
    run = trainer(tmp_path / "run", PMLE(gamma=0.5, beta=0.0), **settings)
    run.train()
    assert not sent
    run.save_model(str(tmp_path / "model"))
    ((name, files, model),) = sent
    assert name == "me/mine"
    assert {"README.md", "generation_config.json", "model.safetensors"} <= set(files)
    assert not [file for file in files if file.endswith((".bin", ".pt", ".jsonl")) or "checkpoint" in file]
    trained = run.policy.model.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())
    with pytest.raises(TrainingError, match="hub_strategy is"):
        trainer(tmp_path / "other", PMLE(gamma=0.5, beta=0.0), push_to_hub=True, hub_strategy="every_save")


def failing(error):
    """A call that fails so."""

    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("error", [OSError("no route"), HTTPError("refused")], ids=str)
def test_a_hub_that_does_not_answer_is_named_before_training(tmp_path, monkeypatch, error):
    """Not after hours."""
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", failing(error))
    with pytest.raises(TrainingError, match="the hub makes no repository"):
        trainer(tmp_path / "run", PMLE(gamma=0.5, beta=0.0), push_to_hub=True)


def test_the_licence_of_the_base_is_the_models(tmp_path):
    """Where its folder names one."""
    (tmp_path / "base").mkdir()
    card = tmp_path / "README.md"
    card.write_text("---\nlibrary_name: transformers\n---\n\n# A model\n")
    add_licence(card, str(tmp_path / "base"))
    assert "license" not in card.read_text()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A base\n")
    add_licence(card, str(tmp_path / "base"))
    assert "license: apache-2.0" in card.read_text()
    assert "# A model" in card.read_text()
