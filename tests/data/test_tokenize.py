import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distalign.cli.data import describe_pairs
from distalign.data import (
    DataError,
    Pair,
    Prompt,
    encode_pair,
    encode_pairs,
    encode_prompt,
    end_token_id,
    inspect_pairs,
    read_pairs,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "</s>"]
USER, BLUE, GREEN = (
    {"role": role, "content": text}
    for role, text in [("user", "Sky?"), ("assistant", "Blue."), ("assistant", "It is green.")]
)
CHAT = Pair([USER], [BLUE], [GREEN], "x.jsonl:1")
PLAIN = Pair("ABSTRACT: sky\n\nTL;DR:", " blue", " green", "x.jsonl:1", probability=0.8)


def make_tokenizer(eos="<|im_end|>", template=CHATML, bos=False):
    """A byte-level tokenizer in which "\\n\\n" is one token, with pad = eos as in many released models."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = ["assistant user system blue green sky \n\n \n\n \n\n It is Sky? ABSTRACT: TL;DR:"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=eos, chat_template=template
    )


@pytest.fixture(scope="module")
def tokenizer():
    """ChatML, ending with the end-of-sequence token."""
    return make_tokenizer()


def test_a_chat_ends_at_its_end_token(tokenizer):
    """The prompt ends with the generation prompt; the newline after the end token is not part of the response."""
    pair = encode_pair(tokenizer, CHAT)
    assert tokenizer.decode(pair.prompt) == "<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair.chosen) == "Blue.<|im_end|>"
    assert tokenizer.decode(pair.rejected) == "It is green.<|im_end|>"
    assert (pair.probability, pair.where) == (None, "x.jsonl:1")
    assert pair.prompt == encode_prompt(tokenizer, Prompt([USER])) == encode_prompt(tokenizer, CHAT)


def test_strings_end_with_one_end_token(tokenizer):
    """Prompt and response are encoded apart; the end token is added once, also where the text has it."""
    pair = encode_pair(tokenizer, PLAIN)
    assert tokenizer.decode(pair.prompt) == PLAIN.prompt
    assert tokenizer.decode(pair.chosen) == " blue<|im_end|>"
    assert pair.probability == 0.8
    assert encode_pair(tokenizer, replace(PLAIN, chosen=" blue<|im_end|>")).chosen == pair.chosen


def test_the_end_token_may_differ_from_the_end_of_sequence():
    """In some families a turn ends with a token of its own, and the end of sequence follows or never comes."""
    tokenizer = make_tokenizer(eos="</s>")
    assert end_token_id(tokenizer, conversational=True) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_token_id(tokenizer, conversational=False) == tokenizer.convert_tokens_to_ids("</s>")
    assert tokenizer.decode(encode_pair(tokenizer, CHAT).chosen) == "Blue.<|im_end|>"


def test_bos_exactly_once():
    """Added where the tokenizer adds it, not where the text or the template has it already."""
    tokenizer = make_tokenizer(bos=True, template="<s>" + CHATML)
    bos = tokenizer.bos_token_id
    for row in (PLAIN, CHAT, replace(PLAIN, prompt="<s>" + PLAIN.prompt)):
        pair = encode_pair(tokenizer, row)
        assert pair.prompt[0] == bos
        assert [*pair.prompt, *pair.chosen, *pair.rejected].count(bos) == 1
    assert bos not in encode_pair(make_tokenizer(), PLAIN).prompt


@given(prompt=st.text(min_size=1), chosen=st.text(), rejected=st.text())
def test_strings_round_trip(tokenizer, prompt, chosen, rejected):
    """Decoding gives back the text, byte for byte, with the end token after each response."""
    pair = encode_pair(tokenizer, Pair(prompt, chosen, rejected))
    assert tokenizer.decode(pair.prompt) == prompt
    assert tokenizer.decode(pair.chosen) == chosen + "<|im_end|>"
    assert tokenizer.decode(pair.rejected) == rejected + "<|im_end|>"


def test_tools_and_template_settings_reach_the_template():
    """The columns `tools` and `chat_template_kwargs`, as in TRL."""
    tokenizer = make_tokenizer(template="{{ tools }}{{ mood }}" + CHATML)
    row = replace(CHAT, extra={"tools": [{"name": "t"}], "chat_template_kwargs": {"mood": "calm"}})
    text = tokenizer.decode(encode_pair(tokenizer, row).prompt)
    assert "'t'" in text
    assert "calm" in text


def refusal(tokenizer, row):
    """The message that encoding ends with."""
    with pytest.raises(DataError) as refused:
        encode_pair(tokenizer, row)
    return str(refused.value)


def test_a_merge_across_the_boundary_is_refused(tokenizer):
    """Line breaks at the start of a response join the prompt's last one: no sampled response looks like that."""
    message = refusal(tokenizer, replace(CHAT, chosen=[{"role": "assistant", "content": "\n\nBlue."}]))
    expected = (
        "x.jsonl:1: the prompt's tokens are not the start of prompt + chosen: '\\n' becomes '\\n\\n\\nB'. Here the "
    )
    expected += "tokenizer merges the prompt's end with the start of chosen; remove white space at its start"
    assert message == expected


def test_a_template_that_rewrites_the_past_is_refused():
    """Such a template shows the model another prompt in training than when it answers."""
    tokenizer = make_tokenizer(template="{{ messages | length }}" + CHATML)
    message = refusal(tokenizer, CHAT)
    assert "'1<|im_start|>user' becomes '2<|im_start|>user'" in message
    assert message.endswith("rewrites the question where an answer follows; use a template that only appends")


