"""Pairs as token ids. A prompt is never cut; a response ends at the token that ends a sampled response."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, Literal, Protocol, runtime_checkable

from distalign.data.pairs import Data, Message, Pair, Prompt, Text, check_unicode, plain_text
from distalign.data.readers import DataError, Problem
from distalign.errors import InputError

# Words that no template writes by itself; what stands before a response that is encoded or decoded without its prompt.
_WORDS, _BEFORE = "distalignprobe", "\n"
_NO_TEMPLATE = "the rows are chats and the tokenizer has no chat template; set tokenizer.chat_template or give strings"

# Templates that write today's date are given this one: a run goes on, and is measured, on other days than it began.
_DAY = {code: datetime(2025, 1, 1).strftime(f"%{code}") for code in "aAbBcdHIjmMpSUwWxXyYzZ"}
_DAY |= {"-d": "1", "-m": "1", "e": " 1", "F": "2025-01-01"}
_SAME_DAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f".replace('%{code}', '{text}')" for code, text in _DAY.items())
    + " }}{%- endmacro +%}"
)
# A tool that is offered where it is tried what a template writes of its calls.
_TOOL = {
    "type": "function",
    "function": {
        "name": "get",
        "description": "Get it.",
        "parameters": {"type": "object", "properties": {"it": {"type": "string", "description": "It."}}},
    },
}
# Where a message has words, and what JSON writes as it is.
_PLAIN = re.compile("[A-Za-z0-9]+")
_WORDS_IN = ("content", "reasoning_content", "reasoning", "thinking")

# By chat template, and whether rows have tools, what `_forms` found.
_FORMS: dict[tuple[str, bool], list[Callable[[Message], Message]]] = {}


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    eos_token_id: int | None
    bos_token_id: int | None
    chat_template: Any
    apply_chat_template: Callable[..., Any]
    decode: Callable[..., Any]
    __call__: Callable[..., Any]


@dataclass(frozen=True)
class EncodedPair:
    """One pair as ids: the model reads prompt + chosen and prompt + rejected.

    Responses end with the token that ends a response (unless cut by max_response_tokens), so ln π counts it. There is
    no padding, hence no mask to confuse with a pad token that is also the end token. `row` is what it was made of.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    probability: float | None
    where: str
    row: Pair | Prompt | None = field(default=None, compare=False, repr=False)

    @property
    def label(self) -> float:
        """The probability that `chosen` is preferred."""
        return 1.0 if self.probability is None else self.probability

    @property
    def key(self) -> tuple[tuple[int, ...], ...]:
        """What any model reads of it: equal for equal pairs, also for a copy from another process."""
        return tuple(map(tuple, (self.prompt, self.chosen, self.rejected)))

    @property
    def question(self) -> tuple[object, ...]:
        """What several pairs may be answers to."""
        return tuple(self.prompt)


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as ids, and the row that it came from."""

    prompt: list[int]
    where: str = "prompt"
    row: Pair | Prompt | None = field(default=None, compare=False, repr=False)

    @property
    def question(self) -> tuple[object, ...]:
        """The ids, and the other columns, which a reward may read: two rows with both are one question."""
        return tuple(self.prompt), None if self.row is None else repr(self.row.extra)


def prompts_of(pairs: Iterable[EncodedPair]) -> list[EncodedPrompt]:
    """The prompts of the pairs, each once, with the last row that has it."""
    return list({pair.question: EncodedPrompt(pair.prompt, pair.where, pair.row) for pair in pairs}.values())


def independent(pairs: Iterable[EncodedPair]) -> list[tuple[object, ...]]:
    """A key for each pair, the same for pairs that an error must not count apart: its prompt.

    Where all are of one prompt, which is then all that is spoken of, a pair is its own.
    """
    pairs = list(pairs)
    prompts = [pair.question for pair in pairs]
    return prompts if len(set(prompts)) > 1 else [(pair.where, *pair.key) for pair in pairs]


@dataclass
class Counts:
    """What became of the pairs while encoding.

    `too_long` pairs did not fit max_length, `same_after_cut` differed only in what max_response_tokens cut off:
    both are left out. `cut_chosen` and `cut_rejected` responses lost their end. Tokens are those of the pairs kept.
    """

    pairs: int = 0
    kept: int = 0
    too_long: int = 0
    cut_chosen: int = 0
    cut_rejected: int = 0
    same_after_cut: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0

    def __str__(self) -> str:
        counts = [(getattr(self, f.name), f.name.replace("_", " ")) for f in fields(self)]
        return ", ".join(f"{count:,} {name}" for count, name in counts if count) or "no pairs"


def end_token_id(tokenizer: Tokenizer, *, conversational: bool) -> int:
    """The token that ends a response, at which sampling has to stop too.

    For strings the end-of-sequence token; in a chat the first special token that the template writes after the words
    of an assistant's turn, such as `<|im_end|>`. Raises InputError if there is none.
    """
    if not conversational:
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
        return tokenizer.eos_token_id
    if not tokenizer.chat_template:
        raise InputError(_NO_TEMPLATE)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _WORDS}]
    try:
        _, words, after = _render(tokenizer, turns, {}, False).rpartition(_WORDS)
    except Exception as error:  # a template may raise anything
        raise InputError(f"the chat template fails on a question and its answer ({error}); mend it") from error
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {index for index, token in added.items() if token.special} | {tokenizer.eos_token_id}
    for index in _ids(tokenizer, after) if words else ():
        if index in special:
            return index
    raise InputError(
        "the chat template writes no special token after an assistant's words, so that where a response ends is not "
        "known; add {{ eos_token }} to it there, or set end_token_id (AlignmentConfig)"
    )


def decode_after(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a response, without special tokens, as it stands after a prompt.

    By itself some tokenizers (Metaspace, of SentencePiece) would take its first space off.
    """
    before = _ids(tokenizer, _BEFORE)
    start, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (before, [*before, *ids]))
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(ids, skip_special_tokens=True)


