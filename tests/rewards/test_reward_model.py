"""Trained rewards in a folder: read back with identical scores, by us and by transformers."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
from test_fit import HELD, TRAIN, requests
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distalign.models.load import find_model
from distalign.rewards import (
    RewardError,
    RewardSettings,
    RewardTraining,
    check_rewards,
    load_reward,
    make_reward,
    train_reward,
)

ASKED = requests(HELD[:6])
QUICK = {"epochs": 1, "learning_rate": 1e-2, "lora": {"r": 2, "layers": 1}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A reward of every kind, trained a little and saved: folder, scores, results, and the base."""
    home = tmp_path_factory.mktemp("rewards")
    source = find_model(str(tiny.save(home / "base")))
    base = source.model().requires_grad_(False)
    found = {}
    for init in ("policy", "scratch"):
        for backbone in ("frozen", "lora", "full"):
            folder = home / f"{init}-{backbone}"
            settings = RewardTraining(init=init, backbone=backbone, **({} if backbone == "frozen" else QUICK))
            trained = train_reward(
                settings,
                base,
                source.tokenizer(),
                source,
                TRAIN,
                HELD,
                gamma=0.3,
                token_budget=256,
                seed=0,
                folder=folder,
            )
            found[init, backbone] = (folder, trained.reward(ASKED), trained)
    return found, base


KINDS = [(init, backbone) for init in ("policy", "scratch") for backbone in ("frozen", "lora", "full")]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_saved_reward_reads_back_identically(saved, kind):
    """Through load_reward and through a recipe that names the folder as its model."""
    (folder, scores, _), base = saved[0][kind], saved[1]
    loaded = load_reward(folder, base=base, tokenizer=tiny.tokenizer(), token_budget=256)
    torch.testing.assert_close(loaded(ASKED), scores, rtol=1e-5, atol=1e-5)
    settings = [RewardSettings(model=str(folder))]
    check_rewards(settings, conversational=True)
    reward = make_reward(settings, base=base, tokenizer=tiny.tokenizer(), token_budget=256)
    torch.testing.assert_close(reward(ASKED), scores, rtol=1e-5, atol=1e-5)
    assert float(scores.std()) > 0.01


@pytest.mark.parametrize("backbone", ["frozen", "lora", "full"])
def test_transformers_reads_a_scratch_reward(saved, backbone):
    """AutoModelForSequenceClassification (PEFT for an adapter) gives the same scores on the same ids, padded or not."""
    (folder, scores, _), _ = saved[0]["scratch", backbone], saved[1]
    if backbone == "lora":
        from peft import AutoPeftModelForSequenceClassification

        model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
        model.config.pad_token_id = AutoTokenizer.from_pretrained(folder).pad_token_id
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    sequences = [request.prompt + response for request in ASKED for response in request.responses]
    width, pad = max(map(len, sequences)), model.config.pad_token_id
    ids = torch.tensor([own + [pad] * (width - len(own)) for own in sequences])
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=(ids != pad).long()).logits[:, 0]
    torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-5)
    assert pad not in {token for own in sequences for token in own}


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_the_folder_tells_what_it_is(saved, kind):
    """results.json holds every number with its error and count; the card says so too; no pickles."""
    folder, _, trained = saved[0][kind]
    results = json.loads((folder / "results.json").read_text())
    assert results["n_train"] == len(TRAIN)
    assert results["held_out"]["nll"] == trained.results["nll"]._asdict()
    assert set(results["held_out"]) == {"accuracy", "nll", "ece", "start_nll"}
    assert all(set(value) == {"mean", "se", "n"} for value in results["held_out"].values())
    assert any("evidence" in row for row in results["history"])
    assert any("epoch" in row for row in results["history"]) == (kind[1] != "frozen")
    card = (folder / "README.md").read_text()
    assert f"| nll | {trained.results['nll'].mean:.4f} ± {trained.results['nll'].se:.4f} | 40 |" in card
    assert "With lora and full the same pairs decided when to stop" in card
    assert f"- backbone: {kind[1]}" in card
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    assert trained.results["start_nll"].mean == pytest.approx(math.log(2)) or kind[0] == "policy"


@pytest.mark.parametrize("kind", [("policy", "frozen"), ("scratch", "frozen")], ids="-".join)
def test_another_model_or_tokenizer_is_noticed(saved, kind, tmp_path):
    """ln π₀ or the hidden states of another base, or ids of another tokenizer, would be silently wrong."""
    folder = saved[0][kind][0]
    torch.manual_seed(5)
    other = tiny.model()
    for parameter in other.parameters():
        parameter.data.normal_(std=0.2)
    with pytest.raises(RewardError, match=r"belongs to .*base: load that, or train again"):
        load_reward(folder, base=other.requires_grad_(False), tokenizer=tiny.tokenizer())
    tokens = tiny.tokenizer()
    tokens.add_tokens(["more"])
    with pytest.raises(RewardError, match="which are not the policy's"):
        load_reward(folder, base=saved[1], tokenizer=tokens)


def test_a_folder_that_is_incomplete_is_refused(saved, tmp_path):
    """No mark, or no weights."""
    with pytest.raises(RewardError, match="cannot be read"):
        load_reward(tmp_path, base=saved[1], tokenizer=tiny.tokenizer())
    folder = saved[0]["policy", "frozen"][0]
    (tmp_path / "reward.json").write_text((folder / "reward.json").read_text())
    with pytest.raises(RewardError, match=r"cannot be read .*; train it again"):
        load_reward(tmp_path, base=saved[1], tokenizer=tiny.tokenizer())


def test_a_family_without_a_classifier_is_refused_before_training():
    """init: scratch needs a sequence-classification class with the same trunk; init: policy does not."""
    from engine_models import build

    base = build("granite").requires_grad_(False)
    made_of = (RewardTraining(init="scratch"), base, tiny.tokenizer(), find_model("a/b"), TRAIN, HELD)
    with pytest.raises(RewardError, match="granite has no sequence-classification class"):
        train_reward(*made_of, gamma=0.3, token_budget=99, seed=0)
