"""What a terminal shows: whole numbers at any width, one console, and how to go on after Ctrl-C."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import signal

import pytest
from rich.console import Console

from distalign import progress as shown
from distalign.cli.shared import print_numbers
from distalign.evaluation.results import versions
from distalign.progress import in_words, progress, show_logs


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80 columns on standard error."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(shown, "CONSOLE", console)
    return screen


def test_bars_and_log_lines_share_a_console(terminal, place):
    """A line that is logged while a bar is shown is a line of its own, and no part of the bar."""
    show_logs("distalign")
    with progress("draw and label held-out pairs", 4) as advance:
        advance(1, 4, "loss 0.512")
        logging.getLogger("distalign.anything").warning("pairs: %s", in_words({"held_out": 3, "median_logit": 0.12345}))
        advance(4, 4, "loss 0.498")
    lines = terminal.getvalue().replace("\r", "\n").split("\n")
    assert any(line.endswith("pairs: held out 3, median logit 0.123") for line in map(str.rstrip, lines))
    assert "loss" not in terminal.getvalue(), "a note that does not fit is left out, not cut"


def test_work_within_work_is_a_second_bar(terminal):
    """It is gone when it is done."""
    with progress("outer", 2) as outer:
        with progress("inner", 5) as inner:
            inner(5)
        outer(2)
    assert "inner" in terminal.getvalue()
    assert "outer" in terminal.getvalue()


def test_a_pipe_has_every_column(capsys, monkeypatch):
    """No terminal, no width: the table is whole."""
    from distalign.report.terminal import Fitting, Texts

    columns = [Texts(f"column {i}", [f"{i}.5 ± 0.1"]) for i in range(60)]
    print_numbers(Fitting(Texts("", ["row"]), columns))
    out = capsys.readouterr().out
    assert all(f"{i}.5 ± 0.1" in out for i in range(60))
    assert "--wide" not in out


@pytest.mark.parametrize(
    ("words", "where", "told"),
    [
        (
            ("compare", "tiny.yaml", "--methods", "pmle"),
            "distalign.experiments.compare.load_setup",
            "go on with: distalign compare tiny.yaml --methods pmle --resume",
        ),
        (
            ("train", "own.yaml", "--method", "dpo", "--overwrite"),
            "distalign.experiments.train.load_setup",
            "no checkpoint was saved yet: run it again",
        ),
        (
            ("evaluate", "pairs", "--model", "model"),
            "distalign.evaluation.evaluate.load_setup",
            "what was answered is kept; go on with: distalign evaluate pairs --model model",
        ),
        (("data", "check", "pairs.jsonl"), "distalign.data.inspect_pairs", "run it again"),
    ],
)
def test_ctrl_c_says_how_to_go_on(distalign, monkeypatch, words, where, told):
    """One line, exit code 130, no traceback."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, stop)
    code, _, err = distalign(*words)
    assert code == 130
    assert err.splitlines()[-1] == f"stopped; {told}"
    assert "Traceback" not in err


def test_a_training_run_with_a_checkpoint_goes_on(distalign, place, monkeypatch):
    """The line is the command that goes on, without what would start over."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    (place / "runs" / "own" / "train" / "dpo" / "checkpoint-3").mkdir(parents=True)
    monkeypatch.setattr("distalign.experiments.train.load_setup", stop)
    code, _, err = distalign("train", "own.yaml", "--method", "dpo", "--overwrite")
    assert code == 130
    assert err.splitlines()[-1] == "stopped; go on with: distalign train own.yaml --method dpo --resume"


def test_env_asks_for_the_device_only_when_told(distalign):
    """Versions are read from the packages' metadata."""
    code, out, _ = distalign("env")
    assert code == 0
    assert versions()["torch"] in out
    assert "shown with --device" in out


def test_sigterm_in_training_ends_with_the_line_that_goes_on(distalign, monkeypatch):
    """Exit code 143; the command of the line goes on, and once more there is nothing to train."""
    words = ("train", "own.yaml", "--method", "pmle", "--set", "training.max_steps=3")
    from distalign.training.trainer import AlignmentTrainer

    real = AlignmentTrainer.training_step

    def signalled(self, *args, **kwargs):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentTrainer, "training_step", signalled)
        code, _, err = distalign(*words)
    assert code == 143
    command = "distalign train own.yaml --method pmle --set training.max_steps=3 --resume"
    assert err.splitlines()[-1] == f"stopped; go on with: {command}"
    assert distalign(*words, "--resume")[0] == 0
    code, _, err = distalign(*words, "--resume")
    assert code == 0
    assert "had ended at step 3: nothing is trained" in err
    assert re.search(r": 3/3, \d+ s had ended", err)


def test_sigterm_elsewhere_stops_at_once(distalign, monkeypatch):
    """While a model is read, say."""
    monkeypatch.setattr("distalign.data.inspect_pairs", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = distalign("data", "check", "pairs.jsonl")
    assert code == 143
    assert err.splitlines()[-1] == "stopped; run it again"


def test_a_full_disk_is_one_message(distalign, monkeypatch):
    """Wherever it is met: exit code 2."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x")

    monkeypatch.setattr("distalign.data.inspect_pairs", full)
    code, _, err = distalign("data", "check", "pairs.jsonl")
    assert code == 2
    assert "No space left on device: 'runs/x'; make space" in err
    assert "Traceback" not in err
