"""The monitor warns of change that matters, once, soon, and never of noise or of what was so from the start."""

from __future__ import annotations

import io
import json
import logging
import math
import random
import re

import pytest
import tiny
import torch
from rich.console import Console

from distalign import progress
from distalign.engine import Group, score
from distalign.progress import show_logs
from distalign.report.results import read_samples
from distalign.rollout.sample import sample
from distalign.training.health import HealthSettings, Monitor, completion_metrics, write_completions

END = 0


def monitor(**settings):
    """With the default thresholds, but for these."""
    return Monitor(HealthSettings(**settings), "train rkl")


def feed(watch, *rounds, start=0):
    """Give a monitor rounds, one a step; returns what it logged of the last."""
    logged = {}
    for step, metrics in enumerate(rounds, start):
        logged = watch.update(metrics, step)
    return logged


# Numbers of completions -----------------------------------------------------------------------------------------------


def test_completion_metrics_by_hand():
    """Two responses of ten tokens, one of them a loop of two and cut; the end token is in no n-gram."""
    loop, varied = [1, 2] * 5, [*range(1, 11), END]
    found = completion_metrics([loop, varied], end_ids=(END,))
    assert found["completions/number"] == 2
    assert found["completions/mean_length"] == 10.5
    assert found["completions/clipped_ratio"] == 0.5
    # The loop has bigrams 12 and 21, the other nine, of which 12 is known: 10 of 18.
    assert found["health/distinct_2"] == pytest.approx(10 / 18)
    # Seven 4-grams in the loop, two of them different.
    assert found["health/repeated_4grams"] == pytest.approx(5 / 14)
    assert set(found) == {
        *("completions/number", "completions/mean_length", "completions/clipped_ratio"),
        *("health/distinct_2", "health/repeated_4grams"),
    }


def test_short_responses_have_no_diversity():
    """Half of them must have eight tokens before their end; an empty response has no end."""
    long, short = [*range(1, 9), END], [*range(1, 8), END]
    assert "health/distinct_2" in completion_metrics([long, short], end_ids=(END,))
    found = completion_metrics([long, short, short], end_ids=(END,))
    assert not {"health/distinct_2", "health/repeated_4grams"} & set(found)
    assert completion_metrics([[]], end_ids=(END,))["completions/clipped_ratio"] == 1
    with pytest.raises(ValueError, match="no responses"):
        completion_metrics([], end_ids=(END,))


def test_reward_and_length():
    """Perfectly correlated; left out where it is undefined or rests on few."""
    responses = [[1] * length for length in range(1, 9)]
    key = "health/reward_length_correlation"
    found = completion_metrics(responses, end_ids=(END,), rewards=torch.arange(8.0))
    assert found[key] == pytest.approx(1)
    assert key not in completion_metrics(responses, end_ids=(END,), rewards=torch.ones(8))
    assert key not in completion_metrics(responses[:7], end_ids=(END,), rewards=torch.arange(7.0))
    assert key not in completion_metrics([[1, 2]] * 8, end_ids=(END,), rewards=torch.arange(8.0))


# Warnings -------------------------------------------------------------------------------------------------------------

WELL = {
    "objective/entropy": 40.0,
    "objective/kl": 0.0,
    "logps/chosen": -100.0,
    "completions/number": 32.0,
    "completions/mean_length": 20.0,
    "completions/clipped_ratio": 0.1,
    "health/distinct_2": 0.8,
    "health/repeated_4grams": 0.05,
    "health/reward_length_correlation": 0.1,
}
ILL = {
    "entropy": (
        {"objective/entropy": 4.8},
        "entropy fell to 12% of its start: the policy is collapsing .* raise gamma",
    ),
    "repetition": ({"health/repeated_4grams": 0.7}, "70% of the 4-grams .* raise beta"),
    "distinct": ({"health/distinct_2": 0.1}, "different bigrams fell to 12% of their start"),
    "kl": ({"objective/kl": 60.0}, "KL to the reference rose by 60 nats per response: .* raise beta"),
    "chosen_logps": ({"logps/chosen": -160.0}, "preferred responses fell by 60 nats: .* displacement"),
    "missing_end": (
        {"completions/clipped_ratio": 0.9},
        "90% of the responses are cut .* rollout.max_completion_length",
    ),
    "length_correlation": ({"health/reward_length_correlation": 0.95}, r"correlation 0\.95, 0\.10 at the start"),
}