def encode_prompt(tokenizer: Tokenizer, row: Prompt | Pair) -> list[int]:
    """The ids that a response follows: the text after one BOS where the tokenizer uses it, or the rendered chat.

    Of `row.extra`, `tools` and `chat_template_kwargs` reach the chat template. Raises DataError.
    """
    if isinstance(row.prompt, str):
        ids, bos = _ids(tokenizer, row.prompt), tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos] and tokenizer(row.prompt)["input_ids"][:1] == [bos]:
            ids = [bos, *ids]
        return ids
    text = _chat(tokenizer, row, row.prompt, prompt=True)
    asked = [message for message in row.prompt if message["role"] != "assistant"]
    _check_written(row, "the prompt", [*asked, {"tool_calls": row.extra.get("tools")}], text)
    return _ids(tokenizer, text)


def encode_pair(
    tokenizer: Tokenizer, row: Pair, *, max_response_tokens: int | None = None, end_id: int | None = None
) -> EncodedPair:
    """One pair as token ids.

    Strings: prompt and response are encoded apart, so no token spans the boundary, the response as a text that goes on
    (no space is put before it); the end-of-sequence token is added once. Chats: the template renders prompt and
    response together, and what follows the prompt's ids is the response, up to its end token: the newline that many
    templates write after it is not sampled, so it is not scored. An `end_id` that the template does not write is added.
    A response of more than `max_response_tokens` tokens is cut, and then has no end token. `end_id` defaults to
    `end_token_id`. Raises DataError if the prompt's ids are not the start of the whole, or the end token stands inside
    a response.
    """
    if end_id is None:
        end_id = end_token_id(tokenizer, conversational=not isinstance(row.prompt, str))
    prompt = encode_prompt(tokenizer, row)
    if not prompt:
        raise DataError([Problem(row.where, "prompt has no tokens; give the model something to answer")])
    responses = []
    for name, text in (("chosen", row.chosen), ("rejected", row.rejected)):
        response = _response(tokenizer, row, text, prompt, name, end_id)
        responses.append(response[:max_response_tokens])
    return EncodedPair(prompt, responses[0], responses[1], row.probability, row.where, row)


