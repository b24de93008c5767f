"""A round comes back as it was; rewards of responses without an end follow the rule."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

from distalign.training.checkpoint import load_round, save_round
from distalign.training.health import HealthSettings
from distalign.training.rollout_settings import MissingEnd, RolloutSettings
from distalign.training.rounds import Round, apply_missing_end


def a_round(**changes):
    """Three prompts with two, one and three responses; one of them is empty."""
    settings = {
        "number": 4,
        "position": 3,
        "indices": [7, 2, 19],
        "prompts": [[5, 6], [7], [8, 9, 10]],
        "responses": [[[1, 2], [3]], [[4, 4, 4]], [[], [2], [1, 1]]],
        "tensors": {
            "rewards": torch.randn(6, dtype=torch.float64),
            "behavior_token_logps": torch.randn(6, 3),
            "ended": torch.tensor([True, False, True, True, False, False]),
            "labels": torch.tensor([2**40, -1, 0, 1, 2, 3]),
            "half": torch.randn(6, 2).bfloat16(),
        },
        **changes,
    }
    return Round(**settings)


def test_a_round_comes_back_exactly(tmp_path):
    """Every id, every bit of every tensor of any type, NaN and infinity included."""
    first = a_round()
    first.tensors["rewards"][:2] = torch.tensor([float("nan"), -float("inf")])
    save_round(first, tmp_path)
    again = load_round(tmp_path)
    assert list(again.tensors.keys() ^ first.tensors.keys()) == []
    for name, tensor in first.tensors.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert torch.equal(again.tensors[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name
    for name in ("number", "position", "indices", "prompts", "responses"):
        assert getattr(again, name) == getattr(first, name)


def test_an_empty_round_comes_back(tmp_path):
    """No prompts, no tensors: still a round."""
    save_round(Round(0, 0, [], [], []), tmp_path)
    assert load_round(tmp_path) == Round(0, 0, [], [], [])


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path):
    """Two files, with what was saved last; tensors that share memory or hold a gradient are no obstacle."""
    whole = torch.randn(12, requires_grad=True)
    first = a_round(tensors={"a": whole[:6], "b": whole[3:9], "c": whole[::2]})
    save_round(a_round(), tmp_path)
    save_round(first, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"rollout.json", "rollout.safetensors"}
    again = load_round(tmp_path)
    assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in "abc")


def test_rows_of_a_prompt_are_found():
    """They select its responses."""
    own = a_round()
    assert [own.rows(i) for i in range(3)] == [slice(0, 2), slice(2, 3), slice(3, 6)]
    assert len(own) == 3


@pytest.mark.parametrize(
    ("rule", "expected"), [("none", [1.0, -2.0, 3.0]), ("penalty", [1.0, -3.5, 3.0]), ("replace", [1.0, -1.5, 3.0])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_missing_end_rule(rule, expected, dtype):
    """Only the response without an end is touched; what was given stays."""
    rewards, ended = torch.tensor([1.0, -2.0, 3.0], dtype=dtype), torch.tensor([True, False, True])
    found = apply_missing_end(rewards, ended, MissingEnd(rule=rule, value=-1.5))
    assert found.tolist() == expected
    assert found.dtype == dtype
    assert rewards.tolist() == [1.0, -2.0, 3.0]


def test_the_documentation_is_true():
    """The snippet of docs/rollouts.md gives what it shows."""
    page = Path(__file__).parents[2] / "docs" / "rollouts.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 5
    assert result.failed == 0


def test_the_documentation_names_every_setting_with_its_default():
    """The tables of docs/rollouts.md and the sections of a recipe agree."""
    page = (Path(__file__).parents[2] / "docs" / "rollouts.md").read_text(encoding="utf-8")
    for section in (RolloutSettings, HealthSettings):
        for name, field in section.model_fields.items():
            assert f"{name}`" in page or f"`{name}:" in page, name
            if isinstance(field.default, float) and section is HealthSettings:
                assert f"| `{name}` | {field.default:g} |" in page, name
