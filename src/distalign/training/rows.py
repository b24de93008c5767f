"""The rows that a run learns from and those that are held out: read, checked and encoded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from distalign.data import (
    Data,
    DataError,
    EncodedPair,
    EncodedPrompt,
    Pair,
    Tokenizer,
    encode_pairs,
    encode_prompt,
    has_pairs,
    label_warnings,
    prompts_of,
    read_pairs,
    read_prompts,
)
from distalign.data.readers import Problem
from distalign.methods import Method
from distalign.training.config import AlignmentConfig
from distalign.training.rollout_settings import TrainingError
from distalign.training.rounds import Row

logger = logging.getLogger("distalign.training.trainer")

# A path, a hub id, or rows: dicts, what `read_pairs` gives, or encoded ones.
RowSource = str | Path | Iterable[Any]


def check_kind(name: str, value: object, kind: Any, wanted: str) -> None:
    """Raise TrainingError for an argument of another kind, where Python's own error would come late and not name it."""
    if not isinstance(value, kind):
        raise TrainingError(f"{name} is a {type(value).__name__}; give {wanted}")


@dataclass
class Rows:
    """What is learned from, and what is held out, encoded; `statistics` say what was read, for the model card."""

    train: list[Row]
    pairs: list[EncodedPair]
    held_out: dict[str, list[EncodedPair]] | list[EncodedPair] | None
    statistics: dict[str, Any] = field(default_factory=dict)

    @property
    def conversational(self) -> bool:
        """Whether the rows are chats."""
        return _is_chat(self.train[0])

    @property
    def first_held_out(self) -> list[EncodedPair]:
        """The held-out pairs, or the first set of several."""
        sets = self.held_out
        return next(iter(sets.values()), []) if isinstance(sets, dict) else (sets or [])


def read_rows(
    train: RowSource | None,
    held_out: RowSource | Mapping[str, RowSource] | None,
    tokenizer: Tokenizer,
    method: Method,
    encode: Callable[[Any, str], list[EncodedPair]],
) -> Rows:
    """Rows in TRL's columns: a path, a hub id, a `datasets.Dataset`, a list of dicts; or what `read_pairs` gives.

    Rows that are encoded already are taken as they are. `encode` is `read_pairs_of` for this run. A method without
    labelled pairs learns from the prompts, each once. Raises DataError with every problem.
    """
    if train is None:
        raise TrainingError("train_dataset is None; give rows of prompt, chosen and rejected, or their file")
    check_kind("train_dataset", train, Path | Iterable, "rows, or their file")
    if not (isinstance(train, str | Path | Sequence | Data) or hasattr(train, "column_names")):
        train = list(train)
    labelled = "labelled" in method.needs.pairs
    pairs: list[EncodedPair] = []
    if _encoded(train):
        rows: list[Row] = _sound(train, "train_dataset")
        pairs = [row for row in rows if isinstance(row, EncodedPair)]
    elif labelled or (isinstance(train[0], Pair) if isinstance(train, Data) else has_pairs(train)):
        pairs = encode(train, "train_dataset")
        rows = list(pairs) if labelled else list(prompts_of(pairs))
    else:
        data = train if isinstance(train, Data) else read_prompts(train)
        prompts = [EncodedPrompt(encode_prompt(tokenizer, row), row.where, row) for row in data]
        rows = list({row.question: row for row in prompts}.values())
    place = f" of {train}" if isinstance(train, str | Path) else ""
    statistics = {"train_dataset": f"{len(rows)} {'pairs' if labelled else 'prompts'}{place}"}
    if isinstance(held_out, Mapping):
        held = {str(name): encode(part, f"eval_dataset {name}") for name, part in held_out.items()}
    else:
        held = None if held_out is None else encode(held_out, "eval_dataset")
    made = Rows(rows, pairs, held, statistics)
    if labelled:
        for warning in label_warnings([row.row for row in pairs if isinstance(row.row, Pair)]):
            logger.warning("train_dataset: %s", warning)
    if not _encoded(train):
        learned = {tuple(row.prompt) for row in rows}
        for name, part in (held if isinstance(held, Mapping) else {"eval_dataset": held or []}).items():
            if any(_is_chat(pair) != made.conversational for pair in part):
                raise TrainingError(
                    f"{name}: rows of another form than train_dataset's (strings, or messages); write both the same way"
                )
            if shared := learned & {tuple(pair.prompt) for pair in part}:
                logger.warning("%d prompts of %s are in train_dataset too: held out they are not", len(shared), name)
    if isinstance(held, Mapping):
        statistics |= {f"eval_dataset {name}": f"{len(part)} pairs" for name, part in held.items()}
    elif held:
        statistics["eval_dataset"] = f"{len(held)} pairs"
    return made


def read_pairs_of(
    rows: RowSource, name: str, *, tokenizer: Tokenizer, args: AlignmentConfig, limit: int | None
) -> list[EncodedPair]:
    """Pairs, checked and encoded; those that are encoded already are taken as they are. Raises DataError.

    `limit` is the number of positions of the model; `name` says in the log which rows these are.
    """
    check_kind(name, rows, Path | Iterable, "rows, or their file")
    if _encoded(rows):
        return [row for row in _sound(rows, name) if isinstance(row, EncodedPair)]
    data = rows if isinstance(rows, Data) else read_pairs(rows, drop_ties=args.drop_ties)
    if data.ties:
        logger.warning("%s: %d ties are left out (drop_ties)", name, data.ties)
    pairs, counts = encode_pairs(
        tokenizer,
        data,
        max_length=min((length for length in (args.max_length, limit) if length is not None), default=None),
        max_response_tokens=args.max_response_tokens,
        too_long=args.too_long,
        end_id=args.end_token_id,
    )
    left_out = counts.kept < counts.pairs or counts.cut_chosen or counts.cut_rejected
    logger.log(logging.WARNING if left_out else logging.INFO, "%s: %s", name, counts)
    return pairs


def _is_chat(row: Row) -> bool:
    return row.row is not None and not isinstance(row.row.prompt, str)


def _encoded(rows: object) -> TypeGuard[Sequence[Row]]:
    """Whether the rows are token ids already."""
    return isinstance(rows, Sequence) and len(rows) > 0 and isinstance(rows[0], EncodedPair | EncodedPrompt)


def _sound(rows: Sequence[Row], name: str) -> list[Row]:
    """Encoded rows, which no reader has checked. Raises DataError with every problem."""
    problems = []
    for number, row in enumerate(rows, 1):
        parts = [getattr(row, part) for part in ("prompt", "chosen", "rejected") if hasattr(row, part)]
        if type(row) is not type(rows[0]):
            what = f"{type(row).__name__} among rows of {type(rows[0]).__name__}"
        elif not all(parts) or any(min(ids) < 0 for ids in parts):
            what = "no token, or one below 0, in the prompt or a response"
        elif isinstance(row, EncodedPair) and row.chosen == row.rejected:
            what = "chosen and rejected are the same tokens"
        elif isinstance(row, EncodedPair) and not 0 <= row.label <= 1:
            what = f"probability is {row.probability}, not between 0 and 1"
        else:
            continue
        problems.append(Problem(f"{name}:{number}", f"{what}; mend or remove the row"))
    if problems:
        raise DataError(problems)
    return list(rows)