def encode_pairs(
    tokenizer: Tokenizer,
    data: Data[Pair],
    *,
    max_length: int | None,
    max_response_tokens: int | None = None,
    too_long: Literal["error", "drop"] = "error",
    end_id: int | None = None,
) -> tuple[list[EncodedPair], Counts]:
    """All pairs as token ids, and what was cut or left out on the way.

    A pair whose prompt and longer response exceed `max_length` together is an error, or with too_long="drop" left out;
    responses are cut only if `max_response_tokens` asks for it, prompts never. Raises DataError with every problem.
    """
    counts, problems, encoded = Counts(pairs=len(data)), [], []
    try:
        if end_id is None:
            end_id = end_token_id(tokenizer, conversational=data.format == "conversational")
    except ValueError as error:
        raise DataError([Problem(data.source, str(error))]) from None
    for row in data:
        try:
            pair = encode_pair(tokenizer, row, max_response_tokens=max_response_tokens, end_id=end_id)
        except DataError as error:
            problems.extend(error.problems)
            continue
        cut_chosen, cut_rejected = pair.chosen[-1] != end_id, pair.rejected[-1] != end_id
        longer = max(len(pair.chosen), len(pair.rejected))
        if max_length is not None and len(pair.prompt) + longer > max_length:
            counts.too_long += 1
            if too_long == "error":
                problems.append(Problem(row.where, _too_long(len(pair.prompt), longer, max_length)))
        elif pair.chosen == pair.rejected:
            counts.same_after_cut += 1
            if not cut_chosen:
                what = f"chosen and rejected differ {_difference(row)} and are the same tokens; remove the line"
                problems.append(Problem(row.where, what))
        else:
            encoded.append(pair)
            counts.cut_chosen += cut_chosen
            counts.cut_rejected += cut_rejected
            counts.prompt_tokens += len(pair.prompt)
            counts.response_tokens += len(pair.chosen) + len(pair.rejected)
    if not encoded and not problems:
        problems.append(Problem(data.source, f"no pair is left ({counts}); raise max_length or max_response_tokens"))
    if problems:
        raise DataError(problems)
    counts.kept = len(encoded)
    return encoded, counts


def _difference(row: Pair) -> str:
    """In what two responses differ that are the same tokens."""
    if not isinstance(row.chosen, str) and not isinstance(row.rejected, str):
        chosen, rejected = row.chosen[-1], row.rejected[-1]
        parts = [key for key in {**chosen, **rejected} if key != "content" and chosen.get(key) != rejected.get(key)]
        if parts:
            return f"only in what the chat template leaves out (of {', '.join(parts)})"
    spaces = plain_text(row.chosen).split() == plain_text(row.rejected).split()
    return "in white space only" if spaces else "only in what the tokenizer leaves out"


def _too_long(prompt: int, response: int, limit: int) -> str:
    found = (
        f"max_length is {limit}; raise it if the model has more positions, shorten or remove the row, or in training"
    )
    if prompt >= limit:
        return f"the prompt has {prompt} tokens (prompts are never cut) and {found} set too_long: drop"
    return (
        f"prompt and response have {prompt} + {response} tokens and {found} "
        f"cut responses with max_response_tokens (here at most {limit - prompt}), or set too_long: drop"
    )


def _response(tokenizer: Tokenizer, row: Pair, text: Text, prompt: list[int], name: str, end_id: int) -> list[int]:
    if isinstance(text, str):
        # As it stands after a prompt: by itself some tokenizers would put a space before it.
        before, whole = _ids(tokenizer, _BEFORE), _ids(tokenizer, _BEFORE + text)
        ids = whole[len(before) :] if whole[: len(before)] == before else _ids(tokenizer, text)
        ids = ids if ids[-1:] == [end_id] else [*ids, end_id]
        inside = end_id in ids[:-1]
    else:
        rendered = _chat(tokenizer, row, [*row.prompt, *text], prompt=False)
        _check_written(row, name, [message for message in text if message["role"] == "assistant"], rendered)
        whole = _ids(tokenizer, rendered)
        if whole[: len(prompt)] != prompt:
            raise DataError([Problem(row.where, _boundary(tokenizer, row, prompt, whole, rendered, name))])
        ids = whole[len(prompt) :]
        if end_id not in ids and rendered.rstrip().endswith(plain_text(text).strip()):
            ids = [*ids, end_id]
        if end_id not in ids:
            what = f"the chat template did not end {name} with {tokenizer.decode([end_id])!r}; check the template"
            raise DataError([Problem(row.where, what)])
        ids = ids[: ids.index(end_id) + 1]
        inside = tokenizer.decode([end_id]) in plain_text(text)
    if inside:
        what = f"{name} contains the end token {tokenizer.decode([end_id])!r} in its text; remove it from the text"
        raise DataError([Problem(row.where, what)])
    return ids


def _check_written(row: Prompt | Pair, name: str, messages: Iterable[Message], text: str) -> None:
    """Raise DataError for words, or a call's name or arguments, that the chat template leaves out.

    White space does not count. What a tool answered may be written as JSON: its plain words are looked for.
    """
    written = "".join(text.split())
    for message in messages:
        calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
        # What stands in JSON may be escaped: its plain words are looked for.
        answered = message.get("role") == "tool"
        parts = [(message.get(key), answered) for key in _WORDS_IN]
        parts += [(call.get("name"), False) for call in calls]
        parts += [(part, True) for call in calls for part in _leaves(call.get("arguments"))]
        for part, escaped in parts:
            if not isinstance(part, str):
                continue
            words = _PLAIN.findall(part) if escaped else ["".join(part.split())]
            if any(word not in written for word in words):
                what = f"the chat template leaves out {part[:60]!r} of {name}"
                raise DataError([Problem(row.where, f"{what}; take it out, or use a template that writes it")])


