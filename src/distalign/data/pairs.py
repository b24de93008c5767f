"""Preference pairs and prompts in TRL's columns: read all of a source, check every row, refuse what is not clear."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from difflib import get_close_matches
from numbers import Real
from typing import Any, Generic, Literal, NoReturn, TypeVar

from distalign.data.readers import DataError, Problem, Record, Source, decode_json, describe, read_records

Message = dict[str, Any]
Text = str | list[Message]
Format = Literal["standard", "conversational"]

# What a prompt of a transcript ends with: hh-rlhf, TL;DR, Alpaca. The response starts right after it.
RESPONSE_MARKS = ("\n\nAssistant:", "\nTL;DR:", "\n### Response:")
TURN_MARKS = (*RESPONSE_MARKS, "\n\nHuman:", "\n### Instruction:")
_CALLS = 'write it as "tool_calls": [{"function": {"name": "…", "arguments": {…}}}]'
_PAIR_COLUMNS = ("prompt", "chosen", "rejected", "p_chosen", "chosen_reward", "rejected_reward")


@dataclass(frozen=True)
class Pair:
    """One labelled comparison. Strings (standard) or lists of messages (conversational); a response is one message.

    `probability` is that of the label, p_chosen (None: certain); `extra` holds the columns that nothing here reads.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    where: str = "row"
    probability: float | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """One prompt, as in `Pair`."""

    prompt: Text
    where: str = "row"
    extra: dict[str, Any] = field(default_factory=dict)


Row = TypeVar("Row", Pair, Prompt)


@dataclass(frozen=True)
class Data(Generic[Row]):
    """Rows that passed every check, in the order of the source.

    `implicit` says that the prompts were cut from the responses; `read` and `ties` count the rows read, and those left
    out because both responses are the same.
    """

    rows: list[Row]
    source: str
    format: Format
    implicit: bool = False
    read: int = 0
    ties: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def read_pairs(
    source: Source, *, split: str | None = None, drop_ties: bool = False, limit: int | None = None
) -> Data[Pair]:
    """Read preference pairs: JSON lines (.gz too), CSV, Parquet, a `datasets` folder, a hub id, or rows in memory.

    Every row is checked before anything is returned; DataError lists what is wrong, place by place. `drop_ties` leaves
    out (and counts) pairs whose responses are the same, or whose p_chosen is 0.5; `limit` stops after that many pairs.
    """
    return _read(source, split, limit, lambda row, where: _pair(row, where, drop_ties=drop_ties))


def has_pairs(source: Source) -> bool:
    """Whether the first row has a `chosen` column: pairs, and not prompts alone. Raises DataError as `read_pairs`."""
    problems: list[Problem] = []
    for _, record in read_records(source, problems):
        return "chosen" in record
    raise DataError(problems or [Problem(describe(source), "no rows; is it the right file?")])


def read_prompts(source: Source) -> Data[Prompt]:
    """Read the `prompt` column of anything that `read_pairs` reads; the other columns are kept in `extra`."""
    return _read(source, None, None, _prompt)


