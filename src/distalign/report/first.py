"""The first screen of a page: what was trained, what came out on the measure that matters, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from distalign.report.numbers import (
    format_estimate,
    format_interval,
    format_number,
    interval_texts,
    mean_interval,
    minus,
    seeds_text,
)
from distalign.report.results import (
    REFERENCE,
    TARGET,
    TRAINING,
    Column,
    Difference,
    Measure,
    Results,
    Run,
    display_name,
)

# The measures that matter, the first that was measured before the others, as a sentence names them.
_MEASURES = {
    "forward_kl": "the distance to the target (forward KL)",
    "win_rate": "the win rate against the reference",
    "accuracy": "held-out accuracy",
}

DISTANCE = "Distance to the target"  # the title of the figure that has it against steps

# What a training run is judged by, the first that was logged: its name in a sentence, and the figure that shows it.
_OUTCOMES = {
    "eval_target/forward_kl": ("The distance to the target (forward KL, nats)", DISTANCE),
    "eval_rewards/accuracies": ("Held-out accuracy", "Preference accuracy"),
    "eval_loss": ("Held-out loss", "Loss"),
    "objective/reward": ("The mean reward of its samples", "Reward"),
    "loss": ("The training loss", "Loss"),
}

_JUDGES = {"exact": "the target itself", "reward": "a reward", "function": "a function", "endpoint": "a language model"}
_ONE_SEED = "One seed: how far another training run would differ was not measured."


class Forest(NamedTuple):
    """Numbers as bars with their intervals, placed in per cent of the width.

    `rows` are (row, text, low, high, mean), `marks` (place, text) of dashed lines.
    """

    title: str
    rows: list[tuple[str, str, float, float, float]]
    marks: list[tuple[float, str]]


class FirstScreen(NamedTuple):
    """Facts about the run, a sentence in parts (method or "", words after its name), how sure it is, the picture."""

    about: list[tuple[str, str]]
    headline: list[tuple[str, str]]
    sure: str
    forest: Forest | None = None
    figure: str = ""  # the title of the figure that belongs on it

    @property
    def sentence(self) -> str:
        """The headline as plain text."""
        return "".join(f"{display_name(name)}{words}" for name, words in self.headline)


class Finding(NamedTuple):
    """Sentences, and the bars that show it."""

    text: str
    forests: list[Forest]


def main_column(results: Results) -> Column | None:
    """The measure that matters: the distance to a known target, else a judge's win rate, else the accuracy.

    Without these, the first one with a better side that a method has a difference in.
    """
    known = [c for c in results.columns if c.better and any(effect(results, name, c) for name in results.trained)]
    order = [*_MEASURES]
    return min(known, key=lambda c: order.index(c.key) if c.key in order else len(order), default=None)


def effect(results: Results, name: str, column: Column) -> Difference | None:
    """A method's paired difference from the reference; for a win rate against it, how far that is from one half."""
    measure = results.methods[name].get(column.key)
    if column.key != "win_rate" or measure is None:
        return results.paired.get(name, {}).get(column.key)
    return _moved(mean_interval(measure, is_share=True), -0.5)


def change_text(results: Results, name: str, column: Column) -> tuple[str, str]:
    """A method's difference from the reference as text (a win rate's interval), and whether it is better or worse."""
    difference = effect(results, name, column)
    if difference is None:
        return "", ""
    if column.key != "win_rate":
        return format_interval(difference.mean, difference.low, difference.high), column.verdict(difference)
    rate = _moved(difference, 0.5)
    return format_interval(0.5, rate.low, rate.high, sign="").partition(" ")[2], column.verdict(difference)


def forest(title: str, rows: Sequence[tuple[str, str, Difference]], marks: Mapping[float, str]) -> Forest | None:
    """Intervals as bars (row, text, interval) on a width that holds them and the marks; None without any."""
    ends = [*marks, *(v for *_, d in rows for v in (d.low, d.mean, d.high) if math.isfinite(v))]
    low, high = min(ends), max(ends)

    def place(*values: float) -> float:
        known = next(value for value in (*values, *marks) if math.isfinite(value))
        return round(2 + 96 * (known - low) / ((high - low) or 1.0), 2)

    bars = [(name, text, place(d.low, d.mean), place(d.high, d.mean), place(d.mean)) for name, text, d in rows]
    return Forest(title, bars, [(place(value), text) for value, text in marks.items()]) if bars else None


