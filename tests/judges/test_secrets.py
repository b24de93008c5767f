"""The API key goes into the request and nowhere else, whatever the server does with it."""

from __future__ import annotations

import json
import logging
import traceback

import pytest
from judge_server import Server, comparisons
from pydantic import ValidationError

from distalign.judges import EndpointError, EndpointJudge, EndpointSettings, JudgeError

KEY = 'sk-proj-"secret"\\of-9f8e7d6c5b4a'
CODE = "9f8e7d6c5b4a"
ECHO = json.dumps({"error": {"message": f"what is Authorization: Bearer {KEY}?", "key": KEY}})
HEADERS = {"X-Echo": f"Bearer {KEY}"}
GOOD = json.dumps({"choices": [{"message": {"content": f"A {KEY}"}}], "usage": None})


def remote(**settings) -> EndpointJudge:
    """A judge elsewhere."""
    return EndpointJudge(EndpointSettings(**{"url": "https://judge.example/v1", "model": "m", **settings}))


@pytest.mark.parametrize(
    "action",
    [
        (401, HEADERS, ECHO),
        (400, HEADERS, f"Bearer {KEY} " * 40),
        (404, HEADERS, "x" * 290 + KEY),
        (500, HEADERS, ECHO),
        (429, {**HEADERS, "Retry-After": "9999"}, ECHO),
        (302, {**HEADERS, "Location": f"http://elsewhere.example/{KEY}"}, ECHO),
        (200, HEADERS, ECHO),
        (200, HEADERS, GOOD),
        (200, {**HEADERS, "Content-Encoding": "gzip"}, ECHO),
        (200, {**HEADERS, "Content-Length": "abc"}, KEY),
    ],
    ids=lambda action: f"{action[0]}",
)
def test_the_key_is_written_nowhere(action, tmp_path, monkeypatch, caplog, capfd):
    """Not in files, logs of any level, errors and their causes, counters, answers or reprs: only in the header."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    told = []
    with Server(lambda question, seen: action) as server:
        settings = EndpointSettings(url=server.url, model="m", api_key_env="JUDGE_KEY", attempts=2, backoff=0.01)
        judge = EndpointJudge(settings)
        try:
            told += judge(comparisons(3))
        except JudgeError as error:
            told += traceback.format_exception(error)
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert told
    told += [judge, vars(judge), settings, judge.counters(), caplog.text, *capfd.readouterr()]
    told += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert list(tmp_path.rglob("*.jsonl"))
    assert CODE not in "\n".join(map(repr, told))
    assert "receive_response_body" not in caplog.text
    assert logging.getLogger("httpcore").level == logging.NOTSET


def test_what_the_server_said_is_told_without_the_key(tmp_path, monkeypatch):
    """The reason stays readable."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with (
        Server(lambda question, seen: (403, {}, ECHO)) as server,
        pytest.raises(EndpointError, match=r"what is Authorization: Bearer \[removed\]"),
    ):
        EndpointJudge(EndpointSettings(url=server.url, model="m", cache=str(tmp_path / "c")))(comparisons(1))


@pytest.mark.parametrize("bad", ["sk-one\nsk-two", "sk one", "sk-é"])
def test_a_key_that_is_none_is_not_quoted(bad, monkeypatch):
    """A header with it would be refused by an error that shows it."""
    monkeypatch.setenv("OPENAI_API_KEY", bad)
    with pytest.raises(EndpointError, match="OPENAI_API_KEY holds white space") as caught:
        remote()
    assert bad not in "".join(traceback.format_exception(caught.value))


def test_no_key_goes_unencrypted_to_another_machine(monkeypatch):
    """Plain http with a key is for this machine, unless the settings allow it; without a key it is fine."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for url in ("http://judge.example/v1", "http://10.0.0.7:8000/v1", "http://localhost.example/v1"):
        with pytest.raises(EndpointError, match=r"unencrypted.*allow_http: true") as caught:
            remote(url=url)
        assert CODE not in str(caught.value)
        remote(url=url, allow_http=True)
        remote(url=url, api_key_env=None)
    for url in ("http://localhost:1/v1", "http://127.0.0.2/v1", "http://[::1]:8000/v1", "https://judge.example/v1"):
        remote(url=url)


def test_a_missing_key_is_said_before_anything_is_sent(monkeypatch, tmp_path):
    """Elsewhere a key is needed unless the settings say that none is; a server on this machine is asked without."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EndpointError, match=r"OPENAI_API_KEY is not set.*api_key_env: null"):
        remote()
    remote(api_key_env=None)
    with Server() as server:
        EndpointJudge(EndpointSettings(url=server.url, model="m", cache=str(tmp_path / "c")))(comparisons(1))
        assert "authorization" not in server.headers[0]


@pytest.mark.parametrize(
    "url", ["https://user:hunter2@judge.example/v1", "ftp://judge.example/hunter2", "hunter2", "https:///v1"]
)
def test_an_address_holds_no_password(url):
    """It is refused, and the error does not repeat it."""
    with pytest.raises(ValidationError, match="the url of an endpoint") as caught:
        EndpointSettings(url=url, model="m")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ("https://a.example/v1", "https://a.example/v1/chat/completions"),
        ("https://a.example/v1/", "https://a.example/v1/chat/completions"),
        ("https://a.example/x/chat/completions?api-version=2", "https://a.example/x/chat/completions?api-version=2"),
    ],
)
def test_the_address_is_completed(given, whole):
    """Up to v1, or the whole."""
    assert EndpointSettings(url=given, model="m").url == whole


@pytest.mark.parametrize("name", ["key", "api_key", "access_token", "Signature", "code_secret"])
def test_an_address_with_a_secret_is_refused(name):
    """The address is written into recipes, results and messages; other queries stay."""
    with pytest.raises(ValueError, match="holds no user, password, key"):
        EndpointSettings(url=f"https://a.example/v1?{name}=hidden", model="m")
