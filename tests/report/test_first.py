"""The first screen: what was trained, what came out on the measure that matters, and how sure that is."""

from __future__ import annotations

import math

import pytest
from report_data import (
    COMPARISON,
    difference,
    evaluation,
    metrics,
    number,
    write_evaluation,
    write_lines,
    write_training,
)

from distalign.report.first import (
    change_text,
    collapse,
    comparison_screen,
    forest,
    main_column,
    told_by_win_rate,
    training_screen,
)
from distalign.report.results import Difference, Results, Run, read_run


def screen(content):
    """The first screen of a comparison."""
    results = Results.parse(content)
    return comparison_screen(Run("run", "Comparison", results, {}, [], results.settings))


def sentence(mean, low, high, **changes):
    """The finding on one method whose main metric differs by this much from a reference of 10."""
    shown = screen(
        {
            "columns": [{"key": "forward_kl", "label": "KL", "unit": "nats", "better": "lower", **changes}],
            "methods": {
                "reference": {"forward_kl": number(10.0, 0.5)},
                "pmle": {"forward_kl": number(10.0 + mean, 0.5)},
            },
            "paired": {"pmle": {"forward_kl": difference(mean, low, high)}},
        }
    )
    ((method, words),) = shown.headline
    assert method == "pmle"
    return words


DISTANCE = "the distance to the target (forward KL)"


@pytest.mark.parametrize(
    ("values", "changes", "text"),
    [
        ((-4.5, -5.7, -3.4), {}, f"lowers {DISTANCE} from 10.0 to 5.5 nats, by 45 % [34 %, 57 %]"),
        ((2.0, 1.0, 3.0), {}, f"raises {DISTANCE} from 10.0 to 12.0 nats, by 20 % [10 %, 30 %]"),
        (
            (-0.5, -1.6, 0.6),
            {},
            f"shows no clear change in {DISTANCE}: −5 % [−16 %, +6 %], an interval with zero inside",
        ),
        ((0.0, 0.0, 0.0), {}, f"does not differ from the reference in {DISTANCE}: every difference is 0"),
        # A fraction is not given in per cent of a fraction.
        ((0.5, 0.2, 0.8), {"better": "higher"}, f"raises {DISTANCE} from 10.0 to 10.5 nats, by 0.50 [0.20, 0.80]"),
    ],
)
def test_the_finding_has_the_change_and_its_interval(values, changes, text):
    """Per cent of the reference's mean, with the interval turned the way of the verb."""
    assert sentence(*values, **changes) == f" {text}"


def known_target(win_rate=0.55, **methods):
    """A known target: distance moved from the reference's 10 by ± 1, entropy (the target's is 60), win rate."""
    numbers = {"target": (-10.0, 60.0, win_rate), "reference": (0.0, 62.0, None), **methods}
    rows = {
        name: {"forward_kl": number(10.0 + moved), "entropy": number(entropy, 2.0), "win_rate": number(wins, 0.02)}
        for name, (moved, entropy, wins) in numbers.items()
    }
    del rows["reference"]["win_rate"]
    return {
        "columns": [
            {"key": "forward_kl", "label": "KL", "unit": "nats", "better": "lower"},
            {"key": "win_rate", "label": "win rate", "better": "higher"},
        ],
        "methods": rows,
        "paired": {n: {"forward_kl": difference(m, m - 1, m + 1)} for n, (m, _, _) in methods.items()},
    }


@pytest.mark.parametrize(
    ("moved", "text"),
    [
        (
            {"pmle": -3, "rkl": -6, "pd": -5, "dpo": 4, "rlhf": 30, "rebel": 0.5},
            "RKL, PD and PMLE move nearer to the target, RKL most: by 60 % [50 %, 70 %] of the reference's distance; "
            "RLHF and DPO move away from it, RLHF most: by 300 % [290 %, 310 %]; REBEL shows no clear change",
        ),
        (
            {"pmle": 0.5, "dpo": 4, "rkl": -0.5},
            "No method moves clearly nearer to the target; DPO moves away from it, by 40 % [30 %, 50 %] of the "
            "reference's distance",
        ),
        ({"pmle": 0.5, "dpo": -0.5}, "No method moves clearly nearer to the target"),
    ],
)
def test_the_headline_says_who_moved_nearer_to_the_target_and_who_away(moved, text):
    """In per cent of the reference's distance, the farthest of each first; nobody is called nearer by chance."""
    shown = screen(known_target(**{name: (by, 60.0, 0.5) for name, by in moved.items()}))
    assert shown.sentence == text
    assert {name for name, _ in shown.headline if name} <= {*moved}
    assert "in per cent of the reference" in shown.sure


