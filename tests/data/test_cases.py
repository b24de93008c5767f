"""Inputs that people have and that were once read wrongly: templates, tokenizers, tools, files."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distalign.data import (
    DataError,
    Pair,
    decode_after,
    encode_pairs,
    end_token_id,
    label_warnings,
    read_pairs,
    readers,
)
from distalign.errors import InputError
from distalign.judges import Comparison
from distalign.judges.local import encode
from distalign.rewards.base import Request, as_text

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role=='assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
THINKING = (
    "{{ '<s>' }}{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.role=='assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant:<think>{% endif %}"
)
TOOLS = (
    "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{{ m.tool_calls | default('') | tojson }}<|im_end|>"
    "{% endfor %}"
)


def byte_tokenizer(template=CHATML + OPENED, extra=()):
    """One token for each byte, and special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in (*SPECIAL, *extra)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def chat(question, good, bad):
    """A row of messages."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
    }


@pytest.mark.parametrize(
    ("template", "extra", "end"),
    [
        (CHATML, [], "<|im_end|>"),
        (CHATML + OPENED, [], "<|im_end|>"),
        (HARMONY, ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"], "<|end|>"),
        (THINKING, ["<think>"], "</s>"),
    ],
    ids=["no generation prompt", "chatml", "channels", "thinking"],
)
def test_the_end_token_is_what_stands_after_the_words(template, extra, end):
    """Not the first special token after the prompt."""
    tokenizer = byte_tokenizer(template, extra)
    assert tokenizer.decode([end_token_id(tokenizer, conversational=True)]) == end
    rows = read_pairs([chat("2+2?", "4", "five")])
    if template is THINKING:
        with pytest.raises(DataError, match=r"asks for an answer with .*<think>"):
            encode_pairs(tokenizer, rows, max_length=None)
    else:
        (pair,), _ = encode_pairs(tokenizer, rows, max_length=None)
        assert tokenizer.decode(pair.chosen).endswith(f"4{end}")


def test_an_end_that_no_template_writes_is_asked_for():
    """GLM ends a turn with the next one's role: the setting says which token ends a response."""
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    tokenizer = byte_tokenizer(turns + OPENED)
    rows = read_pairs([chat("2+2?", "4", "five")])
    with pytest.raises(DataError, match="set end_token_id"):
        encode_pairs(tokenizer, rows, max_length=None)
    end = tokenizer.convert_tokens_to_ids("<|im_start|>")
    (pair,), _ = encode_pairs(tokenizer, rows, max_length=None, end_id=end)
    assert tokenizer.decode(pair.chosen) == "4<|im_start|>"


def test_a_template_that_fails_is_named():
    """Before any row is read."""
    tokenizer = byte_tokenizer("{{ raise_exception('no system') }}")
    with pytest.raises(InputError, match="the chat template fails on a question"):
        end_token_id(tokenizer, conversational=True)


def metaspace():
    """As SentencePiece tokenizers of Llama 2 and Mistral are converted: a space before the first word of a text."""
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyz.:ABCDEFGHIJKLMNOPQRSTUVWXYZ\n"))
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    made.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def test_a_response_keeps_its_first_space_and_gains_none():
    """In training, for rewards, and for judges."""
    tokenizer = metaspace()
    data = read_pairs([{"prompt": "The sky is", "chosen": " red now", "rejected": " blue"}])
    (pair,), _ = encode_pairs(tokenizer, data, max_length=None)
    assert decode_after(tokenizer, pair.chosen) == " red now"
    (seen,) = as_text([Request(pair.prompt, [pair.chosen], pair.row)], tokenizer)
    assert seen.prompt + seen.completion == "The sky is red now"
    data = read_pairs([{"prompt": "Answer:\n", "chosen": "red now", "rejected": "blue"}])
    (pair,), _ = encode_pairs(tokenizer, data, max_length=None)
    assert pair.prompt + pair.chosen[:-1] == tokenizer("Answer:\nred now", add_special_tokens=False)["input_ids"]
    assert encode(Comparison("Answer:\n", "red now", "blue", key="k"), tokenizer).first == pair.chosen


