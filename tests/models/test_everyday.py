"""The small language model that is trained on the spot: its text, its tokenizer, its folder."""

from __future__ import annotations

import math

import pytest
import torch

from distalign.data import Prompt, encode_prompt, end_token_id
from distalign.models import everyday
from distalign.models.load import cache_dir, find_model


def test_its_text_is_questions_with_short_answers():
    """A few hundred kB: what ships with the package."""
    rows = [line.split("\t") for line in everyday.answers().splitlines()]
    assert len(rows) > 3000
    assert all(len(row) == 2 and 10 < len(row[1]) < 120 for row in rows)
    assert 300 < len({question for question, _ in rows}) < 340


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The model of some lines, a small vocabulary and one epoch."""
    text = "\n".join(everyday.answers().splitlines()[:320])
    monkeypatch.setattr(everyday, "answers", lambda: text)
    monkeypatch.setattr(everyday, "VOCABULARY", 320)
    monkeypatch.setattr(everyday, "EPOCHS", 2)
    monkeypatch.setenv("DISTALIGN_CACHE", str(tmp_path))


def test_it_is_trained_once_and_chats(small):
    """Found by its name; a question is a chat that its end token ends; it has learned something of its text."""
    state = torch.get_rng_state()
    source = find_model("everyday")
    assert torch.equal(torch.get_rng_state(), state)
    tokenizer, model = source.tokenizer(), source.model()
    prompt = encode_prompt(tokenizer, Prompt([{"role": "user", "content": "How do I boil an egg?"}]))
    assert tokenizer.decode(prompt) == "<s>How do I boil an egg?\n"
    assert end_token_id(tokenizer, conversational=True) == tokenizer.eos_token_id
    ids = torch.tensor([[*prompt, *tokenizer("Boil it in a pot of water.").input_ids]])
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=ids).loss) < 0.9 * math.log(320)
    made = [path.stat().st_mtime_ns for path in cache_dir().rglob("*.safetensors")]
    assert find_model("everyday").path == source.path
    assert [path.stat().st_mtime_ns for path in cache_dir().rglob("*.safetensors")] == made
    assert len(list(cache_dir().iterdir())) == 1