def split_by_prompt(data: Data[Row], held_out: float, seed: int = 0) -> tuple[Data[Row], Data[Row]]:
    """(kept, held out): a prompt is held out with probability `held_out`, by a hash of its text and the seed.

    Rows with the same prompt (case and white space aside) stay together, and where a prompt falls depends on nothing
    else in the data. Raises DataError if one of the two parts would be empty.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}; give a share of the prompts, at least 0 and less than 1")
    kept, held = [], []
    for row in data.rows:
        digest = hashlib.sha256(f"{seed}\n{prompt_key(row.prompt)}".encode()).digest()
        is_held = int.from_bytes(digest[:8], "big") / 2**64 < held_out
        (held if is_held else kept).append(row)
    if held_out and not (kept and held):
        part = "training" if not kept else "held-out"
        reason = f"no prompt falls in the {part} part of a {held_out:g} split; give more prompts, another share or seed"
        raise DataError([Problem(data.source, reason)])
    return replace(data, rows=kept), replace(data, rows=held)


def prompt_key(prompt: Text) -> str:
    """What makes two prompts the same: their roles and words, not their case or white space."""
    text = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m.get('content')}" for m in prompt)
    return " ".join(text.split()).casefold()


def plain_text(text: Text) -> str:
    """The words of a prompt or response: a string as it is, messages joined."""
    return text if isinstance(text, str) else "\n\n".join(m.get("content") or "" for m in text)


def _read(
    source: Source, split: str | None, limit: int | None, build: Callable[[Record, str], tuple[Row | None, bool]]
) -> Data[Row]:
    problems: list[Problem] = []
    rows: list[Row] = []
    read = 0
    shape: tuple[Format, bool] | None = None
    for where, record in read_records(source, problems, split=split):
        if limit is not None and len(rows) >= limit:
            break
        read += 1
        try:
            if names := [key for key in record if not isinstance(key, str)]:
                _refuse(where, f"{names[0]!r} is a column's name and no text; name columns by text")
            row, implicit = build({k: v for k, v in record.items() if v is not None}, where)
        except DataError as error:
            problems.extend(error.problems)
            continue
        if row is None:
            continue
        row_shape: tuple[Format, bool] = ("standard" if isinstance(row.prompt, str) else "conversational", implicit)
        shape = shape or row_shape
        if row_shape != shape:
            texts = " and ".join(
                f"{kind} with {'an implicit' if cut else 'a'} prompt" for kind, cut in (row_shape, shape)
            )
            problems.append(Problem(where, f"{texts} in one source; write all rows like the first"))
        rows.append(row)
    name = describe(source, split)
    if problems:
        raise DataError(problems)
    if shape is None:
        ties = f"{read} rows, all of them ties; nothing is left to learn from"
        raise DataError([Problem(name, ties if read else "no rows; is it the right file?")])
    return Data(rows, name, *shape, read=read, ties=read - len(rows))


def _pair(row: Record, where: str, *, drop_ties: bool) -> tuple[Pair | None, bool]:
    """The pair of a row (None: a tie to leave out), and whether its prompt was cut from the responses."""
    chosen, rejected = (_text(row, name, where) for name in ("chosen", "rejected"))
    if type(chosen) is not type(rejected):
        _refuse(where, "chosen and rejected are a string and a message list; write both the same way")
    implicit = "prompt" not in row
    if chosen == rejected:
        if not drop_ties:
            _refuse(
                where,
                "chosen and rejected are the same text; remove the line, or leave ties out (drop_ties: "
                "true, or --drop-ties)",
            )
        return None, implicit
    if implicit:
        prompt, chosen, rejected = _cut_prompt(chosen, rejected, where)
    else:
        prompt = _text(row, "prompt", where)
        if not isinstance(prompt, str) or not isinstance(chosen, str):
            prompt, chosen, rejected = _as_messages(prompt, chosen, rejected, where)
    _check_prompt(prompt, where)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        _check_filled(name, text, where)
        if not isinstance(text, str) and [m["role"] for m in text] != ["assistant"]:
            roles = ", ".join(m["role"] for m in text)
            _refuse(where, f"{name} holds the turns {roles}; a response is one assistant turn, the rest is the prompt")
    probability = _number(row, "p_chosen", where)
    if probability == 0.5 and drop_ties:
        return None, implicit
    if probability is not None and not 0 <= probability <= 1:
        _refuse(where, f"p_chosen is {probability:g}; a probability between 0 and 1 is needed")
    rewards = [_number(row, f"{name}_reward", where) for name in ("chosen", "rejected")]
    if (rewards[0] is None) != (rewards[1] is None):
        _refuse(where, "only one of chosen_reward and rejected_reward; give both or neither")
    extra = _extra(row, _PAIR_COLUMNS, where)
    return Pair(prompt, chosen, rejected, where, probability, rewards[0], rewards[1], extra), implicit


def _prompt(row: Record, where: str) -> tuple[Prompt, bool]:
    prompt = _text(row, "prompt", where)
    _check_prompt(prompt, where)
    # The pair of a row that has one is no other column of its prompt.
    used = _PAIR_COLUMNS if {"chosen", "rejected"} <= row.keys() else ("prompt",)
    return Prompt(prompt, where, _extra(row, used, where)), False


def _check_prompt(prompt: Text, where: str) -> None:
    _check_filled("prompt", prompt, where)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        _refuse(where, "prompt ends with an assistant turn; end it with the turn to answer")


def _check_filled(name: str, text: Text, where: str) -> None:
    # A tool call is an answer without words.
    if not plain_text(text).strip() and (isinstance(text, str) or not any(m.get("tool_calls") for m in text[-1:])):
        _refuse(where, f"{name} is empty; fill it in or remove the line")


def _as_messages(prompt: Text, chosen: Text, rejected: Text, where: str) -> tuple[Text, Text, Text]:
    """Messages throughout: a string is one turn, and a prompt that both message lists repeat is taken off them."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        return prompt, [{"role": "assistant", "content": chosen}], [{"role": "assistant", "content": rejected}]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if len(chosen) > 1 and isinstance(prompt, str):
        full, chosen, rejected = _cut_prompt(chosen, rejected, where)
        if full[-1].get("content") != prompt:
            _refuse(where, "prompt is not the last turn before the responses; write it as a message list")
        return full, chosen, rejected
    if chosen[: len(turns)] == turns == rejected[: len(turns)]:
        chosen, rejected = chosen[len(turns) :], rejected[len(turns) :]
    return turns, chosen, rejected


