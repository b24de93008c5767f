"""The judge's answers on disk: nothing lost but a torn line, nothing written by two."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys

import pytest

from distalign.judges import JudgeError, cache
from distalign.judges.cache import Answer, Cache, content_key

ANSWERS = {"a": Answer("A", 90, 1), "b": Answer("B: é\n\u2028\ud800", None, None), "c": Answer("TIE", 3, 4)}


def fill(path, answers=ANSWERS):
    """A file with these answers."""
    with Cache(path) as cache:
        for key, answer in answers.items():
            cache.add(key, answer)
    return path


def read(path) -> dict[str, Answer]:
    """What a new process would find."""
    with Cache(path) as cache:
        return cache.answers


def test_answers_come_back(tmp_path):
    """One line each, in a folder that is made, any text; more can be added."""
    path = fill(tmp_path / "new" / "cache.jsonl")
    assert read(path) == ANSWERS
    assert len(path.read_bytes().splitlines()) == 3
    fill(path, {"d": Answer("A")})
    assert read(path) == {**ANSWERS, "d": Answer("A")}


def test_a_torn_last_line_is_dropped_and_said(tmp_path, caplog):
    """Wherever it was cut the other lines stay, and a new one starts on a line of its own."""
    whole = fill(tmp_path / "whole.jsonl").read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(start + 1, len(whole) - 1):
        caplog.clear()
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:cut])
        with caplog.at_level(logging.WARNING, "distalign.judges"):
            fill(path, {"d": Answer("A")})
        assert "cut.jsonl:3: the last line was cut" in caplog.text
        assert read(path) == {**dict(list(ANSWERS.items())[:2]), "d": Answer("A")}


def test_a_whole_line_without_its_end_is_kept(tmp_path):
    """Only the line break was lost."""
    path = fill(tmp_path / "cache.jsonl")
    path.write_bytes(path.read_bytes()[:-1])
    fill(path, {"d": Answer("A")})
    assert read(path) == {**ANSWERS, "d": Answer("A")}


@pytest.mark.parametrize(
    "line", ["{}", "[]", '{"key": "x", "text": 3, "prompt_tokens": 1, "completion_tokens": 1}', "A"]
)
def test_another_file_is_left_alone(tmp_path, line):
    """A line that is no answer is named, and the file is not touched."""
    path = fill(tmp_path / "cache.jsonl")
    path.write_bytes(path.read_bytes() + line.encode() + b"\n")
    before = path.read_bytes()
    with pytest.raises(JudgeError, match=r"cache.jsonl:4: no answer of a judge; remove the line"):
        read(path)
    assert path.read_bytes() == before


def test_only_one_may_write(tmp_path):
    """The second is told so, and may write afterwards."""
    path = tmp_path / "cache.jsonl"
    with Cache(path), pytest.raises(JudgeError, match="another process is writing it"):
        read(path)
    assert read(path) == {}


def test_a_killed_process_leaves_the_file_free(tmp_path):
    """The lock is the operating system's, on the file beside the cache: held by a process, gone with it."""
    path = fill(tmp_path / "cache.jsonl")
    hold = (
        "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); "
        "sys.stdin.read()"
    )
    words = [sys.executable, "-c", hold, f"{path}.lock"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(JudgeError, match="another process is writing it"):
            read(path)
        other.kill()
        other.wait()
        assert read(path) == ANSWERS


def test_systems_without_posix_locks_are_served(tmp_path, monkeypatch):
    """The module asks for no fcntl, which Windows has not; locks are left to filelock."""
    spec = importlib.util.spec_from_file_location("cache_elsewhere", cache.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "cache_elsewhere", elsewhere)
    spec.loader.exec_module(elsewhere)
    with elsewhere.Cache(tmp_path / "cache.jsonl") as made:
        made.add("a", elsewhere.Answer("A", 90, 1))
    assert read(tmp_path / "cache.jsonl") == {"a": ANSWERS["a"]}


def test_a_line_is_on_disk_before_the_next_answer(tmp_path):
    """A killed process leaves everything that it added."""
    path = tmp_path / "cache.jsonl"
    with Cache(path) as cache:
        for number, (key, answer) in enumerate(ANSWERS.items(), 1):
            cache.add(key, answer)
            assert len(path.read_bytes().splitlines()) == number


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    """Half a line is taken back, and the error says why."""
    path = fill(tmp_path / "cache.jsonl")
    write = os.write
    with Cache(path) as cache:
        monkeypatch.setattr("os.write", lambda file, line: write(file, line[:9]))
        with pytest.raises(OSError, match="make room on the disk"):
            cache.add("d", Answer("A"))
        monkeypatch.setattr("os.write", write)
        assert "d" not in cache.answers
        cache.add("e", Answer("A"))
    assert read(path) == {**ANSWERS, "e": Answer("A")}


def test_a_folder_is_no_cache(tmp_path):
    """The error names the setting."""
    with pytest.raises(JudgeError, match=r"Is a directory; name another file in judge.cache"):
        read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(JudgeError, match=r"name another file in judge.cache"):
        read(tmp_path / "file" / "cache.jsonl")


def test_the_key_depends_on_all_content():
    """Any change gives another key; the order of settings does not."""
    assert content_key(a=1, b=[2]) == content_key(b=[2], a=1)
    assert len({content_key(a=1), content_key(a=2), content_key(b=1), content_key(a="1"), content_key(a=[1])}) == 5