def test_end_tokens_in_the_text_are_refused(tokenizer):
    """A response that ends in its middle could not have been sampled."""
    message = "x.jsonl:1: chosen contains the end token '<|im_end|>' in its text; remove it from the text"
    assert refusal(tokenizer, replace(CHAT, chosen=[{**BLUE, "content": "a<|im_end|>b"}])) == message
    assert refusal(tokenizer, replace(PLAIN, chosen="a<|im_end|>b")) == message


def test_templates_that_do_not_fit_are_refused(tokenizer):
    """No template, a template without an end, a template that raises."""
    what = "the rows are chats and the tokenizer has no chat template; set tokenizer.chat_template or give strings"
    bare = make_tokenizer(template=None)
    with pytest.raises(ValueError, match="has no chat template"):
        end_token_id(bare, conversational=True)
    with pytest.raises(DataError) as refused:
        encode_pairs(bare, read_pairs([{"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}]), max_length=None)
    assert str(refused.value) == f"rows: {what}"
    with pytest.raises(ValueError, match="writes no special token after an assistant's words"):
        end_token_id(make_tokenizer(template="{{ messages[-1].content }}"), conversational=True)
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    row = replace(CHAT, prompt=[{"role": "system", "content": "a"}, USER])
    expected = "x.jsonl:1: the chat template refuses the row (no system turn); change its turns"
    assert refusal(make_tokenizer(template=strict), row) == expected


def test_nothing_is_cut_unless_asked(tokenizer):
    """A pair that does not fit is an error with its lengths; dropping and cutting are counted."""
    rows = [{"prompt": "q" * n, "chosen": "b" * m, "rejected": "g"} for n, m in [(1, 5), (40, 5), (1, 60)]]
    data = read_pairs(rows)
    with pytest.raises(DataError) as refused:
        encode_pairs(tokenizer, data, max_length=30)
    first, second = str(refused.value).splitlines()[1:]
    advice = "raise it if the model has more positions, shorten or remove the row, or in training"
    assert first == (
        f"  rows:2: the prompt has 40 tokens (prompts are never cut) and max_length is 30; {advice} set too_long: drop"
    )
    assert second == (
        f"  rows:3: prompt and response have 1 + 61 tokens and max_length is 30; {advice} "
        "cut responses with max_response_tokens (here at most 29), or set too_long: drop"
    )
    kept, counts = encode_pairs(tokenizer, data, max_length=30, too_long="drop")
    assert [pair.where for pair in kept] == ["rows:1"]
    assert (counts.pairs, counts.kept, counts.too_long, counts.cut_chosen) == (3, 1, 2, 0)
    assert str(counts) == "3 pairs, 1 kept, 2 too long, 1 prompt tokens, 8 response tokens"
    kept, counts = encode_pairs(tokenizer, data, max_length=30, max_response_tokens=10, too_long="drop")
    assert (counts.kept, counts.too_long, counts.cut_chosen, counts.cut_rejected) == (2, 1, 1, 0)
    assert tokenizer.decode(kept[1].chosen) == "b" * 10
    with pytest.raises(DataError, match=r"rows: no pair is left \(3 pairs, 3 too long\); raise max_length"):
        encode_pairs(tokenizer, data, max_length=1, too_long="drop")


def test_pairs_that_are_the_same_after_the_cut_are_counted(tokenizer):
    """They teach nothing: left out and counted if a cut made them so, an error otherwise."""
    data = read_pairs(
        [{"prompt": "a", "chosen": "bbbb1", "rejected": "bbbb2"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    )
    kept, counts = encode_pairs(tokenizer, data, max_length=None, max_response_tokens=4)
    assert (len(kept), counts.same_after_cut, counts.cut_chosen) == (1, 1, 0)
    trimming = make_tokenizer(template=CHATML.replace("m['content']", "m['content'] | trim"))
    data = read_pairs([{"prompt": [USER], "chosen": [BLUE], "rejected": [{**BLUE, "content": "Blue. "}]}])
    with pytest.raises(DataError, match="differ in white space only and are the same tokens; remove the line"):
        encode_pairs(trimming, data, max_length=None)


def test_inspection_in_tokens(tokenizer):
    """With a tokenizer the lengths and the example are what the model reads."""
    rows = [{"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}] * 2
    found = inspect_pairs(rows, tokenizer, max_length=10)
    assert found.example["chosen"].endswith("<|im_start|>assistant\n⟦prompt | response⟧Blue.<|im_end|>")
    assert found.length_unit == "tokens"
    assert found.lengths["tokens"]["chosen"][0] == len(encode_pair(tokenizer, CHAT).chosen)
    assert (found.too_long, found.chosen_longer) == (2, 0.0)


def test_inspection_is_drawn(tokenizer):
    """The rendering holds the counts and the boundary."""
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    rows = [
        {"prompt": f"sky {i}", "chosen": "b" * (i + 2), "rejected": "gg", "p_chosen": 0.9, "id": i} for i in range(5)
    ]
    console.print(describe_pairs(inspect_pairs(rows, tokenizer, max_length=9)))
    text = console.export_text()
    for part in (
        "standard, prompt: a column of its own",
        "5 of 5 rows (0 ties)",
        "⟦prompt | response⟧",
        "100.0 ± 0.0 %",
    ):
        assert part in text
