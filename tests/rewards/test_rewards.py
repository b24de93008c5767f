"""Rewards: what each kind is asked, what it must answer, and how it refuses."""

from __future__ import annotations

import copy
import math
import re
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from distalign.data import Prompt
from distalign.engine import score
from distalign.rewards import (
    ExactReward,
    FunctionReward,
    Request,
    Reward,
    RewardError,
    RewardSettings,
    check_rewards,
    make_reward,
)

CHAT = Prompt([{"role": "user", "content": "tell me"}], extra={"weight": 2})
REQUESTS = [
    Request([2, 4, 16, 17, 3, 2, 5], [[7, 8, tiny.END], [9, 10, 11, 12]], CHAT),
    Request([2, 4, 15, 3, 2, 5], [[8, tiny.END]], Prompt([{"role": "user", "content": "sun"}], extra={"topic": "sky"})),
]
PARTS = {"tokenizer": tiny.tokenizer(), "token_budget": 64}


@pytest.fixture
def write(tmp_path):
    """Write a module and give the name of its function `f`."""

    def make(body: str, signature: str = "prompts, completions, **columns") -> str:
        path = tmp_path / "mine.py"
        path.write_text(f"import math, time\nimport torch\n\ndef f({signature}):\n    {body}\n")
        return f"{path}:f"

    return make


def function(name: str, timeout: float = 5.0) -> FunctionReward:
    """A function as a reward."""
    return FunctionReward(name, tiny.tokenizer(), timeout=timeout)


def test_a_request_has_something_to_reward():
    """Empty prompts, no responses and empty responses are refused where they are made."""
    for prompt, responses in (([], [[1]]), ([1], []), ([1], [[2], []])):
        with pytest.raises(ValueError, match="leave it out"):
            Request(prompt, responses)


def test_the_exact_reward_is_gamma_times_the_log_probability():
    """In order, whatever the batches; float32 constants on the CPU."""
    model = tiny.model()
    reward = ExactReward(model, gamma=0.3, token_budget=8)
    found = reward(REQUESTS)
    with torch.no_grad():
        expected = 0.3 * score(model, [r.group for r in REQUESTS]).logps
    torch.testing.assert_close(found, expected.float())
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert isinstance(reward, Reward)


def test_a_function_is_called_as_trl_calls_it(write):
    """Flat lists, one entry a response: chats, one assistant message, repeated columns, None where a row has none."""
    reward = function(write("f.seen = dict(prompts=prompts, completions=completions, **columns); return [1, 2.5, -1]"))
    assert reward(REQUESTS).tolist() == [1.0, 2.5, -1.0]
    seen = reward.function.function.seen
    assert seen["prompts"] == [CHAT.prompt, CHAT.prompt, REQUESTS[1].row.prompt]
    texts = [tiny.tokenizer().decode(ids, skip_special_tokens=True) for r in REQUESTS for ids in r.responses]
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in texts]
    assert seen["weight"] == [2, 2, None]
    assert seen["topic"] == [None, None, "sky"]
    assert seen["completion_ids"] == [ids for r in REQUESTS for ids in r.responses]


def test_what_a_function_changes_is_its_own(write):
    """The next round's prompts and columns are those of the data."""
    before = copy.deepcopy(REQUESTS)
    change = "[prompt.append(1) for prompt in prompts if isinstance(prompt, list)]; columns['weight'][0] = 7"
    function(write(f"{change}; return [1, 2, 3]"))(REQUESTS)
    assert [request.row for request in REQUESTS] == [request.row for request in before]


def test_what_a_function_changes_is_one_responses(write):
    """Two responses to one prompt have each their prompt and columns, and the ids of a round stay."""
    change = "prompts[0].extend(completions[0]); columns['tags'][0].append(1); columns['completion_ids'][0].clear()"
    requests = [Request([5], [[7, 8], [9]], Prompt(CHAT.prompt, extra={"tags": []}))]
    found = function(write(f"{change}; return [len(p) + len(t) for p, t in zip(prompts, columns['tags'])]"))(requests)
    assert found.tolist() == [3.0, 1.0]
    assert requests[0].responses == [[7, 8], [9]]


def test_rows_without_text_are_decoded(write):
    """Ids alone become strings, without special tokens; string rows stay strings."""
    reward = function(
        write("return [float(len(p.split()) + 10 * len(c.split())) for p, c in zip(prompts, completions)]")
    )
    assert reward([Request([2, 4, 15, 3], [[7, 8, tiny.END]])]).tolist() == [22.0]
    assert reward([Request([4], [[7]], Prompt("tell me more"))]).tolist() == [13.0]


def test_a_function_gets_the_columns_that_it_names(write):
    """Without ** nothing else is passed; tensors, numpy numbers and bools of one value are numbers."""
    body = "return [torch.tensor(1.5), torch.tensor([2.0])[0].numpy(), True]"
    assert function(write(body, "completions, weight"))(REQUESTS).tolist() == [1.5, 2.0, 1.0]
    assert function(write("return torch.ones(len(completions))", "completions, other=None"))(REQUESTS).sum() == 3


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("return 1 / 0", "it raised ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "it raised SystemExit: 3"),
        ("return [1.0]", "1 numbers for 3 completions"),
        ("return [1.0, None, 2.0]", "answer to completion 1 is None"),
        ("return [1.0, 2.0, math.nan]", "answer to completion 2 is nan"),
        ("return [math.inf, 2.0, 1.0]", "answer to completion 0 is inf"),
        ("return torch.tensor([1.0, math.nan, 2.0])", "answer to completion 1 is nan"),
        ("return torch.ones(3, 2)", "answer to completion 0 is tensor"),
        ("return ['1', 2.0, 1.0]", "answer to completion 0 is '1'"),
        ("return 1.0", "returned a float"),
        ("return 'abc'", "returned a str"),
        ("return None", "returned a NoneType"),
        ("time.sleep(20)", "no answer after 0.2 s"),
    ],
)
def test_a_function_that_fails_says_how(write, body, found):
    """Which function, what was found; the original exception is chained; nothing waits for it."""
    name, started = write(body), time.monotonic()
    with pytest.raises(RewardError) as caught:
        function(name, timeout=0.2 if "sleep" in body else 5.0)(REQUESTS)
    assert name in str(caught.value)
    assert found in str(caught.value)
    assert "; " in str(caught.value)
    assert time.monotonic() - started < 4
    raised = "it raised" in found
    assert (caught.value.__cause__ is not None) == raised


