"""Answers on disk: one line of JSON for every answered request; lines are only ever added."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from distalign.judges.base import JudgeError

logger = logging.getLogger("distalign.judges")

_SYNC_EVERY = 1.0  # seconds
_BINARY = getattr(os, "O_BINARY", 0)  # Windows would turn line ends into others


@dataclass(frozen=True)
class Answer:
    """What a server said to one request; the tokens it read and wrote, None where it does not count them."""

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """Read and written together, as far as they were counted."""
        return (self.prompt_tokens or 0) + (self.completion_tokens or 0)


def content_key(**content: object) -> str:
    """SHA-256 of everything that an answer depends on, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class Cache:
    """The answers of a file by the key of their request; open while it is used as a context manager.

    A line is given to the operating system as soon as there is an answer, so a killed process loses none; it is forced
    to the disk once a second and at the end, so a power cut loses the answers of one second. A last line that was cut
    is dropped, with a warning. Only one process at a time may have it open: the lock is on a file beside it, with
    `.lock` added to its name, and the operating system frees it when the process ends, however it ends. Raises
    JudgeError for a file that another process writes, that cannot be opened, or that holds anything else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.expanduser(path))
        self.answers: dict[str, Answer] = {}
        self._lock = FileLock(f"{self.path}.lock")

    def __enter__(self) -> Cache:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _BINARY, 0o644)
        except Timeout:
            raise JudgeError(
                f"judge cache {self.path}: another process is writing it; wait for that one, or name another file"
            ) from None
        except OSError as error:
            self._lock.release()
            raise JudgeError(f"judge cache {self.path}: {error.strerror}; name another file in judge.cache") from None
        try:
            self._read()
        except BaseException:
            self._close()
            raise
        self._synced = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.fsync(self._file)
        finally:
            self._close()

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer. Raises OSError, as for a full disk, and leaves the file as it was."""
        line = (json.dumps({"key": key, **asdict(answer)}) + "\n").encode()
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(f"{self.path}: a line could not be written whole; make room on the disk")
        except OSError:
            os.ftruncate(self._file, size)
            raise
        self.answers[key] = answer
        if time.monotonic() - self._synced >= _SYNC_EVERY:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def _close(self) -> None:
        os.close(self._file)
        self._lock.release()

    def _read(self) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        good = 0
        for number, line in enumerate(lines, 1):
            entry = _parsed(line)
            if entry is None and (number < len(lines) or line.endswith(b"\n")):
                raise JudgeError(f"{self.path}:{number}: no answer of a judge; remove the line, or name another file")
            if entry is None:
                logger.warning("%s:%d: the last line was cut and is dropped; it is asked again", self.path, number)
                os.ftruncate(self._file, good)
                return
            self.answers[entry[0]] = entry[1]
            good += len(line)
        if lines and not lines[-1].endswith(b"\n"):
            os.write(self._file, b"\n")


def _parsed(line: bytes) -> tuple[str, Answer] | None:
    """Key and answer of a line; None if it holds no such thing."""
    try:
        record = json.loads(line)
        key = record.pop("key")
        answer = Answer(record.pop("text"), record.pop("prompt_tokens"), record.pop("completion_tokens"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return (key, answer) if isinstance(key, str) and isinstance(answer.text, str) and not record else None
