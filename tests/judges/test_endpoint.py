"""A judge behind an endpoint, against a server that fails in every way: nothing lost, nothing asked twice."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
from judge_server import CUT, DRIP, MALFORMED, SLOW, Server, better, comparisons, faults

from distalign.judges import BudgetError, Comparison, EndpointError, EndpointJudge, EndpointSettings


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def judge(tmp_path):
    """Makes a judge for a server, with a cache of this test."""

    def make(server: Server, **settings) -> EndpointJudge:
        given = {"cache": str(tmp_path / "cache.jsonl"), "timeout": 5.0, "backoff": 0.01} | settings
        return EndpointJudge(EndpointSettings(url=server.url, model="m", **given))

    return make


def expected(n: int) -> list[float]:
    """What `better` says of `comparisons(n)`."""
    return [1.0 - i % 2 for i in range(n)]


def run_with(share: float, cache: Path):
    """200 comparisons through a server that fails this share of the requests: server, judge, judgements, seconds."""
    with Server(faults(share), latency=0.05) as server:
        made = EndpointJudge(EndpointSettings(url=server.url, model="m", cache=str(cache), timeout=4.0, backoff=0.02))
        started = time.monotonic()
        return server, made, made(comparisons(200)), time.monotonic() - started


@pytest.mark.slow
def test_a_fifth_of_the_requests_fail_and_nothing_is_lost_or_judged_twice(tmp_path):
    """200 judgements from 400 answers, none sent again after it was answered; two timeouts more than twice as long."""
    _, _, plain, fault_free = run_with(0.0, tmp_path / "plain.jsonl")
    server, made, found, seconds = run_with(0.2, tmp_path / "faults.jsonl")
    assert [one.probability for one in found] == expected(200) == [one.probability for one in plain]
    assert len(server.answered) == 400
    assert set(server.answered.values()) == {1}
    counters = made.counters()
    assert counters["requests"] == sum(server.asked.values()) > 460
    assert counters["answered"] == 400
    failed = {key: value for key, value in counters.items() if key.startswith("failed/")}
    assert failed == {
        **{f"failed/HTTP {status}": server.acted[status] for status in (429, 500)},
        "failed/timeout": server.acted[SLOW],
        "failed/connection": server.acted[CUT],
        "failed/malformed": server.acted[MALFORMED],
    }
    assert seconds < 2 * fault_free + 8


def test_a_killed_run_asks_only_what_is_missing(tmp_path, judge):
    """After SIGKILL in the middle, every answer that was given is on disk and none is asked for again."""
    script = """
        import sys
        sys.path[:0] = [{tests!r}]
        from judge_server import comparisons
        from distalign.judges import EndpointJudge, EndpointSettings
        EndpointJudge(EndpointSettings(url={url!r}, model="m", cache={cache!r}, concurrency=4))(comparisons(100))
    """
    cache = tmp_path / "cache.jsonl"
    with Server(latency=0.02) as server:
        code = textwrap.dedent(script.format(tests=str(Path(__file__).parents[1]), url=server.url, cache=str(cache)))
        process = subprocess.Popen([sys.executable, "-c", code])
        try:
            while sum(server.answered.values()) < 60:
                assert process.poll() is None
                time.sleep(0.005)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        kept = len(cache.read_bytes().splitlines())
        assert 50 < kept < 150
        before = sum(server.answered.values())
        # What was under way when the process died was answered to nobody; at most 4 were.
        assert kept >= before - 4
        asked = sum(server.asked.values())
        made = judge(server)
        assert [one.probability for one in made(comparisons(100))] == expected(100)
        assert sum(server.asked.values()) - asked == 200 - kept == made.counters()["requests"]
        assert made.counters()["cached"] == kept


def test_equal_questions_are_asked_once(judge):
    """The same comparison twice, and swapped, is two requests; equal responses are a tie and none."""
    first, second = comparisons(2)
    swapped = replace(first, first=first.second, second=first.first)
    same = Comparison("question", "quality 5", "quality 5")
    seen = []
    with Server() as server:
        made = judge(server)
        found = made([first, second, first, swapped, same], lambda done, total: seen.append((done, total)))
        assert sum(server.asked.values()) == 4
        assert made([second])[0].probability == 0
        assert sum(server.asked.values()) == 4
    assert [one.probability for one in found] == [1, 0, 1, 0, 0.5]
    assert found[0].answers == ("A", "B")
    assert found[0].tokens == 200
    assert seen[-1] == (5, 5)
    assert seen == sorted(seen)
    assert made.counters()["identical"] == 1


@pytest.mark.parametrize(
    ("answers", "probability", "first_position"),
    [
        ("AB", 1.0, 0.5),
        ("BA", 0.0, 0.5),
        ("AA", 0.5, 1.0),
        ("BB", 0.5, 0.0),
        (["A", "TIE"], 0.5, 1.0),
        (["TIE", "TIE"], 0.5, None),
    ],
)
def test_both_orders_cancel_position_bias(judge, answers, probability, first_position):
    """A verdict holds if both orders agree; a judge that prefers a position gives ties, and its bias is told."""

    def answer(question: str) -> str:
        return answers[0] if question.index("quality 5") < question.index("quality 0") else answers[1]

    with Server(answer=answer) as server:
        made = judge(server)
        (found,) = made(comparisons(1))
    assert found.probability == probability
    assert found.answers == tuple(answers)
    assert not found.unparsable
    assert made.counters()["contradictory"] == (answers in ("AA", "BB"))
    assert made.counters().get("first_position") == first_position


def test_unparsable_answers_are_asked_for_once_more_and_counted(judge):
    """A sterner question helps some; what it does not help is a tie that is marked."""

    def answer(question: str) -> str | None:
        number = int(question.split("question ")[1].split()[0])
        if number == 0 or (number == 1 and "could not be read" in question):
            return better(question)
        return None if number == 3 else "I prefer A."

    with Server(answer=answer) as server:
        made = judge(server)
        found = made(comparisons(4))
        assert sum(server.asked.values()) == 2 + 3 * 4
        again = judge(server)
        assert again(comparisons(4)) == found
        assert sum(server.asked.values()) == 2 + 3 * 4
    assert [one.probability for one in found] == [1, 0, 0.5, 0.5]
    assert [one.unparsable for one in found] == [False, False, True, True]
    assert found[2].answers == ("I prefer A.", "I prefer A.")
    assert [one.tokens for one in found] == [200, 400, 400, 400]
    assert made.counters()["unparsable"] == again.counters()["unparsable"] == 2


@pytest.mark.parametrize(("setting", "limit", "most"), [("max_requests", 31, 31), ("max_total_tokens", 3000, 33)])
def test_the_budget_stops_cleanly(judge, setting, limit, most):
    """No further request, everything answered is kept, the message says what is left, and a larger budget goes on."""
    with Server(lambda question, seen: 500 if seen == 1 and "question 3" in question else 200) as server:
        with pytest.raises(BudgetError, match=f"{setting} is {limit}, .* raise it") as caught:
            judge(server, concurrency=4, **{setting: limit})(comparisons(40))
        spent = sum(server.asked.values())
        assert limit / (1 if setting == "max_requests" else 100) <= spent <= most + 12
        assert setting != "max_requests" or spent == limit
        answered = sum(server.answered.values())
        assert f"{80 - answered} questions are left" in str(caught.value)
        assert f"{answered // 2} of 40 comparisons" in str(caught.value)
        assert [one.probability for one in judge(server)(comparisons(40))] == expected(40)
        assert sum(server.answered.values()) == 80


@pytest.mark.parametrize(
    "body",
    [
        "[" * 200_000,
        json.dumps(
            {"choices": [{"message": {"content": "A"}}], "usage": {"prompt_tokens": -9, "completion_tokens": 1}}
        ),
    ],
    ids=["nested", "negative"],
)
def test_an_answer_that_is_none_is_malformed(judge, body):
    """Brackets without an end, and counts that would give tokens back."""
    failed = pytest.raises(EndpointError, match="failed 2 times, at last with malformed")
    with Server(lambda question, seen: (200, {}, body)) as server, failed:
        judge(server, attempts=2)(comparisons(1))


def test_a_token_budget_needs_a_server_that_counts(judge):
    """A server without usage cannot keep one; without a budget it may judge."""
    with Server(usage=False) as server:
        with pytest.raises(EndpointError, match=r"counts no tokens.*max_requests"):
            judge(server, max_total_tokens=1000)(comparisons(2))
        assert judge(server)(comparisons(2))[0].tokens == 0


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "OPENAI_API_KEY"),
        (404, "check url and model"),
        (400, "length of the texts"),
        (302, "check url"),
        ((429, {}, '{"error": {"code": "insufficient_quota"}}'), "account"),
    ],
)
def test_a_refusal_stops_at_once(judge, status, advice):
    """No second try, no further comparison: at most those under way, and the message says what to do."""
    with Server(lambda question, seen: status, latency=0.02) as server:
        with pytest.raises(EndpointError, match=rf"row \d: HTTP .*{advice}") as caught:
            judge(server, concurrency=4)(comparisons(50))
        assert sum(server.asked.values()) <= 4
        assert set(server.asked.values()) == {1}
    assert advice in str(caught.value)
    assert "0 of 50" in str(caught.value)


@pytest.mark.parametrize("fault", [500, 429, SLOW, CUT, MALFORMED, DRIP])
def test_a_server_that_keeps_failing_is_given_up(judge, fault):
    """After `attempts` tries of one request nothing more is sent; what was answered is kept."""
    with Server(lambda question, seen: fault if "question 7" in question else 200) as server:
        with pytest.raises(EndpointError, match="row 7: failed 3 times") as caught:
            judge(server, attempts=3, timeout=0.5 if fault in (SLOW, DRIP) else 5.0, concurrency=2)(comparisons(12))
        assert max(server.asked.values()) == 3
        answered = sum(server.answered.values())
        assert f"{24 - answered} questions are left" in str(caught.value)
        server.act = lambda question, seen: 200
        assert len(judge(server)(comparisons(12))) == 12
        assert set(server.answered.values()) == {1}


def test_nobody_listens(tmp_path):
    """A connection that is refused is tried again, then told."""
    settings = EndpointSettings(
        url="http://127.0.0.1:9/v1", model="m", cache=str(tmp_path / "c"), attempts=2, backoff=0.01
    )
    with pytest.raises(EndpointError, match="failed 2 times, at last with connection"):
        EndpointJudge(settings)(comparisons(1))


def test_retry_after_is_honoured(judge):
    """The next try comes after the time that the server asks for, and too long a time is an error."""
    with Server(lambda question, seen: (429, {"Retry-After": "1"}, "") if seen == 1 else 200) as server:
        judge(server)(comparisons(1))
        assert server.times[2] - server.times[0] > 0.99
    with (
        Server(lambda question, seen: (503, {"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}, "")) as server,
        pytest.raises(EndpointError, match=r"asks to wait .* raise max_wait"),
    ):
        judge(server)(comparisons(1, start=1))


def test_no_more_requests_at_once_than_allowed(judge):
    """`concurrency` bounds what is under way, retries included."""
    with Server(faults(0.3), latency=0.005, hold=0.01) as server:
        judge(server, concurrency=3)(comparisons(30))
        assert server.most == 3


def test_making_a_judge_calls_nothing(judge):
    """The network is used when the judge is called, and not for no comparisons."""
    with Server() as server:
        made = judge(server)
        assert made([]) == []
        assert made.counters() == {}
        assert not server.times


def test_it_works_inside_a_running_loop(judge):
    """As in a notebook."""

    async def notebook() -> list:
        return judge(server)(comparisons(2))

    with Server() as server:
        assert [one.probability for one in asyncio.run(notebook())] == expected(2)


def test_a_failure_of_this_machine_ends_the_run(judge, monkeypatch):
    """What is no failure of the server is raised as it is, the other requests cancelled."""

    def full(self, key, answer):
        raise OSError("no space left")

    monkeypatch.setattr("distalign.judges.cache.Cache.add", full)
    with Server(latency=0.01) as server, pytest.raises(OSError, match="no space left"):
        judge(server)(comparisons(40))
    assert sum(server.asked.values()) < 80


def test_settings_change_the_question(judge, tmp_path):
    """Another model, template, temperature or url is another question; the body holds what the settings say."""
    with Server() as server:
        judge(server, extra={"top_k": 3}, seed=4, temperature=0.5, max_tokens=None)(comparisons(1))
        body = next(iter(server.asked))
        assert '"top_k": 3' in body
        assert '"temperature": 0.5, "seed": 4' in body
        assert "max_tokens" not in body
        for settings in ({"temperature": 1.0}, {"seed": 1}, {"template": "tldr"}):
            judge(server, **settings)(comparisons(1))
        assert sum(server.asked.values()) == 8
    with Server() as other:
        judge(other, template="tldr")(comparisons(1))
        assert sum(other.asked.values()) == 2


def test_the_page_shows_what_works(tmp_path, monkeypatch):
    """The code of docs/judges.md runs as it stands, with a server in the place of the one that it names."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "judges.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict = {}
    with Server(answer=lambda question: "A") as server:
        for block in blocks:
            exec(block.replace("http://127.0.0.1:8123/v1", server.url), names)
    assert [one.probability for one in names["judgements"]] == [0.5]
    assert names["by_length"].probability == 1
    assert names["judge"].counters()["first_position"] == 1