def test_what_collapses_is_said_beside_the_targets_own():
    """Below the target's entropy by more than the errors of both; the target is the mark, the reference a row."""
    methods = {"dpo": (1.0, 50.0, 0.6), "pmle": (-3.0, 57.0, 0.5), "pd": (-3.0, 75.0, 0.5)}
    found = collapse(Results.parse(known_target(**methods)))
    assert found.text == "DPO has clearly less entropy than the target: less variety than the preferences ask for."
    (entropy,) = found.forests
    assert [row for row, *_ in entropy.rows] == ["reference", "dpo", "pmle", "pd"]
    assert [text for _, text in entropy.marks] == ["target 60.0"]
    # 10 below with a standard error of √8 and Student's 2.02.
    assert entropy.rows[1][1] == "−10.0 [−15.7, −4.3]"
    ((target, _),), (_, _, low, high, _) = entropy.marks, entropy.rows[2]
    assert low < target < high
    even = collapse(Results.parse(known_target(pmle=(-3.0, 57.0, 0.5))))
    assert even.text == "No method has clearly less entropy than the target: none collapses."
    assert collapse(Results.parse(COMPARISON)) is None
    assert collapse(Results.parse(judged(0.6, 0.1))) is None


def test_what_a_win_rate_would_have_told_stands_beside_the_distance():
    """Methods by win rate, the target's own as the mark, and whom one would have chosen by either measure."""
    methods = {"pmle": (-3.0, 60.0, 0.45), "rlhf": (20.0, 1.0, 0.99), "pd": (-5.0, 60.0, 0.5)}
    told = told_by_win_rate(Results.parse(known_target(**methods)))
    assert told.text == (
        "By its own preference the target itself wins only 55 % [51 %, 59 %] of its comparisons with the reference: a "
        "method that wins more is not better. By win rate one would choose RLHF, by distance PD."
    )
    wins, distance = told.forests
    assert [row for row, *_ in wins.rows] == [row for row, *_ in distance.rows] == ["rlhf", "pd", "pmle"]
    assert [text for _, text in wins.marks] == ["target 55 %"]
    assert [text for _, text, *_ in distance.rows][1] == "−50 % [−60 %, −40 %]"
    assert "only" not in told_by_win_rate(Results.parse(known_target(win_rate=1.0, **methods))).text
    content = known_target(**methods)
    del content["methods"]["target"]["win_rate"]
    assert told_by_win_rate(Results.parse(content)) is None
    assert told_by_win_rate(Results.parse(judged(0.6, 0.1))) is None


def test_no_win_rate_is_better_where_the_targets_own_is_known():
    """A judge's is; beside the target's own the number has its interval and no verdict."""
    for content, verdict in ((known_target(pmle=(-3.0, 60.0, 0.7)), ""), (judged(0.7, 0.02), "better")):
        results = Results.parse(content)
        (column,) = (column for column in results.columns if column.key == "win_rate")
        assert change_text(results, "pmle", column) == ("[0.660, 0.740]", verdict)


def judged(mean, se, n=100):
    """A comparison with a win rate and an accuracy."""
    columns = [{"key": key, "label": key, "better": "higher"} for key in ("accuracy", "win_rate")]
    methods = {
        "reference": {"accuracy": number(0.5)},
        "pmle": {"win_rate": number(mean, se, n), "accuracy": number(0.9)},
    }
    paired = {"pmle": {"accuracy": difference(0.4, 0.3, 0.5)}}
    return {"columns": columns, "methods": methods, "paired": paired, "win_rates": {"judge": "endpoint"}}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.62, 0.04), " wins 62 % [54 %, 70 %] of its comparisons with the reference"),
        ((0.38, 0.04), " loses: it wins 38 % [30 %, 46 %] of its comparisons with the reference"),
        ((0.52, 0.04), " shows no clear win: it wins 52 % [44 %, 60 %] of its comparisons with the reference"),
        # All won: no spread, and yet no certainty.
        ((1.0, 0.0, 10), " wins 100 % [72 %, 100 %] of its comparisons with the reference"),
    ],
)
def test_a_judges_win_rate_comes_before_the_accuracy(values, text):
    """With Student's interval over prompts, or Wilson's; and the judge is named."""
    shown = screen(judged(*values))
    assert shown.sentence == f"PMLE{text}"
    assert ("Judge", "a language model") in shown.about
    assert shown.forest.marks[0][1] == "one half"


