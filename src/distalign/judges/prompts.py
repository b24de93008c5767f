"""What an endpoint is asked, and how its answer is read.

Texts that are judged are untrusted. They are values of a sandboxed template, never part of it, and stand between fences
marked with a code that occurs in none of them, so no text can end its own fence. A verdict is read from the server's
answer alone. What no template can prevent is that a model follows an instruction that it reads within a fence.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from distalign.data import Text, plain_text
from distalign.judges.base import Comparison, JudgeError

ASSETS = Path(__file__).parent / "templates"

# What each answer says about the response shown as A.
VERDICTS = {"A": 1.0, "B": 0.0, "TIE": 0.5}
STRICTER = (
    "Your last answer to this question could not be read. Write exactly one line that holds nothing but A, B or TIE: "
    "no other word, no punctuation, no explanation."
)


@dataclass(frozen=True)
class Template:
    """A prompt template; `text` is its source.

    It is given `prompt` (plain text), `messages` (the prompt as a list with role and content), `first` and `second`
    (the responses shown as A and B), and `boundary`, a code that occurs in none of these.
    """

    name: str
    text: str

    def messages(self, prompt: Text, first: str, second: str) -> list[dict[str, str]]:
        """The question as one user turn. Raises JudgeError for a template that fails."""
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        values = {"prompt": plain_text(prompt), "messages": turns, "first": first, "second": second}
        try:
            text = self._compiled.render(**values, boundary=_boundary(turns, first, second))
        except (TemplateError, TypeError, KeyError) as error:
            raise JudgeError(f"judge template {self.name}: {error}; it may use {', '.join(values)}, boundary") from None
        return [{"role": "user", "content": text.strip()}]

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        try:
            return environment.from_string(self.text)
        except TemplateError as error:
            raise JudgeError(f"judge template {self.name}: {error}; fix the template") from None


def load_template(name: str) -> Template:
    """One of ours by its name, or the user's .j2 file. Raises JudgeError if it cannot be read or omits a text."""
    ours = sorted(path.stem for path in ASSETS.glob("*.j2"))
    path = ASSETS / f"{name}.j2" if name in ours else Path(os.path.expanduser(name))
    try:
        template = Template(name, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
        raise JudgeError(f"judge template {name}: {reason}; give a .j2 file, or one of {', '.join(ours)}") from None
    probe = {"prompt": "a-question", "first": "an-answer", "second": "another-answer"}
    (question,) = template.messages(**probe)
    missing = [key for key, text in probe.items() if text not in question["content"]]
    if missing:
        raise JudgeError(f"judge template {name}: it does not show {', '.join(missing)}; add {{{{ {missing[0]} }}}}")
    return template


def orders(template: Template, comparison: Comparison) -> list[list[dict[str, str]]]:
    """The question in both orders: the first response shown as A, then the second."""
    first, second = comparison.first, comparison.second
    return [template.messages(comparison.prompt, *shown) for shown in ((first, second), (second, first))]


def stricter(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The same question with a sterner word about the form of the answer."""
    *before, last = messages
    return [*before, {**last, "content": f"{last['content']}\n\n{STRICTER}"}]


def verdict(answer: str) -> float | None:
    """1 for A, 0 for B, 0.5 for TIE; None if the answer is no verdict.

    The last line must be one of the three and nothing else, and no other line may be one too.
    """
    lines = [line.strip() for line in answer.strip().splitlines()]
    verdicts = [line for line in lines if line in VERDICTS]
    return VERDICTS[lines[-1]] if len(verdicts) == 1 and lines[-1] in VERDICTS else None


def _boundary(turns: Sequence[dict[str, Any]], first: str, second: str) -> str:
    """Twelve hex digits that occur in no text: the same for both orders and every run, so that answers can be kept."""
    whole = json.dumps([list(turns), *sorted((first, second))])
    code = hashlib.sha256(whole.encode()).hexdigest()
    while code[:12] in whole:
        code = hashlib.sha256(code.encode()).hexdigest()
    return code[:12]
