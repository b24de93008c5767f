"""A judge behind an OpenAI-compatible endpoint: both orders asked, every answer kept on disk, nothing asked twice."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from distalign.judges.base import Comparison, JudgeError, Judgement, Progress
from distalign.judges.cache import Answer, Cache, content_key
from distalign.judges.client import Client, EndpointError, headers_unlogged, read_key
from distalign.judges.prompts import load_template, orders, stricter, verdict
from distalign.judges.settings import EndpointSettings

logger = logging.getLogger("distalign.judges")

T = TypeVar("T")


@dataclass(frozen=True)
class _Reply:
    """The last answer to a question and its verdict (None: unparsable), and the tokens of all its answers."""

    text: str
    verdict: float | None
    tokens: int


@dataclass
class _Questions:
    """What is to be asked, by key, each once; and the two keys of every comparison (None: equal texts, a tie)."""

    messages: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    keys: list[tuple[str, str] | None] = field(default_factory=list)


class EndpointJudge:
    """Every comparison is asked in both orders. Both for the same response: 1 or 0; anything else: 0.5, a tie.

    So a judge that prefers a position gives ties, and `facts` says how often it did. An answer that is no verdict is
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
        questions = self._questions(comparisons)
        with Cache(self.settings.cache) as cache, headers_unlogged():
            replies = _run(self._ask_all(questions, cache, progress))
        found = [self._judgement(keys, replies) for keys in questions.keys]
        if self._counts["first_shown"] + self._counts["second_shown"]:
            logger.info("judge %s: %s", self.settings.model, self.facts())
        return found

    def facts(self) -> dict[str, float]:
        """Counts since the start, and the position bias.

        comparisons: identical, contradictory (each response preferred where it stood first, or second) and unparsable
        ones among them are ties. requests: sent, retries included; answered; failed by cause; tokens. cached: questions
        that the cache answered. first_position: the share of verdicts A among A and B, 0.5 without bias (each response
        stands first once).
        """
        counts = dict(self._counts)
        first, second = counts.pop("first_shown", 0), counts.pop("second_shown", 0)
        found = {key: float(value) for key, value in sorted(counts.items())}
        return found | ({"first_position": first / (first + second)} if first + second else {})

    def _questions(self, comparisons: Sequence[Comparison]) -> _Questions:
        found = _Questions()
        for one in comparisons:
            if one.first == one.second:
                found.keys.append(None)
                continue
            keys = []
            for messages in orders(self.template, one):
                key = self._key(messages)
                found.messages[key] = messages
                found.where.setdefault(key, one.key)
                keys.append(key)
            found.keys.append((keys[0], keys[1]))
        return found

    def _key(self, messages: list[dict[str, str]]) -> str:
        settings, url = self.settings, urlsplit(self.settings.url)
        return content_key(
            url=f"{url.netloc}{url.path}",
            model=settings.model,
            template=self.template.text,
            sampling=settings.sampling(),
            messages=messages,
        )

    async def _ask_all(self, questions: _Questions, cache: Cache, progress: Progress | None) -> dict[str, _Reply]:
        """A reply to every question. After a failure nothing more is sent; what is under way is still kept."""
        replies: dict[str, _Reply] = {}
        failures: list[JudgeError] = []
        waiting = Counter(key for keys in questions.keys for key in set(keys or ()))
        # Two halves a comparison; a question may be that of several, and equal responses need none.
        halves = 2 * len(questions.keys) - sum(waiting.values())

        left = iter(questions.messages)

        async def work(client: Client) -> None:
            nonlocal halves
            for key in left:
                try:
                    reply = await self._reply(client, cache, questions.messages[key], questions.where[key])
                except JudgeError as error:
                    failures.append(error)
                    client.stopped.set()
                    return
                if reply is None:
                    return
                replies[key] = reply
                halves += waiting[key]
                if progress is not None:
                    progress(halves // 2, len(questions.keys))

        async with Client(self.settings, self._counts) as client:
            # Twice as many as may be under way: while some wait to try again, others are sent.
            await _all([work(client) for _ in range(2 * self.settings.concurrency)])
        if failures:
            open_ones = sum(not set(keys or ()) <= replies.keys() for keys in questions.keys)
            raise type(failures[0])(
                f"{failures[0]} ({len(questions.keys) - open_ones} of {len(questions.keys)} comparisons are judged, "
                f"{len(questions.messages) - len(replies)} questions are left; all answers are kept in {cache.path})"
            )
        return replies

    async def _reply(self, client: Client, cache: Cache, messages: list[dict[str, str]], where: str) -> _Reply | None:
        """The verdict on a question, from the second answer if the first is none; None if stopped before."""
        answer = await self._answer(client, cache, messages, where)
        if answer is None:
            return None
        found, tokens = verdict(answer.text), answer.tokens
        if found is None:
            answer = await self._answer(client, cache, stricter(messages), where)
            if answer is None:
                return None
            found, tokens = verdict(answer.text), tokens + answer.tokens
        return _Reply(answer.text, found, tokens)

    async def _answer(self, client: Client, cache: Cache, messages: list[dict[str, str]], where: str) -> Answer | None:
        """From the cache, or from the server and then into the cache."""
        key = self._key(messages)
        if key in cache.answers:
            self._counts["cached"] += 1
            return cache.answers[key]
        answer = await client.ask(messages, where)
        if answer is None:
            return None
        cache.add(key, answer)
        if self.settings.max_total_tokens is not None and not answer.counted:
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
        said, tokens = (forward.text, backward.text), forward.tokens + backward.tokens
        for shown in (forward.verdict, backward.verdict):
            counts["first_shown"] += shown == 1
            counts["second_shown"] += shown == 0
        if forward.verdict is None or backward.verdict is None:
            counts["unparsable"] += 1
            return Judgement(0.5, said, tokens, unparsable=True)
        counts["contradictory"] += forward.verdict == backward.verdict != 0.5
        agree = forward.verdict == 1 - backward.verdict
        return Judgement(forward.verdict if agree else 0.5, said, tokens)


async def _all(work: list[Coroutine[Any, Any, None]]) -> None:
    """Run all at once; if one raises or is interrupted, the others are cancelled first."""
    tasks = [asyncio.ensure_future(one) for one in work]
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