def test_the_measure_is_the_distance_else_the_win_rate_else_the_accuracy():
    """Whatever the order of the columns; a metric of the user's own where there are none of these."""
    content = judged(0.6, 0.1)
    assert main_column(Results.parse(content)).key == "win_rate"
    del content["methods"]["pmle"]["win_rate"]
    assert main_column(Results.parse(content)).key == "accuracy"
    assert main_column(Results.parse(COMPARISON)).key == "forward_kl"
    assert main_column(Results.parse(evaluation())).key == "reward"


def test_the_picture_has_every_method_between_target_and_reference():
    """Means where they are, with the interval of the difference from the reference; the best first."""
    shown = screen(COMPARISON)
    assert [row[:2] for row in shown.forest.rows] == [
        ("pmle", "−45 % [−57 %, −34 %]"),
        ("dpo", "−5 % [−15 %, +6 %]"),
    ]
    assert [text for _, text in shown.forest.marks] == ["reference 10.9", "target 0"]
    (_, _, low, high, mean), (reference, target) = shown.forest.rows[0], (place for place, _ in shown.forest.marks)
    assert target < low < mean < high < reference
    assert "paired over 48 held-out prompts" in shown.sure
    assert "One seed" in shown.sure


def test_bars_hold_what_is_not_finite():
    """An end that is not known is drawn at the mean; without rows there is nothing."""
    bars = forest(
        "title", [("a", "", Difference(mean=1.0, high=2.0)), ("b", "", Difference(mean=math.nan))], {0.0: "zero"}
    )
    assert bars.rows == [("a", "", 50.0, 98.0, 50.0), ("b", "", 2.0, 2.0, 2.0)]
    assert forest("title", [], {0.0: "zero"}) is None


def test_what_was_trained_is_said(tmp_path):
    """Methods, base model, data, day and seeds, of a comparison and of a training run."""
    facts = dict(
        screen({**COMPARISON, "settings": {"model": "/a/b/tiny", "lora": {"r": 8}, "target": {"bonus": 1}}}).about
    )
    assert facts["Trained by"] == "PMLE, DPO"
    assert facts["Base model"] == "tiny, LoRA r = 8"
    assert facts["Data"] == "320 pairs labelled by a known target, 128 held out"
    settings = {"methods": {"rkl": {}}, "model": "hub/tiny", "data": {"train": "a/pairs.jsonl"}}
    run = read_run(write_training(tmp_path, **settings))
    facts = dict(training_screen(run).about)
    assert facts["Trained by"] == "RKL"
    assert facts["Data"] == "from pairs.jsonl"
    assert facts["Run"] == f"{run.date}, seed 0"
    assert facts["Length"] == "60 steps"
    assert dict(comparison_screen(read_run(write_evaluation(tmp_path / "e"))).about)["Policies"].startswith("PMLE, RKL")


def outcome(folder, *rows, card=""):
    """The first screen of a training run that logged these rows and saved a model with this card."""
    write_lines(folder / "metrics.jsonl", [*metrics(steps=5), *rows])
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "README.md").write_text(card, encoding="utf-8")
    return training_screen(read_run(folder))


def test_a_training_run_says_what_came_out_and_how_sure(tmp_path):
    """The distance, else the accuracy, else the losses; an interval where the log or the card has a count."""
    assert outcome(tmp_path).sentence.startswith("The mean reward") is False
    accuracy = [{"step": s, "eval_loss": 0.5, "eval_rewards/accuracies": a} for s, a in ((0, 0.5), (4, 0.8), (5, 0.7))]
    shown = outcome(tmp_path, *accuracy)
    assert shown.sentence == "Held-out accuracy went from 0.5 to 0.7 at step 5"
    assert shown.sure.startswith("Its error is not known")
    shown = outcome(tmp_path, *accuracy, card="- held_out: 100\n- kept_step: 4\n")
    assert shown.sentence == "Held-out accuracy went from 0.5 to 0.80 [0.71, 0.87] at step 4 (the step that was kept)"
    assert shown.sure.startswith("95 % interval over 100 held-out pairs, each counted by itself. One seed")
    assert shown.figure == "Preference accuracy"
    shown = outcome(tmp_path, *accuracy, card="- held_out: 5\n")
    assert shown.sentence.startswith("Held-out accuracy shows no clear change: 0.70 [")
    target = {"eval_target/forward_kl": 5.0, "eval_target/forward_kl_se": 0.5, "eval_target/prompts": 16}
    shown = outcome(tmp_path, *accuracy, {"step": 5, **target})
    assert shown.sentence == "The distance to the target (forward KL, nats) is 5.0 [3.9, 6.1] at step 5"
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "epoch": 1.0}])
    assert "nothing was logged" in training_screen(read_run(tmp_path)).sentence