def _cut_prompt(chosen: Text, rejected: Text, where: str) -> tuple[Any, Any, Any]:
    """Cut the prompt that both responses start with, at a turn boundary. Refuses where the boundary is not certain."""
    same = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    advice = 'write the prompt in a column "prompt" of its own, or remove the line'
    if isinstance(chosen, str):
        start = chosen[:same]
        cut = max((start.rfind(mark) + len(mark) for mark in RESPONSE_MARKS if mark in start), default=0)
        if not cut:
            what = "no common start" if not start.split() else "the common start ends at no turn"
            marks = ", ".join(mark.strip() for mark in RESPONSE_MARKS)
            _refuse(where, f"no prompt, and {what} ({marks}), so where the responses begin is a guess; {advice}")
        if any(mark in text[cut:] for text in (chosen, rejected) for mark in TURN_MARKS):
            _refuse(where, f"no prompt, and the transcripts part before their last turn; {advice}")
        return chosen[:cut], chosen[cut:], rejected[cut:]
    if not same:
        _refuse(where, f"no prompt, and the message lists have no common start; {advice}")
    if same == min(len(chosen), len(rejected)):
        _refuse(where, f"no prompt, and one message list is the start of the other; {advice}")
    return chosen[:same], chosen[same:], rejected[same:]


def _text(row: Record, name: str, where: str) -> Text:
    """A column that must hold a string or a list of messages."""
    if name not in row:
        near = get_close_matches(name, row, 1)
        columns = ", ".join(f'"{column}"' for column in row) or "none"
        hint = f'rename "{near[0]}"' if near else f"add it or rename the column that holds the {name}"
        _refuse(where, f'no column "{name}" (found {columns}); {hint}')
    value = row[name]
    if isinstance(value, str):
        if value.lstrip().startswith("[{'"):
            _refuse(where, f"{name} is a message list written by Python's str; write it with json.dumps")
        if name == "prompt" and value.lstrip().startswith("[") and _is_messages(value):
            _refuse(where, f"{name} is a message list as JSON text; write the list itself (json.loads makes it)")
        check_unicode(value, name, where)
        return value
    if not isinstance(value, list):
        _refuse(where, f"{name} is {type(value).__name__}; a string or a list of messages is needed")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            _refuse(where, f'{name} is a list without messages; write {{"role": "user", "content": "…"}}')
        message = {key: part for key, part in message.items() if part is not None}
        if "function_call" in message:
            _refuse(where, f"{name} has a function_call, which chat templates do not read; {_CALLS}")
        if "tool_calls" in message:
            message["tool_calls"] = _calls(message["tool_calls"], name, where)
        if not isinstance(message.get("content", "" if "tool_calls" in message else None), str):
            kind = type(message.get("content")).__name__.replace("NoneType", "missing")
            _refuse(where, f"{name} has a message whose content is {kind}; a string is needed")
        check_unicode(message.get("content", ""), name, where)
        messages.append(message)
    return messages


def _is_messages(text: str) -> bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    turns = [part for part in found if isinstance(part, dict)] if isinstance(found, list) else []
    return any({"role", "content"} <= turn.keys() for turn in turns)


