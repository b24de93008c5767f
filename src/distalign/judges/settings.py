"""What a YAML mapping may say about a judge: one of a reward, a Python function, a known target, or an endpoint."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from distalign.rewards import RewardSettings
from distalign.settings import Count, NotNegative, Positive, Section, several

_PATH = "/chat/completions"
# Names of query parameters that carry a secret: the url is written into recipes, results and messages.
_SECRET = re.compile(r"key|token|secret|passw|sig|auth|credential", re.IGNORECASE)
# Parts of the request that belong to the judge, and so are not the user's to replace.
_OURS = ("messages", "model", "n", "stream", "temperature", "max_tokens", "seed")


class EndpointSettings(Section):
    """An OpenAI-compatible server, what it is asked, how patiently, and how much it may cost.

    url: up to `/v1`, or the whole address of chat/completions. template: tldr, chat, or a .j2 file. api_key_env: the
    environment variable that holds the key (null: none is sent). Times are in seconds: `timeout` is the longest
    silence of the server, and the longest time until the last part of an answer. A request is tried `attempts` times;
    before the next one it waits a random time of up to `backoff`·2^k, at most `max_backoff`, after what the server
    asks for by Retry-After (no more than `max_wait`). max_requests counts what is sent, retries included,
    max_total_tokens what the server says it read and wrote; both hold for one judge. `extra` is added to the body of
    every request; temperature, max_tokens and seed are left out where null.
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


class JudgeSettings(Section):
    """Who compares responses: one of `reward`, `function`, `exact` and `endpoint`.

    reward: as in a recipe. function: `file.py:name` or `module:name`, asked in both orders, which are averaged;
    `timeout` bounds one call of it, in seconds. endpoint: asked in both orders, a tie where they disagree. exact:
    P_{π*} of the known target. verdict: what a reward or the target says, the probability σ(ΔR), or its sign.
    """

    reward: Annotated[tuple[RewardSettings, ...], BeforeValidator(several)] = ()
    function: str | None = None
    exact: bool = False
    endpoint: EndpointSettings | None = None
    verdict: Literal["probability", "sign"] = "probability"
    timeout: Positive = 60.0

    @model_validator(mode="after")
    def _one_kind(self) -> JudgeSettings:
        given = [bool(self.reward), self.function is not None, self.exact, self.endpoint is not None]
        if sum(given) != 1:
            raise ValueError(f"judge names {sum(given)} of reward, function, exact and endpoint; give one")
        if self.verdict == "sign" and not (self.reward or self.exact):
            raise ValueError("judge.verdict is about differences of rewards; leave it out, or judge by reward or exact")
        return self