@pytest.mark.parametrize("kind", ILL)
def test_one_warning_a_kind(kind, caplog):
    """At the second round in a row beyond the threshold: what it means, what to change, the threshold; then silence."""
    change, message = ILL[kind]
    watch = monitor()
    feed(watch, WELL, WELL, WELL, {**WELL, **change}, WELL, {**WELL, **change})
    assert not caplog.records
    assert watch.collapsed is None
    feed(watch, {**WELL, **change}, {**WELL, **change}, start=6)
    (record,) = caplog.records
    assert record.name == "distalign.training.health"
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert text.startswith("train rkl, step 6: ")
    assert f"(health.{kind}: {getattr(watch.settings, kind):g})" in text
    assert re.search(message, text), text
    collapse = kind in ("entropy", "repetition", "distinct")
    assert (watch.collapsed is not None) == collapse
    assert not collapse or watch.collapsed in text


@pytest.mark.parametrize("kind", ILL)
def test_what_was_so_at_the_start_is_no_reason_to_warn(kind, caplog):
    """A base model that never ends, repeats itself, or is nearly deterministic."""
    watch = monitor()
    feed(watch, *[{**WELL, **ILL[kind][0]}] * 6)
    assert not caplog.records
    never_ends = {**WELL, "completions/clipped_ratio": 0.95, "health/repeated_4grams": 0.9, "objective/entropy": 0.2}
    watch = monitor()
    feed(watch, never_ends, *[{**never_ends, "completions/clipped_ratio": 1.0, "objective/entropy": 0.01}] * 5)
    assert not caplog.records


def test_entropy_is_taken_per_token(caplog):
    """Responses a tenth as long lose nats, not entropy; responses ten times as long hide no collapse."""
    watch = monitor()
    shorter = {**WELL, "objective/entropy": 4.0, "completions/mean_length": 2.0}
    assert feed(watch, WELL, shorter, shorter)["health/entropy_ratio"] == pytest.approx(1)
    assert not caplog.records
    longer = {**WELL, "objective/entropy": 40.0, "completions/mean_length": 200.0}
    assert feed(watch, longer, longer)["health/entropy_ratio"] == pytest.approx(0.1)
    assert watch.collapsed is not None


@pytest.mark.parametrize(("factor", "caught"), [(1 / 10, False), (1 / 300, True)])
def test_longer_responses_may_have_a_smaller_share_of_different_bigrams(factor, caught):
    """Ten times as long with as many different bigrams is no collapse; with a thirtieth of them it is."""
    longer = {**WELL, "completions/mean_length": 191.0, "objective/entropy": 400.0, "health/distinct_2": 0.8 * factor}
    watch = monitor()
    feed(watch, WELL, longer, longer)
    assert (watch.collapsed is not None) == caught


def test_numbers_to_log_and_parts_of_a_round():
    """Whatever is known is compared with its own start; numbers that are not finite are passed over."""
    watch = monitor()
    assert watch.update({"logps/chosen": -10.0}, 0) == {"health/chosen_logps_change": 0.0}
    assert watch.update({"objective/kl": math.nan, "objective/entropy": math.inf}, 1) == {}
    found = watch.update({"objective/kl": 1.0, "objective/entropy": 2.0, "completions/mean_length": 1.0}, 2)
    assert found == {"health/kl_change": 0.0, "health/entropy_ratio": 1.0}
    found = watch.update({"objective/kl": 4.0, "logps/chosen": -12.5}, 3)
    assert found == {"health/kl_change": 3.0, "health/chosen_logps_change": -2.5}


def test_the_start_of_noisy_numbers_is_the_mean_of_three_rounds():
    """Of a share; entropy starts at its first round."""
    watch = monitor()
    feed(watch, *[{**WELL, "completions/clipped_ratio": x, "objective/entropy": 100 * x} for x in (0.2, 0.6, 0.1, 0.9)])
    assert watch.start["missing_end"] == pytest.approx(0.3)
    assert watch.start["entropy"] == pytest.approx(1.0)