def comparison_screen(run: Run) -> FirstScreen:
    """What came out on the main measure in a sentence, all methods on it as bars; the distance against steps."""
    results, column = run.results, main_column(run.results)
    changes = {} if column is None else {name: effect(results, name, column) for name in results.trained}
    known = [(name, change) for name, change in changes.items() if change and change.finite]
    if column is None or not known:
        why = "No method has a difference from the reference with an interval."
        return FirstScreen(_about(run), [("", results.name or run.label)], why)
    sign = 1 if column.better == "lower" else -1
    ranked = dict(sorted(known, key=lambda item: sign * item[1].mean))  # the largest improvement first
    best, known_target = next(iter(ranked)), column.key == "forward_kl"
    headline = [(best, _sentence(results, best, column, ranked[best]))]
    if known_target and len(ranked) > 1:
        headline = _nearer_and_away(results, column, ranked)
    sure, bars = _how_sure(results, column, ranked), _bars(results, column, ranked)
    return FirstScreen(_about(run), headline, sure, bars, DISTANCE if known_target else "")


def _nearer_and_away(results: Results, column: Column, ranked: Mapping[str, Difference]) -> list[tuple[str, str]]:
    """Which methods moved nearer to the target, which away from it, and how far the first of each did; a headline."""
    nearer = [name for name, change in ranked.items() if change.high < 0]
    away = [name for name, change in reversed([*ranked.items()]) if change.low > 0]
    unclear = [name for name, change in ranked.items() if not change.clear] if nearer else []
    headline = [] if nearer else [("", "No method moves clearly nearer to the target")]
    whole = " of the reference's distance"  # said once
    for names, words in ((nearer, "nearer to the target"), (away, "away from it"), (unclear, "")):
        if not names:
            continue
        verb = ("move" if words else "show") + "s" * (len(names) == 1)
        headline += [("", "; ")] if headline else []
        headline += [(name, ", ") for name in names[:-2]] + [(name, " and ") for name in names[-2:-1]]
        headline.append((names[-1], f" {verb} {words or 'no clear change'}"))
        if words:
            change = ranked[names[0]]
            mean, low, high = _relative(results, column, _flipped(change) if change.high < 0 else change, "")
            headline += [("", ", "), (names[0], " most: ")] if len(names) > 1 else [("", ", ")]
            headline.append(("", f"by {mean} [{low}, {high}]{whole if '%' in mean else ''}"))
            whole = ""
    return headline


def _relative(results: Results, column: Column, change: Difference, sign: str) -> list[str]:
    """A difference and its ends as texts: per cent of the reference's mean where less is better, else as they are."""
    reference, values = results.methods.get(REFERENCE, {}).get(column.key), (change.mean, change.low, change.high)
    if column.better == "lower" and reference and 0 < reference.mean < math.inf:
        return [minus(f"{100 * value / reference.mean:{sign}.0f} %") for value in values]
    return interval_texts(values, sign)


def _sentence(results: Results, name: str, column: Column, change: Difference) -> str:
    """What a method did to a measure, in words that follow its name."""
    measure = _MEASURES.get(column.key, column.label)
    if change.mean == change.low == change.high == 0:
        return f" does not differ from the reference in {measure}: every difference is 0"
    if column.key == "win_rate":
        rate = f"{_percent(_moved(change, 0.5))} of its comparisons with the reference"
        return (
            f" wins {rate}"
            if change.low > 0
            else f" {'loses' if change.clear else 'shows no clear win'}: it wins {rate}"
        )
    ends = [results.methods.get(row, {}).get(column.key) for row in (REFERENCE, name)]
    # A clear change is given without its sign, which the verb has; the interval of an unclear one keeps both signs.
    turned = _flipped(change) if change.high < 0 else change
    mean, low, high = _relative(results, column, turned, "" if change.clear else "+")
    if not change.clear:
        return f" shows no clear change in {measure}: {mean} [{low}, {high}], an interval with zero inside"
    unit = f" {column.unit}" if column.unit else ""
    known = [_rounded(m) for m in ends if m and math.isfinite(m.mean)]
    moved = f" from {known[0]} to {known[1]}{unit}," if len(known) == 2 else ""
    return f" {'raises' if change.mean > 0 else 'lowers'} {measure}{moved} by {mean} [{low}, {high}]"


def _bars(results: Results, column: Column, ranked: Mapping[str, Difference]) -> Forest | None:
    """Every method at its mean, with the interval of its difference from the reference; reference and target dashed."""
    if column.key == "win_rate":
        rates = {name: _moved(change, 0.5) for name, change in ranked.items()}
        return forest(
            "Win rate against the reference", [(n, _percent(d), d) for n, d in rates.items()], {0.5: "one half"}
        )
    known = {row: results.methods.get(row, {}).get(column.key) for row in (REFERENCE, TARGET)}
    marks = {m.mean: f"{row} {_rounded(m)}" for row, m in known.items() if m and math.isfinite(m.mean)}
    start = reference.mean if (reference := known[REFERENCE]) and reference.mean in marks else 0.0
    texts = {name: _relative(results, column, d, "+") for name, d in ranked.items()}
    rows = [(name, "{} [{}, {}]".format(*texts[name]), _moved(d, start)) for name, d in ranked.items()]
    title = _MEASURES.get(column.key, column.label).removeprefix("the ")
    unit = f", {column.unit}" if column.unit else ""
    return forest(f"{title[:1].upper()}{title[1:]}{unit}", rows, {start: "reference"} | marks)


