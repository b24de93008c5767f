"""A judge behind an OpenAI-compatible endpoint: both orders asked, every answer on disk, no question sent twice."""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import json
import logging
import os
import random
import re
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import httpx
from pydantic import ConfigDict, Field, SecretStr, field_validator

from distalign.errors import DAMAGED
from distalign.judges.base import Comparison, JudgeError, Judgement, Progress
from distalign.judges.cache import Answer, Cache, content_key
from distalign.judges.prompts import load_template, orders, stricter, verdict
from distalign.settings import Count, NotNegative, Positive, Section

logger = logging.getLogger("distalign.judges")

T = TypeVar("T")

_PATH = "/chat/completions"
# Names of query parameters that carry a secret: the url is written into recipes, results and messages.
_SECRET = re.compile(r"key|token|secret|passw|sig|auth|credential", re.IGNORECASE)
# Parts of the request that belong to the judge, and so are not the user's to replace.
_OURS = ("messages", "model", "n", "stream", "temperature", "max_tokens", "seed")
_BUSY = (408, 409, 425, 429)
_ADVICE = {
    400: "the server refuses the request; check model, max_tokens, temperature and the length of the texts",
    401: "set the environment variable {env} to a valid key",
    403: "the key in {env} may not use this model; ask for access, or take another model",
    404: "check url and model",
    422: "the server refuses a setting; check model, temperature, max_tokens, seed and extra",
}


