import csv
import doctest
import gzip
import json
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from distalign.data import Data, DataError, Pair, Prompt, inspect_pairs, read_pairs, read_prompts, split_by_prompt

ROW = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
USER, BLUE, GREEN = (
    {"role": role, "content": text}
    for role, text in [("user", "Sky?"), ("assistant", "Blue."), ("assistant", "Green.")]
)
REAL = Path(os.environ.get("DISTALIGN_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def write(tmp_path):
    """Writes rows (or text, or bytes) to a file and returns its path."""

    def write(content, name="x.jsonl"):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        content = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


def refusal(source, read=read_pairs, **kwargs):
    """The message that reading ends with, without the folder's name."""
    with pytest.raises(DataError) as refused:
        read(source, **kwargs)
    return str(refused.value).replace(f"{source.parent}/", "") if isinstance(source, Path) else str(refused.value)


def texts(data):
    """What the rows say."""
    return [(row.prompt, row.chosen, row.rejected) for row in data]


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.jsonl.gz", "x.json", "x.json.gz"])
def test_json_lines(write, name):
    """One object a line; blank lines, a byte order mark and Windows line ends change nothing."""
    data = read_pairs(write(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\r\n" + json.dumps(ROW).encode(), name))
    assert texts(data) == [("The sky is", " blue.", " green.")] * 2
    assert [row.where.rpartition(":")[2] for row in data] == ["1", "3"]
    assert (data.format, data.implicit, data.read) == ("standard", False, 2)


def test_json_array(write):
    """An array of objects is read too, also over several lines; its places are row numbers."""
    data = read_pairs(write(json.dumps([ROW, ROW], indent=1), "x.json"))
    assert [row.where.rpartition("/")[2] for row in data] == ["x.json:1", "x.json:2"]
    assert refusal(write('[\n{"prompt": "a"},\n{"prompt" "b"}]', "y.json")).startswith("y.json:3: not JSON (Expecting")


def test_csv(tmp_path):
    """Quoted line breaks, numbers, empty numbers, message lists in JSON."""
    with open(tmp_path / "x.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "rejected", "p_chosen"])
        writer.writerow(["a\nb", "yes, it is", 'no "way"', "0.75"])
        writer.writerow(["c" * 200_000, "d", "e", ""])
    first, second = read_pairs(tmp_path / "x.csv")
    assert (first.prompt, first.chosen, first.rejected, first.probability) == ("a\nb", "yes, it is", 'no "way"', 0.75)
    assert second.probability is None
    assert second.where.endswith(":4")
    chat = json.dumps([USER, BLUE]).replace('"', '""'), json.dumps([USER, GREEN]).replace('"', '""')
    (tmp_path / "y.csv").write_text('chosen,rejected\n"{}","{}"\n'.format(*chat))
    assert texts(read_pairs(tmp_path / "y.csv")) == [([USER], [BLUE], [GREEN])]


def test_underscores_are_no_part_of_a_number(write):
    """Python alone reads 0_1 as 1."""
    found = refusal(write("prompt,chosen,rejected,p_chosen\na,b,c,0_1\n", "x.csv"))
    assert found == "x.csv:2: p_chosen is '0_1'; a finite number is needed"


def test_a_space_before_a_quote_is_refused(write):
    """CSV takes such a quote for text, and a comma behind it for the end of the field."""
    spaced = "a space between a comma and a quote, which makes the quote a part of the text; take it out"
    head = "prompt,chosen,rejected\n"
    assert refusal(write(f'{head}p, "yes",no\n"p","yes, it is", "no, it is not"\n', "x.csv")) == (
        f"x.csv:2: {spaced} (the same in 1 more rows)"
    )
    (pair,) = read_pairs(write(f'{head}p," ""yes""", no\n', "x.csv"))
    assert texts([pair]) == [("p", ' "yes"', " no")]


def test_a_column_that_stands_twice_is_refused(write, tmp_path):
    """In JSON, also inside a message, CSV and Parquet: it would be read as the last of its values."""
    row = '{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}'
    key = 'the key "chosen" stands more than once, and only the last would be read; keep one'
    lines = write(f"{json.dumps(ROW)}\n{row}\n{row}\n")
    assert refusal(lines) == f"x.jsonl:2: {key} (the same in 1 more rows)"
    assert refusal(write(f"[\n{json.dumps(ROW)},\n{row}]", "x.json")) == f"x.json:1: {key}"
    turn = '{"role": "user", "role": "assistant", "content": "a"}'
    nested = f'{{"prompt": [{turn}], "chosen": "b", "rejected": "c"}}'
    assert refusal(write(nested)) == f"x.jsonl:1: {key.replace('chosen', 'role')}"
    column = key.replace("key", "column")
    assert refusal(write("prompt, chosen,rejected,chosen\na,b,c,d\n", "x.csv")) == f"x.csv:1: {column}"
    assert len(read_pairs(write("prompt,chosen,rejected,,\na,b,c,,\n", "x.csv"))) == 1
    cells = turn.replace('"', '""')
    assert (
        refusal(write(f'prompt,chosen,rejected\n"[{cells}]",b,c\n', "x.csv"))
        == f"x.csv:2: {key.replace('chosen', 'role')}"
    )
    assert len(read_pairs(write(f'prompt,chosen,rejected\n"[{cells}] is?",b,c\n', "x.csv"))) == 1
    tools = write([{**ROW, "tools": f"[{turn}]"}])
    assert refusal(tools) == f"x.jsonl:1: tools: {key.replace('chosen', 'role')}"
    table = pyarrow.Table.from_arrays([["a"], ["b"], ["c"], ["d"]], ["prompt", "chosen", "rejected", "chosen"])
    parquet.write_table(table, tmp_path / "x.parquet")
    assert refusal(tmp_path / "x.parquet") == f"x.parquet: {column}"


def test_parquet_folder_and_memory_agree(tmp_path):
    """A `datasets` object, the folder and the Parquet file it saves, and plain dicts hold the same pairs."""
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    chat = {"prompt": [USER], "chosen": [BLUE], "rejected": [{**GREEN, "name": "bot"}], "p_chosen": 0.9, "extra": 1}
    table = Dataset.from_list([chat, {**chat, "p_chosen": None}])
    table.to_parquet(tmp_path / "x.parquet")
    table.save_to_disk(tmp_path / "folder")
    DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "splits")
    expected = texts(read_pairs([chat, chat]))
    shown = [table.with_format(kind) for kind in ("torch", "numpy")]
    for source in (tmp_path / "x.parquet", tmp_path / "folder", str(tmp_path / "splits"), table, *shown):
        data = read_pairs(source)
        assert texts(data) == expected
        assert [row.probability for row in data] == [0.9, None]
        assert data[0].extra == {"extra": 1}
    assert refusal([{**chat, 1: "one"}]) == "rows:1: 1 is a column's name and no text; name columns by text"
    assert len(read_pairs(tmp_path / "splits", split="test")) == 1
    assert 'no split "dev"; choose one of train, test' in refusal(tmp_path / "splits", split="dev")
    for source, name in ((tmp_path / "x.parquet", "x.parquet"), (tmp_path / "folder", "folder"), ([chat], "rows")):
        assert len(read_pairs(source, split="train")) >= 1
        what = f'{name}: no split "dev": these rows are not split; leave split out'
        assert refusal(source, split="dev") == what


def test_conversations_in_every_layout():
    """The prompt in a column or at the start of both lists; strings where a turn is meant."""
    rows = [
        {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": [USER], "chosen": "Blue.", "rejected": "Green."},
        {"prompt": "Sky?", "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": "Sky?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
    ]
    data = read_pairs(rows)
    assert texts(data) == [([USER], [BLUE], [GREEN])] * len(rows)
    assert data.format == "conversational"
    implicit = read_pairs([{"chosen": [USER, BLUE, USER, BLUE], "rejected": [USER, BLUE, USER, GREEN]}])
    assert texts(implicit) == [([USER, BLUE, USER], [BLUE], [GREEN])]
    assert implicit.implicit


@pytest.mark.parametrize("mark", ["\n\nAssistant:", "\nTL;DR:", "\n### Response:"])
def test_an_implicit_prompt_is_cut_after_the_last_mark(mark):
    """Never by character: words that both responses start with stay in the responses."""
    start = f"\n\nHuman: Sky?{mark} Up.\n\nHuman: Colour?{mark}"
    data = read_pairs([{"chosen": f"{start} It is blue.", "rejected": f"{start} It is black."}])
    assert texts(data) == [(start, " It is blue.", " It is black.")]


def test_optional_columns():
    """Soft labels and rewards are read, what nothing reads is kept aside."""
    row = read_pairs([{**ROW, "p_chosen": 1, "chosen_reward": 2, "rejected_reward": -1.5, "id": "a", "none": None}])[0]
    assert (row.probability, row.chosen_reward, row.rejected_reward, row.extra) == (1.0, 2.0, -1.5, {"id": "a"})


@pytest.mark.parametrize(
    ("value", "kind"), [("enable_thinking", "text"), ('{"a": 1}', "text"), ([1], "list"), (3, "int")]
)
def test_settings_of_the_template_are_an_object(write, value, kind):
    """Refused by the name of their column; none at all is no fault."""
    said = f"x.jsonl:1: chat_template_kwargs is {kind}; it must be an object, such as"
    assert said in refusal(write([{**ROW, "chat_template_kwargs": value}]))
    assert said in refusal(write([{"prompt": "a", "chat_template_kwargs": value}]), read_prompts)
    good = read_pairs(write([{**ROW, "chat_template_kwargs": {"a": 1}}, {**ROW, "chat_template_kwargs": None}]))
    assert [row.extra for row in good] == [{"chat_template_kwargs": {"a": 1}}, {}]


def test_prompts(write):
    """A prompt-only set needs the one column."""
    data = read_prompts(write([{"prompt": "a"}, {"prompt": "b", "completion": "c"}]))
    assert [(row.prompt, row.extra) for row in data] == [("a", {}), ("b", {"completion": "c"})]
    assert 'x.jsonl:1: no column "prompt"' in refusal(write([{"text": "a"}]), read_prompts)
    assert "x.jsonl:1: prompt is empty" in refusal(write([{"prompt": " "}]), read_prompts)


def test_ties_and_limit(write):
    """Ties are refused or counted, never kept; a limit takes the first pairs."""
    path = write([ROW, {**ROW, "rejected": " blue."}, ROW])
    message = "x.jsonl:2: chosen and rejected are the same text; remove the line, or leave ties out"
    assert refusal(path).startswith(message)
    data = read_pairs(path, drop_ties=True)
    assert (len(data), data.read, data.ties) == (2, 3, 1)
    assert len(read_pairs(path, limit=1)) == 1


FOUND = '(found "prompt", "chosen", "rejectd")'
GUESS = 'write the prompt in a column "prompt" of its own, or remove the line'
MARKS = "(Assistant:, TL;DR:, ### Response:), so where the responses begin is a guess"
CALLS = 'write it as "tool_calls": [{"function": {"name": "…", "arguments": {…}}}]'
ARGUMENTS, OBJECT = "the arguments of chosen's tool call", "write an object, or json.dumps of it"
CHAT_ROW = {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}


def called(arguments):
    """A row whose chosen response is a tool call."""
    return {**CHAT_ROW, "chosen": [{**BLUE, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]}


REFUSED_ROWS = {
    f'no column "rejected" {FOUND}; rename "rejectd"': {"prompt": "a", "chosen": "b", "rejectd": "c"},
    'no column "chosen" (found "text"); add it or rename the column that holds the chosen': {"text": "a"},
    "prompt is int; a string or a list of messages is needed": {**ROW, "prompt": 3},
    "prompt is empty; fill it in or remove the line": {**ROW, "prompt": " \n"},
    "chosen is empty; fill it in or remove the line": {**ROW, "chosen": ""},
    "p_chosen is 1.5; a probability between 0 and 1 is needed": {**ROW, "p_chosen": 1.5},
    "p_chosen is 'high'; a finite number is needed": {**ROW, "p_chosen": "high"},
    "p_chosen is nan; a finite number is needed": {**ROW, "p_chosen": float("nan")},
    "p_chosen is True; a finite number is needed": {**ROW, "p_chosen": True},
    "only one of chosen_reward and rejected_reward; give both or neither": {**ROW, "chosen_reward": 1.0},
    "chosen and rejected are a string and a message list; write both the same way": {**ROW, "chosen": [BLUE]},
    'prompt is a list without messages; write {"role": "user", "content": "…"}': {**ROW, "prompt": ["a"]},
    "prompt has a message whose content is list; a string is needed": {
        **ROW,
        "prompt": [{"role": "user", "content": []}],
    },
    "prompt has a message whose content is missing; a string is needed": {**ROW, "prompt": [{"role": "user"}]},
    "prompt ends with an assistant turn; end it with the turn to answer": {**ROW, "prompt": [USER, BLUE]},
    "chosen is a message list written by Python's str; write it with json.dumps": {**ROW, "chosen": str([BLUE])},
    "chosen holds half of a surrogate pair, which is no text; write the character whole": {**ROW, "chosen": "\ud83d"},
    "chosen holds the turns assistant, user, assistant; a response is one assistant turn, the rest is the prompt": {
        "prompt": [USER],
        "chosen": [BLUE, USER, BLUE],
        "rejected": [GREEN],
    },
    "prompt is not the last turn before the responses; write it as a message list": {
        "prompt": "Sea?",
        "chosen": [USER, BLUE],
        "rejected": [USER, GREEN],
    },
    f"chosen has a function_call, which chat templates do not read; {CALLS}": {
        **CHAT_ROW,
        "chosen": [{**BLUE, "function_call": {"name": "f", "arguments": "{}"}}],
    },
    f"chosen has tool_calls that are dict; {CALLS}": {**CHAT_ROW, "chosen": [{**BLUE, "tool_calls": {}}]},
    f"chosen has tool_calls that name no function; {CALLS}": {**CHAT_ROW, "chosen": [{**BLUE, "tool_calls": ["f"]}]},
    f"{ARGUMENTS}: text that is not JSON (Expecting value: line 1 column 1 (char 0)); {OBJECT}": called("sky"),
    f"{ARGUMENTS} are JSON text of list; {OBJECT}": called("[1]"),
    f'{ARGUMENTS}: the key "a" stands more than once, and only the last would be read; keep one': called(
        '{"a": 1, "a": 2}'
    ),
    'a column "images", and only text is read here; leave it out, or rename it if it is text': {
        **CHAT_ROW,
        "images": ["sky.png"],
    },
    'a column "image", and only text is read here; leave it out, or rename it if it is text': {
        **ROW,
        "image": "sky.png",
    },
    f"no prompt, and no common start {MARKS}; {GUESS}": {"chosen": "Blue.", "rejected": "Green."},
    f"no prompt, and the common start ends at no turn {MARKS}; {GUESS}": {
        "chosen": "The sky is blue.",
        "rejected": "The sky is black.",
    },
    f"no prompt, and the transcripts part before their last turn; {GUESS}": {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: e",
    },
    f"no prompt, and the message lists have no common start; {GUESS}": {"chosen": [BLUE], "rejected": [GREEN]},
    f"no prompt, and one message list is the start of the other; {GUESS}": {"chosen": [USER], "rejected": [USER, BLUE]},
}


@pytest.mark.parametrize(("message", "row"), REFUSED_ROWS.items())
def test_refused_rows_say_where_what_and_what_to_do(write, message, row):
    """Every refusal names the line, what it found and what to do."""
    assert refusal(write([row])) == f"x.jsonl:1: {message}"


def test_rows_of_two_kinds(write):
    """One source is of one kind: a chat among strings is a mistake more often than not."""
    message = refusal(write([ROW, {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}]))
    expected = "conversational with a prompt and standard with a prompt in one source; write all rows like the first"
    assert message == f"x.jsonl:2: {expected}"


def test_unreadable_lines(write):
    """Text that is no JSON, no object, no UTF-8: each with its line, all at once."""
    lines = [
        json.dumps(ROW).encode(),
        b'{"prompt": "a"',
        b"3",
        b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}',
    ]
    message = refusal(write(b"\n".join(lines)))
    assert message.splitlines() == [
        "3 problems:",
        "  x.jsonl:2: not JSON (Expecting ',' delimiter at column 15); write one object per line",
        '  x.jsonl:3: int, not an object; write {"prompt": …, "chosen": …, "rejected": …}',
        "  x.jsonl:4: not UTF-8 (byte 0xe9 at position 16); save the file as UTF-8",
    ]


def test_unreadable_csv(write):
    """Fields that the header does not name, quotes that do not close."""
    message = refusal(write('prompt,chosen,rejected\na,b,c,d\na,b,"c" d\n', "x.csv")).splitlines()
    advice = "quote the fields that hold commas or line breaks"
    assert message[1] == f"  x.csv:2: 4 fields where the header names 3; {advice}"
    assert message[2].startswith("  x.csv:3: not CSV (")


def test_damaged_files(write):
    """A gzip stream that ends early loses no row silently; other damage is named."""
    rows = [{**ROW, "prompt": os.urandom(400).hex()} for _ in range(50)]
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    message = refusal(write(whole[: len(whole) // 2], "x.jsonl"))
    assert "the gzip stream is cut off or damaged here" in message
    assert "copy or download the file again" in message
    assert "not a Parquet file" in refusal(write("abc", "x.parquet"))
    assert "x.jsonl: UTF-16 text; save it as UTF-8" in refusal(write(json.dumps(ROW).encode("utf-16")))


def test_empty_and_missing_sources(write, tmp_path):
    """Nothing to read is an error that says what was looked for."""
    assert refusal(write("\n\n")) == "x.jsonl: no rows; is it the right file?"
    tie = refusal(write([{**ROW, "rejected": " blue."}]), drop_ties=True)
    assert tie == "x.jsonl: 1 rows, all of them ties; nothing is left to learn from"
    assert 'cannot tell the format of ".txt" files; name it .jsonl' in refusal(write([ROW], "x.txt"))
    assert "y.jsonl: no such file; looked from " in refusal(tmp_path / "y.jsonl")
    assert "save_to_disk did not write; name a file in it (x.jsonl)" in refusal(tmp_path)


def test_the_hub_is_asked_by_name_only(monkeypatch):
    """Offline, a hub id ends with an error that says so; a path with a known ending is never taken for one."""
    message = refusal("nobody/pairs")
    assert message.startswith("nobody/pairs: no such file or folder, and the hub gave no data set of this name: ")
    assert message.endswith("check the name (HF_HUB_OFFLINE is set: unset it to download)")
    assert refusal("nobody/pairs.jsonl").startswith("nobody/pairs.jsonl: no such file;")


def test_all_problems_are_told(write):
    """Ten kinds are shown, all are counted, and the same thing in many rows is one line."""
    bad = [{**ROW, "p_chosen": 2 + number} for number in range(12)] + [{"prompt": "a"}] * 5
    with pytest.raises(DataError) as refused:
        read_pairs(write(bad))
    lines = str(refused.value).splitlines()
    assert lines[0] == "17 problems:"
    assert (len(lines), lines[-1]) == (12, "  … and 3 more")
    assert len(refused.value.problems) == 17
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
    missing = 'x.jsonl:1: no column "chosen" (found "prompt"); add it or rename the column that holds the chosen'
    assert refusal(write(bad[12:])) == f"{missing} (the same in 4 more rows)"


@given(st.lists(st.text(), min_size=1), st.floats(0, 0.99), st.integers(0, 99), st.randoms())
def test_a_split_depends_on_the_prompt_alone(prompts, share, seed, random):
    """A partition, the same in any order, with repeated prompts (case and white space aside) on one side."""
    data = Data([Prompt(text, f"row:{i}") for i, text in enumerate(prompts)], "rows", "standard")
    try:
        kept, held = split_by_prompt(data, share, seed)
    except DataError:
        return  # one part would be empty
    assert sorted([*kept, *held], key=lambda row: row.where) == sorted(data, key=lambda row: row.where)
    again = replace(data, rows=random.sample(data.rows, len(data)))
    again = replace(again, rows=[replace(row, prompt=f" {row.prompt}\n") for row in again])
    assert {row.where for row in split_by_prompt(again, share, seed)[1]} == {row.where for row in held}


def test_split_sizes():
    """The share is met within its sampling error; seeds differ; impossible shares are refused."""
    data = Data([Prompt(f"prompt {i}") for i in range(4000)], "rows", "standard")
    held = split_by_prompt(data, 0.1)[1]
    assert abs(len(held) - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5
    assert held != split_by_prompt(data, 0.1, seed=1)[1]
    assert split_by_prompt(data, 0.0) == (data, replace(data, rows=[]))
    with pytest.raises(
        DataError, match=r"rows: no prompt falls in the held-out part of a 0\.1 split; give more prompts"
    ):
        split_by_prompt(replace(data, rows=data.rows[:1]), 0.1)
    with pytest.raises(ValueError, match="held_out is 1"):
        split_by_prompt(data, 1.0)


def test_answers_without_words_are_compared_by_their_calls():
    """Two rows that call other tools do not repeat each other."""

    def call(name):
        return [
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": {}}}]}
        ]

    prompt = [{"role": "user", "content": "what time is it"}]
    rows = [{"prompt": prompt, "chosen": call("clock"), "rejected": call(other)} for other in ("rain", "tea")]
    found = inspect_pairs(rows)
    assert (found.same_prompts, found.same_pairs, found.swapped_pairs) == (1, 0, 0)


def test_inspection_counts(write):
    """Repeats, opposite labels, ties, lengths, with the error of the rate clustered by prompt."""
    rows = [
        {"prompt": "a", "chosen": "long one", "rejected": "short", "p_chosen": 0.6},
        {"prompt": "a", "chosen": "long one", "rejected": "short", "p_chosen": 1.0},
        {"prompt": "A ", "chosen": "short", "rejected": "long one", "note": "x"},
        {"prompt": "b", "chosen": "x", "rejected": "y"},
        {"prompt": "c", "chosen": "x", "rejected": "x"},
        {"prompt": "d", "chosen": "long one", "rejected": "short"},
    ]
    with pytest.raises(DataError, match=r":5: chosen and rejected are the same text"):
        inspect_pairs(write(rows))
    found = inspect_pairs(write(rows), drop_ties=True)
    assert (found.rows, found.pairs, found.ties, found.prompts, found.same_prompts) == (6, 5, 1, 3, 2)
    assert (found.same_pairs, found.swapped_pairs, found.extra_columns) == (1, 1, ["note"])
    assert found.chosen_longer == pytest.approx(0.75)
    # Residuals 0.25, 0.25, −0.75 of prompt a and 0.25 of prompt d: two clusters of −0.25 and 0.25.
    assert found.chosen_longer_se == pytest.approx((2 * 0.25**2 * 2) ** 0.5 / 4)
    assert (found.soft_label_count, found.soft_labels[2]) == (2, 0.8)
    assert found.lengths["words"]["chosen"][-1] == 2
    assert found.example["chosen"] == "a⟦prompt | response⟧long one"
    assert json.loads(json.dumps(asdict(found)))["pairs"] == 5


@pytest.mark.parametrize("name", ["hh_helpful", "webgpt", "scitldr_pairs", "alpacaeval2_soft"])
def test_real_pairs(name):
    """Real pairs are read whole, split by prompt without overlap, and described."""
    path = REAL / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path.name}: set DISTALIGN_DATA to the folder that holds it")
    data = read_pairs(path)
    kept, held = split_by_prompt(data, 0.2)
    assert len(kept) + len(held) == len(data) > 500
    assert not {str(row.prompt) for row in kept} & {str(row.prompt) for row in held}
    assert all(isinstance(row, Pair) for row in held)
    assert inspect_pairs(path).ties == 0


def test_the_documentation_is_true():
    """Every snippet of docs/data.md gives what it shows."""
    page = Path(__file__).parents[2] / "docs" / "data.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 8
    assert result.failed == 0


def test_a_pair_is_no_other_column_of_its_prompt():
    """Rows of pairs read as prompts; a row without a pair keeps what a reward may read."""
    pair, answer = read_prompts(
        [{"prompt": "a", "chosen": "b", "rejected": "c", "id": 1}, {"prompt": "a", "chosen": "b"}]
    )
    assert (pair.extra, answer.extra) == ({"id": 1}, {"chosen": "b"})
