"""The algorithm in plain torch and the trainer take the same steps."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import acting
import pytest
import tiny
import torch
from test_trainer import parameters, trainer

from distalign.methods import PMLE, RKL

PATH = Path(__file__).parents[2] / "examples" / "from_scratch.py"
GAMMA, BETA, RATE = 0.5, 0.3, 1e-2


@pytest.fixture(scope="module")
def scratch():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("from_scratch", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flat(model):
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_pmle_is_the_trainers(scratch, tmp_path):
    """Three SGD steps on eight pairs: the same weights and the same losses."""
    pairs = tiny.encoded_pairs(8)
    made = trainer(tmp_path, PMLE(GAMMA, 0.0), pairs, max_steps=3, learning_rate=RATE)
    model = copy.deepcopy(made.model)
    made.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    batch = [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    losses = [scratch.pmle_step(model, optimizer, batch, gamma=GAMMA) for _ in range(3)]
    torch.testing.assert_close(flat(model), parameters(made), rtol=1e-4, atol=1e-5)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in logged if "loss" in line] == pytest.approx(losses, rel=1e-4)


def test_rkl_is_the_trainers(scratch, tmp_path):
    """Two rounds on the responses that the trainer drew: the same weights."""
    made = acting.trainer(tmp_path, RKL(GAMMA, BETA), max_steps=2, optim="sgd", learning_rate=RATE)
    model, reference = copy.deepcopy(made.model), copy.deepcopy(made.model)
    rounds = []
    draw_round = made.worker.draw_round

    def keep(*args):
        draw_round(*args)
        rounds.append(made.worker.round)

    made.worker.draw_round = keep
    made.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for drawn in rounds:
        responses = {tuple(prompt): own for prompt, own in zip(drawn.prompts, drawn.responses, strict=True)}
        worth = dict(
            zip([(*p, *r) for p, own in responses.items() for r in own], drawn.tensors["rewards"], strict=True)
        )
        scratch.rkl_step(
            model,
            reference,
            optimizer,
            drawn.prompts,
            draw=lambda prompt, responses=responses: responses[tuple(prompt)],
            reward=lambda prompt, response, worth=worth: float(worth[(*prompt, *response)]),
            gamma=GAMMA,
            beta=BETA,
        )
    assert len(rounds) == 2
    torch.testing.assert_close(flat(model), parameters(made), rtol=1e-4, atol=1e-5)


def test_it_runs_on_a_file_of_pairs(scratch, tiny_folder, tmp_path, capsys):
    """As its first lines say, both methods one after the other."""
    tiny.write_pairs(tmp_path / "pairs.jsonl")
    rows = (tmp_path / "pairs.jsonl").read_text().splitlines()[:10]
    plain = [row for row in map(json.loads, rows) if isinstance(row["prompt"], str)] or [
        {"prompt": "tell me", "chosen": "a warm tale", "rejected": "a cold tale"}
    ]
    (tmp_path / "plain.jsonl").write_text("\n".join(json.dumps(row) for row in plain))
    torch.manual_seed(0)
    scratch.main(str(tiny_folder), str(tmp_path / "plain.jsonl"))
    printed = capsys.readouterr().out
    assert "PMLE: loss" in printed
    assert "RKL: loss" in printed