def test_a_table_fills_in_no_fields(tmp_path):
    """Arrow gives every row the fields of all rows; the prompt is that of the JSON file."""
    import pyarrow
    from pyarrow import parquet

    def row(name):
        call = {"type": "function", "function": {"name": "f", "arguments": {name: "x"}}}
        schema = {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": {name: {"type": "string"}}}},
        }
        asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]},
                 {"role": "tool", "content": "r"}]  # fmt: skip
        return {**chat("", "a", "b"), "prompt": asked, "tools": [schema]}

    rows = [row("town"), row("code")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "tools.parquet")
    tokenizer = byte_tokenizer(TOOLS)
    plain, table = (
        encode_pairs(tokenizer, read_pairs(s), max_length=None)[0] for s in (rows, tmp_path / "tools.parquet")
    )
    assert [pair.prompt for pair in plain] == [pair.prompt for pair in table]
    assert "null" not in tokenizer.decode(table[0].prompt)
    texts = [{**one, "tools": json.dumps(one["tools"])} for one in rows]
    assert [pair.prompt for pair in encode_pairs(tokenizer, read_pairs(texts), max_length=None)[0]] == [
        pair.prompt for pair in plain
    ]
    with pytest.raises(DataError, match="tools: text that is not JSON"):
        read_pairs([{**rows[0], "tools": "weather"}])


@pytest.mark.parametrize("content", ["", None])
def test_a_tool_call_is_an_answer(content):
    """Without words."""
    call = {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    (pair,) = read_pairs([{**chat("q", "a", "I cannot know."), "chosen": [call]}])
    assert isinstance(pair, Pair)
    assert pair.chosen[0]["tool_calls"]
    rows = read_pairs([{**chat("q", "a", "No."), "chosen": [call]}])
    encoded, _ = encode_pairs(byte_tokenizer(TOOLS), rows, max_length=None)
    assert len(encoded) == 1


CALLED = "{% for m in messages %}<s>{{ m.content }}{% for c in m.tool_calls or () %}{{ c.function.name }} ARGUMENTS"
CALLED += "{% endfor %}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ c.function.arguments | tojson }}",
        "{{ c.function.arguments }}",
        "{{ '' + c.function.arguments }}",
        "{% for k, v in c.function.arguments.items() %}{{ k }} {{ v }}{% endfor %}",
    ],
)
def test_arguments_are_an_object_or_its_json_text(template):
    """OpenAI writes text: the template is given the form that it reads, and the ids are the same."""

    def row(form):
        calls = ({"function": {"name": "f", "arguments": form({"town": town})}} for town in ("Tromsø", "Rome"))
        chosen, rejected = ([{"role": "assistant", "content": "", "tool_calls": [call]}] for call in calls)
        return {**chat("q", "", ""), "chosen": chosen, "rejected": rejected}

    tokenizer = byte_tokenizer(CALLED.replace("ARGUMENTS", template))
    data = read_pairs([row(dict), row(json.dumps)])
    (of_object, of_text), _ = encode_pairs(tokenizer, data, max_length=None)
    assert of_object.key == of_text.key
    written = "town Tromsø" if "items" in template else '{"town": "Tromsø"}'
    assert tokenizer.decode(of_object.chosen).endswith(f"f {written}<|im_end|>")
    with pytest.raises(DataError, match="the chat template leaves out 'town' of chosen"):
        encode_pairs(byte_tokenizer(CALLED.replace("ARGUMENTS", "")), data, max_length=None)

    with pytest.raises(DataError, match="the chat template leaves out 'Tromsø' of chosen"):
        encode_pairs(byte_tokenizer(CALLED.replace("ARGUMENTS", "town")), data, max_length=None)


