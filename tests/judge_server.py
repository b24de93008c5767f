"""An OpenAI-compatible server on this machine that answers, fails as it is told, and counts."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from distalign.judges import Comparison

REASONS = {200: "OK", 302: "Found", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found"}
SLOW, CUT, MALFORMED, DRIP = "slow", "cut", "malformed", "drip"


def better(question: str) -> str:
    """The response with the larger number at its end; both orders agree."""
    first, second = (float(n) for n in re.findall(r"quality (\d+)", question))
    return "A" if first > second else "B" if second > first else "TIE"


def comparisons(n: int, start: int = 0) -> list[Comparison]:
    """Comparisons that `better` can judge: the first response is better where its number is even."""
    return [
        Comparison(f"question {i}", "quality 5", f"quality {9 * (i % 2)}", f"row {i}") for i in range(start, start + n)
    ]


def faults(share: float, seed: int = 0, slow: int = 1) -> Callable[[str, int], Any]:
    """Fails this share of the requests at random: four ways of weight 8 each, and slow with its own."""
    source = random.Random(seed)

    def action(question: str, seen: int) -> Any:
        ways = source.choices([429, 500, CUT, MALFORMED, SLOW], [8, 8, 8, 8, slow])
        return ways[0] if source.random() < share else 200

    return action


class Server:
    """Runs in a thread while it is used as a context manager.

    act(question, times it was asked) gives a status, a fault, or (status, headers, body); `answer` what a good
    answer says. `asked` and `answered` count by body, `acted` by action; slow requests are dropped after `hold` s.
    """

    def __init__(
        self,
        act: Callable[[str, int], Any] = lambda question, seen: 200,
        answer: Callable[[str], Any] = better,
        *,
        latency: float = 0.0,
        hold: float = 5.0,
        usage: bool = True,
    ) -> None:
        self.act, self.answer, self.latency, self.hold, self.usage = act, answer, latency, hold, usage
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.acted: Counter[Any] = Counter()
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.flying = self.most = 0

    def __enter__(self) -> Server:
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(5)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(5)

    @property
    def url(self) -> str:
        """As settings name it."""
        return f"http://127.0.0.1:{self.port}/v1"

    def _serve(self, ready: threading.Event) -> None:
        async def main() -> None:
            self._end = asyncio.Event()
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()
            await self._end.wait()
            server.close()
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self._loop.run_until_complete(main())
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; False if the connection is then to be closed."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        body = (await reader.readexactly(int(headers.get("content-length", 0)))).decode()
        self.asked[body] += 1
        self.headers.append(headers)
        self.times.append(time.monotonic())
        self.flying += 1
        self.most = max(self.most, self.flying)
        try:
            return await self._respond(head[0], body, writer)
        finally:
            self.flying -= 1

    async def _respond(self, head: str, body: str, writer: asyncio.StreamWriter) -> bool:
        assert head.startswith("POST /v1/chat/completions ")
        question = json.loads(body)["messages"][-1]["content"]
        action = self.act(question, self.asked[body])
        self.acted[action if isinstance(action, int | str) else action[0]] += 1
        await asyncio.sleep(self.latency)
        if action == DRIP:
            for byte in reply(200, {}, self._good(question)):
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.005)
            return True
        if action == SLOW:
            await asyncio.sleep(self.hold)
            return False
        if isinstance(action, tuple):
            writer.write(reply(*action))
        elif action == 200:
            writer.write(reply(200, {}, self._good(question)))
            await writer.drain()
            self.answered[body] += 1
        elif action == CUT:
            whole = reply(200, {}, self._good(question))
            writer.write(whole[: len(whole) * random.randint(0, 9) // 10])
        elif action == MALFORMED:
            writer.write(
                reply(200, {}, random.choice(['{"choices": [', '{"choices": []}', "[]", "<html>", "null", ""]))
            )
        else:
            writer.write(reply(action, {}, '{"error": {"message": "as it was told"}}'))
        await writer.drain()
        return action != CUT

    def _good(self, question: str) -> str:
        answer = {"choices": [{"message": {"role": "assistant", "content": self.answer(question)}}]}
        return json.dumps(answer | ({"usage": {"prompt_tokens": 90, "completion_tokens": 10}} if self.usage else {}))


def reply(status: int, headers: dict[str, str], body: str) -> bytes:
    """An HTTP response."""
    content = body.encode()
    fields = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}\r\n{lines}\r\n".encode() + content