def _leaves(value: object) -> Iterator[str]:
    """The texts and whole numbers in a value, and the names of its settings."""
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        yield str(value)
    elif isinstance(value, Mapping | list):
        for part in [*value, *value.values()] if isinstance(value, Mapping) else value:
            yield from _leaves(part)


def _boundary(tokenizer: Tokenizer, row: Pair, prompt: list[int], whole: list[int], text: str, name: str) -> str:
    """Why the prompt's ids are not the start of those of `text`, the whole conversation."""
    at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    alone, together = (tokenizer.decode(ids[at : at + 3]) for ids in (prompt, whole))
    asked, turns = (_chat(tokenizer, row, row.prompt, prompt=prompt) for prompt in (True, False))
    if text.startswith(asked):
        cause = f"the tokenizer merges the prompt's end with the start of {name}; remove white space at its start"
    elif text.startswith(turns):
        cause = (
            f"the chat template asks for an answer with {asked.removeprefix(turns)!r}, and does not write that before "
            "an answer (a thinking model?); set chat_template_kwargs (enable_thinking), or mend the template"
        )
    else:
        what = "earlier turns" if len(row.prompt) > 1 else "the question where an answer follows"
        cause = f"the chat template rewrites {what}; use a template that only appends"
    return f"the prompt's tokens are not the start of prompt + {name}: {alone!r} becomes {together!r}. Here {cause}"


def _chat(tokenizer: Tokenizer, row: Prompt | Pair, messages: Sequence[Any], *, prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise DataError([Problem(row.where, _NO_TEMPLATE)])
    try:
        text = _render(tokenizer, messages, row.extra, prompt)
    except Exception as error:  # a template may raise anything
        raise DataError(
            [Problem(row.where, f"the chat template refuses the row ({error}); change its turns")]
        ) from None
    # Also of roles, tools and what else a template writes.
    check_unicode(text, "the chat", row.where)
    return text


def _render(tokenizer: Tokenizer, messages: Sequence[Message], extra: dict[str, Any], prompt: bool) -> str:
    tools = extra.get("tools")
    settings = {"tools": tools, **(extra.get("chat_template_kwargs") or {})}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default" if tools is None else "tool_use", template.get("default"))
    if isinstance(template, str) and "strftime_now" in template:
        settings["chat_template"] = _SAME_DAY + template
    turns = list(messages)
    for form in _forms(tokenizer, with_tools=tools is not None):
        turns = [form(turn) for turn in turns]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **settings)


def _forms(tokenizer: Tokenizer, *, with_tools: bool) -> list[Callable[[Message], Message]]:
    """What messages are turned into, as the template, that of rows with tools or without, reads them in no other form.

    Those of models that see images write a message's words only from a list of parts, some a call's arguments only
    from JSON text: of an object they would write what Python's str makes of it, or nothing.
    """
    template, tools = (str(tokenizer.chat_template), with_tools), [_TOOL] if with_tools else None
    arguments = {_WORDS: 1}

    def writes(*messages: Message) -> bool:
        try:
            text = tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False)
        except Exception:  # a template may raise anything
            return False
        return _WORDS in text and str(arguments) not in text

    if template not in _FORMS:
        asked = {"role": "user", "content": _WORDS}
        calls = [{"id": "call00000", "type": "function", "function": {"name": "get", "arguments": arguments}}]
        called = {"role": "assistant", "content": "", "tool_calls": calls}
        before = {"role": "user", "content": "x"}
        parts = not writes(asked) and writes(_in_parts(asked))
        text = not writes(before, called) and writes(before, _with_text(called))
        _FORMS[template] = [_in_parts] * parts + [_with_text] * text
    return _FORMS[template]


def _with_text(message: Message) -> Message:
    """The message with the arguments of its tool calls as JSON text."""

    def with_text(call: Message) -> Message:
        inner: Message = {key: with_text(part) for key, part in call.items() if key == "function"}
        if isinstance(arguments := call.get("arguments"), dict):
            inner["arguments"] = json.dumps(arguments, ensure_ascii=False)
        return {**call, **inner}

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [with_text(call) for call in calls]} if calls else message


def _in_parts(message: Message) -> Message:
    """The message with its text as a list of one part."""
    text = message.get("content")
    return {**message, "content": [{"type": "text", "text": text}]} if isinstance(text, str) else message


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