class EndpointSettings(Section):
    """An OpenAI-compatible server, what it is asked, how patiently, and how much it may cost.

    url: up to `/v1`, or the whole address of chat/completions. template: tldr, chat, or a .j2 file. api_key_env: the
    environment variable that holds the key (null: none is sent). Times are in seconds: `timeout` is the longest time
    until the last part of an answer. A request is tried `attempts` times; before the next one it waits a random time of
    up to `backoff`·2^k, at most `max_backoff`, after what the server asks for by Retry-After (no more than `max_wait`).
    max_requests counts what is sent, retries included, max_total_tokens what the server says it read and wrote; both
    hold for one judge. `extra` is added to the body of every request; temperature, max_tokens and seed are left out
    where null.
    """

    # A validation error must not repeat an address that holds a password.
    model_config = ConfigDict(hide_input_in_errors=True)

    url: str
    model: str
    template: str = "chat"
    cache: str = "runs/judge.jsonl"
    api_key_env: str | None = "OPENAI_API_KEY"
    allow_http: bool = False
    temperature: NotNegative | None = 0.0
    max_tokens: Count | None = 16
    seed: int | None = None
    extra: Annotated[dict[str, Any], Field(default_factory=dict)]
    concurrency: Count = 16
    timeout: Positive = 60.0
    connect_timeout: Positive = 10.0
    attempts: Count = 8
    backoff: Positive = 0.5
    max_backoff: Positive = 30.0
    max_wait: Positive = 300.0
    max_requests: Count | None = None
    max_total_tokens: Count | None = None

    @field_validator("url")
    @classmethod
    def _whole_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("the url of an endpoint starts with https:// (or http:// on this machine) and a host")
        secret = any(_SECRET.search(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True))
        if parts.username is not None or parts.password is not None or parts.fragment or secret:
            raise ValueError(
                "the url of an endpoint holds no user, password, key or fragment; name the key in api_key_env"
            )
        path = parts.path.rstrip("/")
        return parts._replace(path=path if path.endswith(_PATH) else path + _PATH).geturl()

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        found = [name for name in _OURS if name in extra]
        if found:
            raise ValueError(f"extra holds {', '.join(found)}, which the judge sets itself; leave it out")
        return extra

    @property
    def local(self) -> bool:
        """Whether the server runs on this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")

    def sampling(self) -> dict[str, Any]:
        """The part of a request that decides what is drawn, besides model and messages."""
        given = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": self.seed}
        return {**{key: value for key, value in given.items() if value is not None}, **self.extra}


class EndpointError(JudgeError):
    """An endpoint that refuses for good, or that failed too often."""


class BudgetError(JudgeError):
    """The settings allow no further request."""


class _Retry(Exception):
    """A failure that may pass: its kind, what was said, and how long the server asks to wait, in seconds."""

    def __init__(self, kind: str, said: str, wait: float = 0.0) -> None:
        super().__init__(kind)
        self.kind, self.said, self.wait = kind, said, wait


def read_key(settings: EndpointSettings) -> SecretStr | None:
    """The key from its environment variable; None if none is to be sent. Raises EndpointError.

    A server on this machine may do without. A key is never sent over plain http to another machine unless allow_http.
    """
    name = settings.api_key_env
    value = os.environ.get(name, "").strip() if name else ""
    if not value:
        if name and not settings.local:
            raise EndpointError(
                f"judge {settings.url}: the environment variable {name} is not set; put the key there, or set "
                "api_key_env: null if the server needs none"
            )
        return None
    if not value.isascii() or not value.isprintable() or " " in value:
        raise EndpointError(f"judge {settings.url}: {name} holds white space or other odd characters; set it again")
    if settings.url.startswith("http:") and not settings.local and not settings.allow_http:
        raise EndpointError(
            f"judge {settings.url}: the key in {name} would be sent unencrypted to another machine; use https, set "
            "api_key_env: null, or allow_http: true"
        )
    return SecretStr(value)


class Client:
    """Sends requests for many that wait at once; use it within `async with`.

    `counts` collects requests, retries by cause, and tokens. Once `stopped` is set nothing more is sent.
    """

    def __init__(self, settings: EndpointSettings, counts: Counter[str]) -> None:
        self.settings, self.counts = settings, counts
        self.stopped = asyncio.Event()
        self._key = read_key(settings)
        self._random = random.Random()
        self._places = asyncio.Semaphore(settings.concurrency)
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(None, connect=settings.connect_timeout),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.concurrency),
            trust_env=not settings.local,
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, messages: Sequence[dict[str, str]], where: str) -> Answer | None:
        """The answer, or None if `stopped` was set before there was one.

        Raises BudgetError where nothing more may be sent; EndpointError for a refusal, or after `attempts` failures.
        """
        settings = self.settings
        body = json.dumps({"model": settings.model, "messages": list(messages), **settings.sampling()}).encode()
        for attempt in range(1, settings.attempts + 1):
            async with self._places:
                if self.stopped.is_set():
                    return None
                self._pay()
                try:
                    return await self._send(body, where)
                except _Retry as failure:
                    reason, wait = f"{failure.kind} ({failure.said})", failure.wait
                    self.counts[f"failed/{failure.kind}"] += 1
            if attempt == settings.attempts:
                break
            if wait > settings.max_wait:
                raise EndpointError(
                    f"judge {settings.url}: {where}: {reason}; the server asks to wait {wait:.0f} s: run again then, "
                    "or raise max_wait"
                )
            longest = min(settings.max_backoff, settings.backoff * 2 ** (attempt - 1))
            await self._sleep(wait + self._random.uniform(0, longest))
        raise EndpointError(
            f"judge {settings.url}: {where}: failed {settings.attempts} times, at last with {reason}; run again when "
            "the server is well, lower concurrency, or raise timeout or attempts"
        )

    def _pay(self) -> None:
        """Count a request that is about to be sent. Raises BudgetError if the settings do not allow it."""
        settings, counts = self.settings, self.counts
        for name, limit, spent in (
            ("max_requests", settings.max_requests, counts["requests"]),
            ("max_total_tokens", settings.max_total_tokens, counts["tokens"]),
        ):
            if limit is not None and spent >= limit:
                raise BudgetError(f"judge {settings.url}: {name} is {limit}, {spent} are spent; raise it and run again")
        counts["requests"] += 1

    async def _sleep(self, seconds: float) -> None:
        """Wait, or return early when `stopped` is set."""
        try:
            await asyncio.wait_for(self.stopped.wait(), seconds)
        except asyncio.TimeoutError:
            return

    async def _send(self, body: bytes, where: str) -> Answer:
        """One attempt. Raises _Retry for what may pass, EndpointError for what will not."""
        settings = self.settings
        try:
            response = await asyncio.wait_for(self._http.post(settings.url, content=body), settings.timeout)
        except httpx.ConnectTimeout:
            raise _Retry("timeout", f"no connection within {settings.connect_timeout:g} s") from None
        except asyncio.TimeoutError:
            raise _Retry("timeout", f"no answer within {settings.timeout:g} s") from None
        except httpx.RequestError as error:
            raise _Retry("connection", self._clean(f"{type(error).__name__} {error}")) from None
        status, content = response.status_code, response.content
        said = self._clean(content.decode(errors="replace")) or "no reason given"
        if status >= 500 or (status in _BUSY and b"insufficient_quota" not in content):
            raise _Retry(f"HTTP {status}", said, _retry_after(response.headers.get("retry-after", "")))
        if status >= 300:
            advice = _ADVICE.get(status, "check url, model and account").format(
                env=settings.api_key_env or "api_key_env"
            )
            raise EndpointError(f"judge {settings.url}: {where}: HTTP {status} ({said}); {advice}")
        answer = self._answer(content)
        if answer is None:
            raise _Retry("malformed", said)
        self.counts["answered"] += 1
        self.counts["tokens"] += answer.tokens
        return answer

    def _answer(self, content: bytes) -> Answer | None:
        """What the body says, None if it has not the form of an answer."""
        try:
            body = json.loads(content)
            text = body["choices"][0]["message"].get("content")
            usage = body.get("usage") or {}
            counted = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except DAMAGED:
            return None
        if not isinstance(text, str | None):
            return None
        if any(count is not None and (type(count) is not int or count < 0) for count in counted):
            return None
        return Answer(self._secret(text or ""), *counted)

    def _clean(self, text: str) -> str:
        """What a server or a library said, in one line of at most 300 characters, without anything secret."""
        text = re.sub(r"(?i)(bearer)[\s:=]+[^\s\"',}]+", r"\1 [removed]", self._secret(text))
        return " ".join(text.split())[:300]

    def _secret(self, text: str) -> str:
        """The text without the key, as it is or as JSON writes it."""
        if self._key is None:
            return text
        key = self._key.get_secret_value()
        for form in {key, json.dumps(key)[1:-1]}:
            text = text.replace(form, "[removed]")
        return text


def _retry_after(value: str) -> float:
    """Seconds that the server asks to wait: a number or a date; 0 if it does not say."""
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value.strip())
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


@contextmanager
def headers_unlogged() -> Iterator[None]:
    """httpcore's debug log shows a server's headers, and a server may repeat the key in them."""
    logger = logging.getLogger("httpcore")
    level = logger.level
    logger.setLevel(max(logging.INFO, level))
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class _Reply:
    """The last answer to a question and its verdict (None: unparsable), and the tokens of all its answers."""

    text: str
    verdict: float | None
    tokens: int


# By key: the messages of what is asked, and the comparison that it is asked for.
_Questions = dict[str, tuple[list[dict[str, str]], str]]


class EndpointJudge:
    """Every comparison is asked in both orders. Both for the same response: 1 or 0; anything else: 0.5, a tie.

    So a judge that prefers a position gives ties, and `counters` says how often it did. An answer that is no verdict is
    asked for once more, more sternly, and then counts as a tie that is `unparsable`. Equal responses are a tie and are
    not asked. Answers are kept in `settings.cache` by the content of their request: they cost nothing the next time,
    whatever ended the run. Making a judge calls nothing; raises JudgeError for a bad template or a missing key.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings, self.template = settings, load_template(settings.template)
        read_key(settings)
        self._counts: Counter[str] = Counter()

    def __call__(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Judgement]:
        """Ask what the cache does not hold.

        Raises BudgetError where the budget ends, EndpointError where the server refuses or keeps failing; what was
        answered until then is in the cache, and the same call goes on from there.
        """
        if not comparisons:
            return []
        questions: _Questions = {}
        keys = [self._keys(comparison, questions) for comparison in comparisons]
        with Cache(self.settings.cache) as cache, headers_unlogged():
            replies = _run(self._ask_all(questions, keys, cache, progress))
        judgements = [self._judgement(own, replies) for own in keys]
        if self._counts["first_shown"] + self._counts["second_shown"]:
            counts = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in self.counters().items())
            logger.info("judge %s: %s", self.settings.model, counts)
        return judgements

    def reach(self) -> None:
        """Ask one short question, which is neither kept nor counted. Raises EndpointError if no answer comes.

        So a wrong address, model or key is found before work is done for the judge.
        """
        settings = self.settings.model_copy(update={"attempts": min(self.settings.attempts, 3)})

        async def ask() -> None:
            async with Client(settings, Counter()) as client:
                await client.ask([{"role": "user", "content": "Answer with the letter A."}], "a first question")

        with headers_unlogged():
            try:
                _run(ask())
            except EndpointError as error:
                raise EndpointError(f"{error} (nothing was sampled for it)") from None

    def counters(self) -> dict[str, float]:
        """Counts since the start, and the position bias.

        comparisons: identical, contradictory (each response preferred where it stood first, or second) and unparsable
        ones among them are ties. requests: sent, retries included; answered; failed by cause; tokens. cached: questions
        that the cache answered. first_position: the share of verdicts A among A and B, 0.5 without bias (each response
        stands first once).
        """
        counts = dict(self._counts)
        first, second = counts.pop("first_shown", 0), counts.pop("second_shown", 0)
        counters = {key: float(value) for key, value in sorted(counts.items())}
        return counters | ({"first_position": first / (first + second)} if first + second else {})

    def _keys(self, comparison: Comparison, questions: _Questions) -> tuple[str, str] | None:
        """The keys of both orders, which are added to the questions; None for equal texts, a tie."""
        if comparison.first == comparison.second:
            return None
        first, second = orders(self.template, comparison)
        keys = self._key(first), self._key(second)
        questions.setdefault(keys[0], (first, comparison.key))
        questions.setdefault(keys[1], (second, comparison.key))
        return keys

    def _key(self, messages: list[dict[str, str]]) -> str:
        settings, url = self.settings, urlsplit(self.settings.url)
        return content_key(
            url=f"{url.netloc}{url.path}",
            model=settings.model,
            template=self.template.text,
            sampling=settings.sampling(),
            messages=messages,
        )

    async def _ask_all(
        self, questions: _Questions, keys: list[tuple[str, str] | None], cache: Cache, progress: Progress | None
    ) -> dict[str, _Reply]:
        """A reply to every question. After a failure nothing more is sent; what is under way is still kept."""
        replies: dict[str, _Reply] = {}
        failures: list[JudgeError] = []
        total, left = len(keys), iter(questions.items())

        async def work(client: Client) -> None:
            for key, (messages, where) in left:
                try:
                    reply = await self._reply(client, cache, messages, where)
                except JudgeError as error:
                    failures.append(error)
                    client.stopped.set()
                    return
                if reply is None:
                    return
                replies[key] = reply
                if progress is not None:
                    progress(total * len(replies) // len(questions), total)

        async with Client(self.settings, self._counts) as client:
            # Twice as many as may be under way: while some wait to try again, others are sent.
            await _all([work(client) for _ in range(2 * self.settings.concurrency)])
        if failures:
            judged = sum(set(own or ()) <= replies.keys() for own in keys)
            raise type(failures[0])(
                f"{failures[0]} ({judged} of {total} comparisons are judged, "
                f"{len(questions) - len(replies)} questions are left; all answers are kept in {cache.path})"
            )
        return replies

    async def _reply(self, client: Client, cache: Cache, messages: list[dict[str, str]], where: str) -> _Reply | None:
        """The verdict on a question, from the second answer if the first is none; None if stopped before."""
        tokens = 0
        for question in (messages, stricter(messages)):
            answer = await self._answer(client, cache, question, where)
            if answer is None:
                return None
            tokens += answer.tokens
            if verdict(answer.text) is not None:
                break
        return _Reply(answer.text, verdict(answer.text), tokens)

    async def _answer(self, client: Client, cache: Cache, messages: list[dict[str, str]], where: str) -> Answer | None:
        """From the cache, or from the server and then into the cache; None if stopped before."""
        key = self._key(messages)
        if key in cache.answers:
            self._counts["cached"] += 1
            return cache.answers[key]
        answer = await client.ask(messages, where)
        if answer is None:
            return None
        cache.add(key, answer)
        if self.settings.max_total_tokens is not None and None in (answer.prompt_tokens, answer.completion_tokens):
            raise EndpointError(
                f"judge {self.settings.url}: the server counts no tokens, so max_total_tokens cannot be kept; leave it "
                "out and set max_requests"
            )
        return answer

    def _judgement(self, keys: tuple[str, str] | None, replies: dict[str, _Reply]) -> Judgement:
        counts = self._counts
        counts["comparisons"] += 1
        if keys is None:
            counts["identical"] += 1
            return Judgement(0.5)
        forward, backward = (replies[key] for key in keys)
        answers, tokens = (forward.text, backward.text), forward.tokens + backward.tokens
        for reply in (forward, backward):
            counts["first_shown"] += reply.verdict == 1
            counts["second_shown"] += reply.verdict == 0
        if forward.verdict is None or backward.verdict is None:
            counts["unparsable"] += 1
            return Judgement(0.5, answers, tokens, unparsable=True)
        counts["contradictory"] += forward.verdict == backward.verdict != 0.5
        agree = forward.verdict == 1 - backward.verdict
        return Judgement(forward.verdict if agree else 0.5, answers, tokens)


async def _all(work: list[Coroutine[Any, Any, None]]) -> None:
    """Run all at once; if one raises or is interrupted, the others are cancelled first."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, in a thread of its own where a loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
