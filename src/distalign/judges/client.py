"""One request to a chat/completions endpoint, sent until it is answered, refused for good, or not worth another try."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx
from pydantic import SecretStr

from distalign.judges.base import JudgeError
from distalign.judges.cache import Answer
from distalign.judges.settings import EndpointSettings

_BUSY = (408, 409, 425, 429)
_ADVICE = {
    400: "the server refuses the request; check model, max_tokens, temperature and the length of the texts",
    401: "set the environment variable {env} to a valid key",
    403: "the key in {env} may not use this model; ask for access, or take another model",
    404: "check url and model",
    422: "the server refuses a setting; check model, temperature, max_tokens, seed and extra",
}


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
    """Sends requests one by one for many waiting at once; use it within `async with`.

    `counts` collects requests, retries by cause, and tokens. Once `stopped` is set nothing more is sent.
    """

    def __init__(self, settings: EndpointSettings, counts: Counter[str]) -> None:
        self.settings, self.counts = settings, counts
        self._key = read_key(settings)
        self._random = random.Random()

    async def __aenter__(self) -> Client:
        settings = self.settings
        self.stopped = asyncio.Event()
        self._room = asyncio.Semaphore(settings.concurrency)
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key.get_secret_value()}"} if self._key else None,
            timeout=httpx.Timeout(settings.timeout, connect=settings.connect_timeout, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.concurrency),
            trust_env=not settings.local,
        )
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
            async with self._room:
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
            status, headers, content = await self._post(body)
        except httpx.ConnectTimeout:
            raise _Retry("timeout", f"no connection within {settings.connect_timeout:g} s") from None
        except httpx.TimeoutException:
            raise _Retry("timeout", f"no answer within {settings.timeout:g} s") from None
        except httpx.RequestError as error:
            raise _Retry("connection", self._clean(f"{type(error).__name__} {error}")) from None
        said = self._clean(content.decode(errors="replace")) or "no reason given"
        if status >= 500 or (status in _BUSY and b"insufficient_quota" not in content):
            raise _Retry(f"HTTP {status}", said, _retry_after(headers.get("retry-after", "")))
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

    async def _post(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers by lower-case name, and content.

        httpx bounds every silence; an answer that comes in parts is given up here when its time is over.
        """
        deadline = time.monotonic() + self.settings.timeout
        headers = {"Content-Type": "application/json"}
        async with self._http.stream("POST", self.settings.url, content=body, headers=headers) as response:
            parts = []
            async for part in response.aiter_bytes():
                parts.append(part)
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer came too slowly")
            return response.status_code, dict(response.headers), b"".join(parts)

    def _answer(self, content: bytes) -> Answer | None:
        """What the body says, None if it has not the form of an answer."""
        try:
            body = json.loads(content)
            text = body["choices"][0]["message"].get("content")
            usage = body.get("usage") or {}
            counted = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError):
            return None
        if not isinstance(text, str | None) or any(type(count) not in (int, type(None)) for count in counted):
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