def _how_sure(results: Results, column: Column, ranked: Mapping[str, Difference]) -> str:
    """What the bars are, over how much, and what they leave out."""
    counts = {m.n for name in ranked if (m := results.methods[name].get(column.key)) and m.n is not None}
    over = f" over {max(counts)} held-out prompts" if counts else ""
    line, what = "the dashed line at one half", "95 % intervals"
    if column.key != "win_rate":
        in_percent = "%" in _relative(results, column, next(iter(ranked.values())), "")[0]
        line, what = (
            "the reference's line",
            "95 % intervals of the difference from the reference (the number beside"
            f"{', in per cent of the reference' if in_percent else ''}), paired",
        )
    text = f"Bars: {what}{over}. A bar that crosses {line} shows no clear difference."
    if len(ranked) > 1:
        text += f" They are not corrected for {len(ranked)} methods; the stars in the table are."
    if len(results.seeds) > 1:
        return f"{text} Means over {len(results.seeds)} seeds."
    return f"{text} {_ONE_SEED}" if results.curves else text


def collapse(results: Results) -> Finding | None:
    """Entropy and length of every policy beside the target's own; None without the target's entropy."""
    forests, narrow = [], []
    if "entropy" not in results.methods.get(TARGET, {}):
        return None
    for key, title in (("entropy", "Entropy, nats"), ("length", "Length, tokens")):
        known = {row: results.methods[row][key] for row in results.rows if key in results.methods[row]}
        target = known.pop(TARGET, None)
        if target is None or not math.isfinite(target.mean):
            continue
        apart = {row: _apart(measure, target) for row, measure in known.items() if math.isfinite(measure.mean)}
        rows = [(n, format_interval(d.mean, d.low, d.high), _moved(d, target.mean)) for n, d in apart.items()]
        shown = forest(title, rows, {target.mean: f"target {_rounded(target)}"})
        forests += [shown] if shown else []
        if key == "entropy":
            narrow = [display_name(name) for name, d in apart.items() if name in results.trained and d.high < 0]
    who = f"{_listed(narrow)} {'have' if len(narrow) > 1 else 'has'}" if narrow else "No method has"
    what = "less variety than the preferences ask for" if narrow else "none collapses"
    text = f"{who} clearly less entropy than the target: {what}."
    return Finding(text, forests) if forests else None


def told_by_win_rate(results: Results) -> Finding | None:
    """Methods by their win rate and their distance beside it; None unless the target's own win rate was measured."""
    target, columns = results.methods.get(TARGET, {}).get("win_rate"), {c.key: c for c in results.columns}
    distance = columns.get("forward_kl")
    if target is None or distance is None or not math.isfinite(target.mean):
        return None
    measured = {
        name: results.methods[name]["win_rate"] for name in results.trained if "win_rate" in results.methods[name]
    }
    order = sorted(measured, key=lambda name: -measured[name].mean if math.isfinite(measured[name].mean) else math.inf)
    known = [(name, effect(results, name, distance)) for name in order if math.isfinite(measured[name].mean)]
    changes = {name: change for name, change in known if change and change.finite}
    if not changes:
        return None
    rates = {name: mean_interval(measured[name], is_share=True) for name in changes}  # the largest first
    most, nearest = next(iter(rates)), min(changes, key=lambda name: changes[name].mean)
    only = "only " if rates[most].mean > target.mean else ""
    text = (
        f"By its own preference the target itself wins {only}{_percent(mean_interval(target, is_share=True))} of its "
        "comparisons with the reference: a method that wins more is not better. "
    )
    text += f"By win rate one would choose {display_name(most)}, by distance {display_name(nearest)}."
    mark = {target.mean: f"target {100 * target.mean:.0f} %"}
    wins = forest("Win rate against the reference", [(name, _percent(d), d) for name, d in rates.items()], mark)
    return Finding(text, [one for one in (wins, _bars(results, distance, changes)) if one])


