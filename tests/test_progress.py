"""How long work is shown."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from distalign.progress import progress


def test_elsewhere_than_on_a_terminal_one_line_tells_the_end(capsys):
    """Nothing while it is quick; what was done, of how much, and the last note, when it ends."""
    with progress("work", 4, console=Console(file=io.StringIO())) as advance:
        for done in range(1, 4):
            advance(done)
        assert capsys.readouterr().err == ""
        advance(4, note="loss 0.5")
    assert capsys.readouterr().err == "work: 4/4, 0 s loss 0.5\n"


def test_long_work_is_told_now_and_then_with_the_time_left(capsys):
    """A line every so often, and the total may become known later."""
    with progress("work", 1, every=0.0, console=Console(file=io.StringIO())) as advance:
        advance(2, 8)
        assert capsys.readouterr().err == "work: 2/8, 0 s, 0 s left\n"


def test_work_that_fails_is_not_told_as_done(capsys):
    """The error passes, and no line says that work ended."""
    with pytest.raises(RuntimeError), progress("work", 2, console=Console(file=io.StringIO())):
        raise RuntimeError
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar():
    """Label, count and note are on the screen."""
    screen = io.StringIO()
    with progress("work", 4, console=Console(file=screen, force_terminal=True, width=100)) as advance:
        advance(4, 4, "loss 0.5")
    assert "work loss 0.5" in screen.getvalue()
    assert "4/4" in screen.getvalue()