@pytest.mark.parametrize("named", [False, True], ids=["one template", "templates by name"])
def test_a_template_that_writes_calls_only_beside_tools_gets_them_in_its_form(named):
    """JSON text, and not what Python's str makes of an object."""
    called = "{{ tools | tojson }}" + CALLED.replace("ARGUMENTS", "{{ c.function.arguments }}")
    tokenizer = byte_tokenizer(called.replace("m.tool_calls or ()", "m.tool_calls or () if tools"))
    if named:
        tokenizer.chat_template = {"default": CHATML + OPENED, "tool_use": called}
    call = {"type": "function", "function": {"name": "f", "arguments": {"town": "Oslo"}}}
    row = {**chat("q", "", "no"), "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    ((pair,), _) = encode_pairs(tokenizer, read_pairs([{**row, "tools": [call]}]), max_length=None)
    assert '{"town": "Oslo"}' in tokenizer.decode(pair.chosen)


@pytest.mark.parametrize(
    "date",
    ["{{ strftime_now('%d %b %Y') }}", "{% set f = '%d %b %Y' %}{% set now = strftime_now %}{{ now(format=f) }}"],
    ids=["plain", "under other names"],
)
@pytest.mark.parametrize("named", [False, True], ids=["one template", "templates by name"])
def test_a_template_that_writes_the_date_gives_the_same_ids_on_another_day(date, named):
    """Else a run could not go on tomorrow."""
    tokenizer = byte_tokenizer(date + CHATML + OPENED)
    if named:
        tokenizer.chat_template = {"default": tokenizer.chat_template}
    ((pair,), _) = encode_pairs(tokenizer, read_pairs([chat("q", "yes", "no")]), max_length=None)
    assert tokenizer.decode(pair.prompt).startswith("01 Jan 2025")


LOOK_UP = {"type": "function", "function": {"name": "look_up"}}
THOUGHT = {"role": "assistant", "content": "<think>hm</think>\n\nyes"}
CALLING = {"role": "assistant", "content": "yes", "tool_calls": [LOOK_UP]}


@pytest.mark.parametrize(
    ("template", "row", "left_out"),
    [
        ("{{ m.content.split('</think>')[-1] }}", {"chosen": [THOUGHT]}, "'<think>hm.* of chosen"),
        ("{{ m.content }}", {"chosen": [CALLING]}, "'look_up' of chosen"),
        ("{{ m.content }}", {"chosen": [{**THOUGHT, "content": "yes", "reasoning_content": "hm"}]}, "'hm' of chosen"),
        ("{{ m.content }}", {"tools": [LOOK_UP]}, "'look_up' of the prompt"),
        ("{{ m.content if m.role != 'system' }}", {"system": "be kind"}, "'be kind' of the prompt"),
        ("{{ m.content if m.role != 'tool' }}", {"answered": '{"town": "Tromsø"}'}, ".*Troms.* of the prompt"),
    ],
)  # fmt: skip
def test_what_the_template_leaves_out_is_refused(template, row, left_out):
    """It would not be learned, and nobody would know. Space that a template adds or strips does not count."""
    row = {**chat("q", "no", "cannot"), **row}
    if system := row.pop("system", None):
        row["prompt"] = [{"role": "system", "content": system}, *row["prompt"]]
    if answered := row.pop("answered", None):
        row["prompt"] = [*row["prompt"], {"role": "tool", "content": answered}]
    rendered = "{% for m in messages %}<s>{{ m.role }} " + template + "<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match=f"the chat template leaves out {left_out}"):
        encode_pairs(byte_tokenizer(rendered), read_pairs([row]), max_length=None)
    spaced = "{% for m in messages %}<s>{{ m.content | replace('\n', ' ') }} <|im_end|>{% endfor %}"
    pairs = read_pairs([chat("q", "<think>hm</think>\n\nyes", "no")])
    assert len(encode_pairs(byte_tokenizer(spaced), pairs, max_length=None)[0]) == 1
    # What a tool answered is written as JSON by some templates.
    quoted = "{% for m in messages %}{{ m.content | tojson }}<|im_end|>{% endfor %}"
    row = chat("q", "yes", "no")
    row["prompt"].append({"role": "tool", "content": 'a "town"\nin Tromsø'})
    assert len(encode_pairs(byte_tokenizer(quoted), read_pairs([row]), max_length=None)[0]) == 1


def test_labels_that_no_target_fits_are_told():
    """Ties, and pairs made of the best and the worst of several."""
    clean = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "tags": ["x", "y", "z"]} for i in range(10)]
    assert label_warnings(read_pairs(clean).rows) == []
    ties = [{**row, "p_chosen": 0.5 if i < 3 else 1.0} for i, row in enumerate(clean)]
    (warning,) = label_warnings(read_pairs(ties).rows)
    assert warning.startswith("30 % of the pairs are ties")
    dropped = read_pairs(ties, drop_ties=True)
    assert (len(dropped), dropped.ties) == (7, 3)
    asked = [{**row, "prompt": f"What is the capital of Italy, {i}?"} for i, row in enumerate(clean)]
    assert label_warnings(read_pairs(asked).rows) == []
    whole = [{**row, "chosen": f"{row['prompt']} Rome", "rejected": f"{row['prompt']} Pisa"} for row in asked]
    (warning,) = label_warnings(read_pairs(whole).rows)
    assert warning.startswith("in 10 of 10 rows both responses begin with the whole prompt")
    several = [{**row, "completions": [{"response": text} for text in "abc"]} for row in clean]
    (warning,) = label_warnings(read_pairs(several).rows)
    assert "pair the best with a random other" in warning


ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}