def training_screen(run: Run) -> FirstScreen:
    """From where to where the first of `_OUTCOMES` that was logged went, with its interval where its count is known."""
    ((rows,),) = run.logs.values()
    about = [*_about(run), ("Length", f"{rows[-1]['step']:.0f} steps")]
    logged = {key: [row for row in rows if math.isfinite(row.get(key, math.nan))] for key in _OUTCOMES}
    key = next((key for key in logged if logged[key]), None)
    if key is None:
        return FirstScreen(about, [("", "Trained; nothing was logged that says how well")], _ONE_SEED)
    words, figure = _OUTCOMES[key]
    kept = [row for row in logged[key] if f"{row['step']:.0f}" == run.card.get("kept_step")]
    row, start = (kept or logged[key])[-1], logged[key][0][key]
    pairs, n = run.card.get("held_out", ""), row.get("eval_target/prompts", math.nan)
    value, interval = format_number(row[key]), Difference(mean=row[key])
    sure = "Its error is not known: the log has the number without a count."
    if key == "eval_rewards/accuracies" and pairs.isdecimal() and 0 <= row[key] <= 1:
        interval = mean_interval(Measure(mean=row[key], se=0.0, n=int(pairs)), is_share=True)
        sure = f"95 % interval over {pairs} held-out pairs, each counted by itself."
    elif key == "eval_target/forward_kl" and n >= 2:
        interval = mean_interval(Measure(mean=row[key], se=row.get(f"{key}_se", math.nan), n=int(n)))
        sure = f"95 % interval over {n:.0f} held-out prompts."
    if interval.finite:
        value = format_interval(interval.mean, interval.low, interval.high, sign="")
    at = f"{value} at step {row['step']:.0f}{' (the step that was kept)' if kept else ''}"
    if row is logged[key][0]:
        sentence = f"{words} is {at}"
    elif start == row[key]:
        sentence = f"{words} did not change: {at}"
    elif interval.low <= start <= interval.high:
        sentence = f"{words} shows no clear change: {at}, {format_number(start)} at first"
    else:
        sentence = f"{words} went from {format_number(start)} to {at}"
    return FirstScreen(about, [("", sentence)], f"{sure} {_ONE_SEED}", figure=figure)


def _about(run: Run) -> list[tuple[str, str]]:
    """What was trained, or compared: methods, base model, data, judge, day and seeds."""
    settings, is_training = run.settings, run.kind == TRAINING
    data, lora = (part if isinstance(part := settings.get(key), Mapping) else {} for key in ("data", "lora"))
    methods, counts = run.results.trained, run.results.pairs
    if is_training:
        methods, counts = list(m if isinstance(m := settings.get("methods"), Mapping) else ()), run.card
    file = Path(str(data.get("train") or settings.get("pairs") or settings.get("prompts") or "")).name
    source = "labelled by a known target" if settings.get("target") else file and f"from {file}"
    shown = {"train": f"pairs {source}", "held_out": "held out"}
    shown |= {"held-out prompts": f"prompts {source}", "held-out pairs": "held-out pairs"}
    seeds = [settings["seed"]] if is_training and isinstance(settings.get("seed"), int) else run.results.seeds
    judge = run.results.win_rates.judge
    facts = {
        "Policies" if run.kind == "Evaluation" else "Trained by": ", ".join(map(display_name, methods)),
        "Base model": Path(str(settings.get("model") or "")).name + (f", LoRA r = {lora['r']}" if "r" in lora else ""),
        "Data": ", ".join(f"{counts[key]} {text}" for key, text in shown.items() if key in counts) or source,
        "Judge": _JUDGES.get(judge, judge),
        "Run": ", ".join(part for part in (run.date, seeds_text(seeds)) if part),
    }
    return [(key, value) for key, value in facts.items() if value]


def _moved(difference: Difference, by: float) -> Difference:
    return Difference(mean=difference.mean + by, low=difference.low + by, high=difference.high + by)


def _flipped(difference: Difference) -> Difference:
    return Difference(mean=-difference.mean, low=-difference.high, high=-difference.low)


def _apart(one: Measure, other: Measure) -> Difference:
    """How far two means lie apart; their errors are taken to be independent."""
    counts = [measure.n for measure in (one, other) if measure.n is not None]
    n = min(counts) if len(counts) == 2 else None
    return mean_interval(Measure(mean=one.mean - other.mean, se=math.hypot(one.se, other.se), n=n))


def _listed(names: Sequence[str]) -> str:
    """Names as a text has them: one, two and three."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _rounded(measure: Measure) -> str:
    """A mean to the digits that its error leaves, without the error."""
    return format_estimate(measure.mean, measure.se).partition(" ±")[0]


def _percent(rate: Difference) -> str:
    mean, low, high = (f"{100 * value:.0f} %" for value in (rate.mean, rate.low, rate.high))
    return f"{mean} [{low}, {high}]"