def test_a_run_that_goes_on_warns_as_if_it_had_not_stopped(caplog):
    """Start, rounds in a row and what has been said survive, as JSON."""
    first, ill = monitor(), {**WELL, "objective/entropy": 1.0, "objective/kl": 99.0}
    kl = {**WELL, "objective/kl": 99.0}
    feed(first, WELL, kl, kl, ill)
    assert len(caplog.records) == 1
    again = monitor()
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert again.state_dict() == first.state_dict()
    for watch in (first, again):
        caplog.clear()
        feed(watch, ill, ill, start=4)
        assert [record.getMessage().split(":")[1].strip() for record in caplog.records] == [
            "entropy fell to 2% of its start"
        ]
        assert watch.collapsed is not None
    assert again.start == first.start


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "base"])
@pytest.mark.parametrize("n", [8, 32])
def test_a_stationary_policy_raises_no_alarm(kind, n, caplog):
    """Twenty runs of 50 rounds drawn from one distribution, small rounds too: at most one warning in all."""
    source, words = random.Random(0), list(range(1, 500))
    weights = [1 / word for word in words]

    def response():
        # A base model is cut two times in three, and every second response is a loop.
        cut = kind == "base" and source.random() < 0.65
        length = 32 if cut else 1 + min(int(source.expovariate(1 / 15)), 30)
        text = source.choices(words, weights, k=length)
        if kind == "base" and source.random() < 0.5:
            text = (text[:5] * 7)[:length]
        return text if cut else [*text, END]

    for _ in range(20):
        watch = monitor()
        for step in range(50):
            responses = [response() for _ in range(n)]
            rewards = torch.tensor([0.05 * len(own) + source.gauss(0, 0.6) for own in responses])
            surprise = [sum(math.log(7.0 * token + 1) for token in own) for own in responses]
            metrics = {"objective/entropy": sum(surprise) / n, "logps/chosen": source.gauss(-200, 10)}
            watch.update(metrics | completion_metrics(responses, end_ids=(END,), rewards=rewards), step)
    assert len(caplog.records) <= 1


def test_a_reward_for_one_token_is_caught():
    """REINFORCE without KL or entropy on a tiny model: collapse is called within three rounds of entropy at a fifth."""
    model, n, token = tiny.model(), 48, 9
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    watch, entropies = monitor(), []
    for step in range(60):
        responses = sample(model, [[2, 4, 10]], n=n, max_new_tokens=12, end_id=tiny.END, seed=step)[0]
        rewards = torch.tensor([float(own.count(token)) for own in responses])
        logps = score(model, [Group([2, 4, 10], responses)]).logps
        optimizer.zero_grad()
        (-(rewards - rewards.mean()) * logps).mean().backward()
        optimizer.step()
        metrics = completion_metrics(responses, end_ids=(tiny.END,), rewards=rewards)
        entropy = -float(logps.detach().mean())
        entropies.append(entropy / metrics["completions/mean_length"])
        watch.update({"objective/entropy": entropy, **metrics}, step)
        if watch.collapsed:
            break
    assert watch.collapsed is not None
    low = next((i for i, value in enumerate(entropies) if value < 0.2 * entropies[0]), len(entropies))
    assert step <= low + 3
    assert rewards.mean() > 4


# Completions ----------------------------------------------------------------------------------------------------------


def test_completions_are_written_for_the_report(tmp_path, caplog):
    """JSON lines, appended, read by the report; the first is logged, on one line, in short."""
    path = tmp_path / "samples.jsonl"
    with caplog.at_level(logging.INFO, "distalign.training.health"):
        write_completions(path, 3, [("Hi\nthere", ["a\x1b[31mb", "ü"], [0.51234, math.nan])])
    assert [record.getMessage() for record in caplog.records] == ["step 3 (reward 0.512): Hi there → a [31mb"]
    write_completions(path, 5, [("x" * 500, ["y" * 500], None), ("z", ["w"], None)])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {"step": 3, "prompt": "Hi\nthere", "responses": ["a\x1b[31mb", "ü"], "rewards": [0.51234, None]}
    assert rows[2] == {"step": 5, "prompt": "z", "responses": ["w"]}
    found = read_samples(path)
    assert [one.note for one in found] == ["step 3", "step 5", "step 5"]
    shown = [(one.name, one.text, one.reward) for one in found[0].responses]
    assert shown[0] == ("response 1", "a\ufffd[31mb", 0.51234)  # no control characters shown
    assert shown[1][:2] == ("response 2", "ü")


def test_a_completion_is_shown_on_a_terminal(tmp_path, monkeypatch):
    """Once, markup and escape sequences of the text left without effect."""
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(progress, "CONSOLE", console)
    logger = logging.getLogger("distalign.training.health")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", False)
    show_logs(logger.name)
    texts = [("tell me", ["[red]tea[/red]\x1b[2J and " + "bread " * 100], [1.0]), ("second", ["not shown"], None)]
    write_completions(tmp_path / "samples.jsonl", 1, texts)
    shown = console.file.getvalue()
    assert "step 1 (reward 1)" in shown
    assert "tell me → [red]tea[/red] [2J and bread" in " ".join(shown.split())
    assert "…" in shown
    assert len(shown) < 450
    assert "\x1b[2J" not in shown
    assert "not shown" not in shown