def test_half_a_character_is_no_text_wherever_it_stands():
    """In a role that the template writes: a tokenizer would end in a traceback."""
    row = chat("q", "yes", "no")
    row["prompt"][0]["role"] = "us\ud800er"
    with pytest.raises(DataError, match="the chat holds half of a surrogate pair"):
        encode_pairs(byte_tokenizer(), read_pairs([row]), max_length=None)


def test_messages_as_json_text_are_not_a_prompt():
    """They would be read as words."""
    turns = json.dumps(chat("q", "", "")["prompt"])
    with pytest.raises(DataError, match="prompt is a message list as JSON text; write the list itself"):
        read_pairs([{**ROW, "prompt": turns}])
    assert len(read_pairs([{**ROW, "prompt": "[1] says so", "chosen": turns}])) == 1


def test_numbers_as_tables_and_hands_write_them(tmp_path):
    """A Decimal is a probability; a huge integer and deep nesting are refused, not a traceback."""
    for number in (Decimal("0.75"), np.float32(0.75), Fraction(3, 4)):
        assert read_pairs([{**ROW, "p_chosen": number}])[0].probability == 0.75
    huge = tmp_path / "huge.jsonl"
    huge.write_text(json.dumps(ROW)[:-1] + f', "p_chosen": 1{"0" * 400}}}\n')
    with pytest.raises(DataError, match="a finite number is needed"):
        read_pairs(huge)
    huge.write_text(json.dumps(ROW)[:-1] + f', "p_chosen": 1{"0" * 5000}}}\n')
    with pytest.raises(DataError, match="write plain numbers"):
        read_pairs(huge)
    huge.write_text("[" * 100_000 + "\n")
    with pytest.raises(DataError, match="few levels of nesting"):
        read_pairs(huge)


def test_files_whose_names_shout_and_files_that_are_bombs(tmp_path, monkeypatch):
    """`.JSONL` is JSON lines; a line without end stops early."""
    (tmp_path / "DATA.JSONL").write_text(json.dumps(ROW) + "\n")
    assert len(read_pairs(tmp_path / "DATA.JSONL")) == 1
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb") as file:
        file.write(b"x" * 5000)
    with pytest.raises(DataError, match="a line of more than"):
        read_pairs(tmp_path / "bomb.jsonl.gz")


def test_a_damaged_table_is_named(tmp_path):
    """Wherever the damage is: refused, or in a place that changes no row or only a text."""
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "pairs.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([ROW] * 50), path)
    whole = path.read_bytes()
    refused = 0
    for place in range(4, len(whole), 37):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert len(read_pairs(path)) <= 50
        except DataError:
            refused += 1
    assert refused > 5