def test_a_column_that_no_row_has_is_named(write):
    """A function that needs it cannot be called."""
    with pytest.raises(RewardError, match=r"it needs truth, and the rows have no such column \(found weight, topic\)"):
        function(write("return []", "completions, truth"))(REQUESTS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_colon", "write file.py:function"),
        ("missing.py:f", "there is no file missing.py"),
        ("no.such.module:f", "importing no.such.module raised ModuleNotFoundError"),
        ("math:sqart", 'no function "sqart"'),
        ("math:pi", 'no function "pi"'),
        ("textwrap:dedent", r"it takes \(text\); write it as \(prompts, completions"),
    ],
)
def test_a_function_that_cannot_be_found_is_refused(name, message):
    """Before anything else is done."""
    with pytest.raises(RewardError, match=message):
        check_rewards([RewardSettings(function=name)], conversational=True)


def test_a_module_that_raises_or_is_async_is_refused(tmp_path):
    """With the reason and, for a misspelt name, the nearest."""
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "odd.py").write_text("async def f(completions, **k): ...\n\ndef rewards(completions): ...\n")
    for name, message in (
        ("bad.py:f", "ModuleNotFoundError"),
        ("odd.py:f", "it is async"),
        ("odd.py:reward", 'did you mean "rewards"'),
    ):
        with pytest.raises(RewardError, match=message):
            check_rewards([RewardSettings(function=f"{tmp_path}/{name}")], conversational=False)


def test_several_rewards_are_summed_with_their_weights(write):
    """R = 0.5 f − 2 γ ln π*."""
    base = tiny.model()
    settings = [RewardSettings(function=write("return [1, 2, 3]"), weight=0.5), RewardSettings(exact=True, weight=-2.0)]
    check_rewards(settings, conversational=True, target=True, gamma=True)
    reward = make_reward(settings, base=base, target=base, gamma=0.3, **PARTS)
    exact = ExactReward(base, gamma=0.3, token_budget=64)(REQUESTS)
    torch.testing.assert_close(reward(REQUESTS), 0.5 * torch.tensor([1.0, 2.0, 3.0]) - 2 * exact)


def test_a_single_weight_counts_and_equal_kinds_are_summed(write):
    """One reward with a weight is scaled; two functions are summed."""
    one = RewardSettings(function=write("return [1, 2, 3]"), weight=-1.0)
    assert make_reward([one], base=tiny.model(), **PARTS)(REQUESTS).tolist() == [-1.0, -2.0, -3.0]
    two = make_reward([one, one], base=tiny.model(), **PARTS)
    assert two(REQUESTS).tolist() == [-2.0, -4.0, -6.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "none is given"),
        ([RewardSettings(exact=True)], "only a known target"),
        ([RewardSettings(train=True)], "needs gamma; set reward.train.gamma"),
        ([RewardSettings(train={"gamma": 1.0})] * 2, "train one"),
    ],
)
def test_what_cannot_work_is_refused_before_any_weights(settings, message):
    """By reading the settings alone."""
    with pytest.raises(RewardError, match=message):
        check_rewards(settings, conversational=True)


def test_what_is_missing_when_it_is_made_is_named():
    """A reward to be trained, and a target, must be there."""
    for settings, message in (
        (RewardSettings(train=True), "no reward was trained"),
        (RewardSettings(exact=True), "known"),
    ):
        with pytest.raises(RewardError, match=message):
            make_reward([settings], base=tiny.model(), **PARTS)


def test_a_model_whose_rewards_are_no_numbers_is_refused():
    """Not passed on to training."""
    model = tiny.model()
    model.lm_head.weight.data[8] = math.nan
    with pytest.raises(RewardError, match=r"reward exact: 3 of 3 rewards are not finite.*first response 0 \(nan\)"):
        ExactReward(model, gamma=1.0, token_budget=64)(REQUESTS)


def test_the_example_of_a_function_runs():
    """examples/custom_reward.py, with and without its column."""
    path = Path(__file__).parents[2] / "examples" / "custom_reward.py"
    settings = [RewardSettings(function=f"{path}:brief_and_on_topic")]
    check_rewards(settings, conversational=True)
    reward = make_reward(settings, base=tiny.model(), **PARTS)
    ask = Prompt([{"role": "user", "content": "happy kind"}], extra={"max_words": 1})
    plain = Prompt("happy kind")
    ids = [[7, 8, 9, tiny.END]]
    assert reward([Request([5], ids, ask)]).tolist() == pytest.approx([1.0 - 0.2])
    assert reward([Request([5], ids, plain)]).tolist() == [1.0]


def test_the_blocks_of_the_docs_are_settings():
    """Every reward that docs/rewards.md shows is accepted by the recipe."""
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    shown = [
        one for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) for one in yaml.safe_load(block)["reward"]
    ]
    kinds = [RewardSettings(**one) for one in shown]
    assert len(kinds) == 5
    assert sum(one.exact for one in kinds) == sum(one.train is not None for one in kinds) == 1