def _calls(calls: object, name: str, where: str) -> list[Message]:
    """The tool calls of a message, with arguments that are JSON text, as OpenAI writes them, read into the object."""
    if not isinstance(calls, list):
        _refuse(where, f"{name} has tool_calls that are {type(calls).__name__}; {_CALLS}")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            _refuse(where, f"{name} has tool_calls that name no function; {_CALLS}")
        if isinstance(arguments := function.get("arguments"), str):
            what = f"the arguments of {name}'s tool call"
            arguments = _json(arguments, what, "write an object, or json.dumps of it", where)
            if not isinstance(arguments, dict):
                _refuse(
                    where, f"{what} are JSON text of {type(arguments).__name__}; write an object, or json.dumps of it"
                )
            function = {**function, "arguments": arguments}
        read.append({**call, "function": function} if "function" in call else function)
    return read


def _json(text: str, what: str, advice: str, where: str) -> object:
    """What a column's JSON text holds."""
    try:
        return decode_json(text)
    except LookupError as error:
        _refuse(where, f"{what}: {error}")
    except (ValueError, RecursionError) as error:
        _refuse(where, f"{what}: text that is not JSON ({error}); {advice}")


def check_unicode(text: str, name: str, where: str) -> None:
    """Raise DataError for text that no tokenizer takes."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        _refuse(where, f"{name} holds half of a surrogate pair, which is no text; write the character whole")


def _number(row: Record, name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real | Decimal) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        _refuse(where, f"{name} is {repr(value)[:40]}; a finite number is needed")
    return number


def _extra(row: Record, used: Collection[str], where: str) -> dict[str, Any]:
    """The other columns. `tools` may be JSON text, as TRL prefers it: a table would fill in fields of other tools."""
    extra = {name: value for name, value in row.items() if name not in used}
    for name in ("images", "image"):
        if name in extra:
            _refuse(where, f'a column "{name}", and only text is read here; leave it out, or rename it if it is text')
    if isinstance(extra.get("tools"), str):
        extra["tools"] = _json(extra["tools"], "tools", "write a list of schemas, or json.dumps of it", where)
    if not isinstance(extra.get("tools"), list | None):
        _refuse(where, f"tools is {type(extra['tools']).__name__}; a list of schemas is needed")
    settings = extra.get("chat_template_kwargs") or {}
    if not isinstance(settings, Mapping):
        kind = "text" if isinstance(settings, str) else type(settings).__name__
        _refuse(where, f'chat_template_kwargs is {kind}; it must be an object, such as {{"enable_thinking": false}}')
    return extra


def _refuse(where: str, what: str) -> NoReturn:
    raise DataError([Problem(where, what)])


# Labels that no target fits -------------------------------------------------------------------------------------------

# Below this share of the pairs nothing is said; a prompt of more characters does not stand in a response by chance.
_FEW, _LONG = 0.01, 20


def label_warnings(rows: Sequence[Pair]) -> list[str]:
    """One sentence for each kind of rows by which the methods miss the target however many pairs there are.

    The floors (nats) were computed on a target of few responses known exactly: docs/data.md.
    """
    ties = sum(row.probability == 0.5 for row in rows) / len(rows) if rows else 0.0
    of_several = sum(any(_several(value) for value in row.extra.values()) for row in rows)
    repeated = sum(_repeats_prompt(row) for row in rows)
    found = []
    if repeated > len(rows) / 2:
        found.append(
            f"in {repeated} of {len(rows)} rows both responses begin with the whole prompt, which a response follows "
            "already: the prompt would stand twice; take it off the responses, or leave the column prompt out"
        )
    if ties > _FEW:
        found.append(
            f"{100 * ties:.0f} % of the pairs are ties written as p_chosen 0.5: learned as such they keep a distance "
            "from the target (0.01 nats at 19 % ties, 0.09 at 48 %); leave them out with drop_ties"
        )
    if of_several > _FEW * len(rows):
        found.append(
            f"{of_several} rows hold several responses of which the pair is two: if chosen is the best and rejected "
            "the worst, the distance from the target has a floor (0.3 nats); pair the best with a random other"
        )
    return found


def _repeats_prompt(row: Pair) -> bool:
    prompt = row.prompt.strip() if isinstance(row.prompt, str) else ""
    responses = (text for text in (row.chosen, row.rejected) if isinstance(text, str))
    return len(prompt) > _LONG and all(text.lstrip().startswith(prompt) for text in responses)


def _several(value: object) -> bool:
    """Whether a column holds three responses or more: texts with what was said of them."""
    if not isinstance(value, list) or len(value) < 3:
        return False
    return all(isinstance(one, dict) and {"response", "text", "completion"} & one.keys() for one in value)
