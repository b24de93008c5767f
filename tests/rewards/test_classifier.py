"""Reward classifiers: sequence-classification models with one label, read as text by their own tokenizer."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification

from distalign.data import Prompt
from distalign.errors import InputError
from distalign.models.load import ModelError
from distalign.rewards import Request, RewardError, RewardSettings, check_rewards, make_reward
from distalign.rewards.classifier import find_classifier


def chat(text: str) -> Prompt:
    """A row with one user turn."""
    return Prompt([{"role": "user", "content": text}])


REQUESTS = [
    Request([5, 6], [[7, 8, tiny.END], [9, 10, 11, 12, 13, tiny.END]], chat("tell me about rain")),
    Request([5], [[8, tiny.END], [39, 38]], chat("sun")),
]


def save_classifier(folder, *, labels: int = 1, pad: int | None = 0, tokenizer=None, **settings):
    """A tiny reward classifier with random weights in a folder; returns its name."""
    torch.manual_seed(3)
    config = tiny.model(**settings).config
    config.num_labels, config.pad_token_id = labels, pad
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    (tokenizer or tiny.tokenizer()).save_pretrained(folder)
    return str(folder)


def classifier(name: str, token_budget: int = 10_000, **settings):
    """The classifier as a reward, for a policy that has the tiny tokenizer."""
    parts = {"base": tiny.model(), "tokenizer": tiny.tokenizer(), "token_budget": token_budget}
    return make_reward([RewardSettings(model=name, **settings)], **parts)


def alone(name: str, texts: list[list[int]]) -> torch.Tensor:
    """What transformers gives for each sequence of ids on its own."""
    model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in texts])


def rendered(request: Request, ids: list[int]) -> list[int]:
    """The chat as the classifier's template writes it, in its ids."""
    tokenizer = tiny.tokenizer()
    turn = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
    text = tokenizer.apply_chat_template([*request.row.prompt, turn], tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("pad", [0, None, tiny.END])
@pytest.mark.parametrize("token_budget", [20, 10_000])
def test_scores_do_not_depend_on_the_batch(tmp_path, caplog, pad, token_budget):
    """A chat is rendered by the template; padding, its token and the size of a batch change nothing."""
    name = save_classifier(tmp_path, pad=pad)
    check_rewards([RewardSettings(model=name)], conversational=True)
    reward = classifier(name, token_budget)
    expected = alone(name, [rendered(request, ids) for request in REQUESTS for ids in request.responses])
    torch.testing.assert_close(reward(REQUESTS), expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 0.05
    assert "lost their start" not in caplog.text


def test_without_any_padding_token_texts_are_scored_alone(tmp_path):
    """Nothing can pad, so nothing is padded."""
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    name = save_classifier(tmp_path, pad=None, tokenizer=tokenizer)
    expected = alone(name, [rendered(request, ids) for request in REQUESTS for ids in request.responses])
    torch.testing.assert_close(classifier(name)(REQUESTS), expected, rtol=1e-5, atol=1e-5)


def test_strings_are_joined_and_end(tmp_path):
    """Prompt text and response text, and the classifier's end-of-sequence token once."""
    name = save_classifier(tmp_path)
    found = classifier(name)([Request([5], [[7, 8, tiny.END], [9]], Prompt("tell me "))])
    ids = tiny.tokenizer()("tell me")["input_ids"]
    expected = alone(name, [[*ids, 7, 8, tiny.END], [*ids, 9, tiny.END]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_text_that_is_too_long_loses_its_start_and_is_counted(tmp_path, caplog):
    """max_length tokens are left, the answer among them; others are whole."""
    name = save_classifier(tmp_path)
    reward = classifier(name, max_length=12)
    texts = [rendered(request, ids) for request in REQUESTS for ids in request.responses]
    cut = [ids for ids in texts if len(ids) > 12]
    assert 0 < len(cut) < len(texts)
    torch.testing.assert_close(reward(REQUESTS), alone(name, [ids[-12:] for ids in texts]), rtol=1e-5, atol=1e-5)
    assert f"{len(cut)} of 4 texts are longer than 12 tokens and lost their start" in caplog.text


def test_the_models_own_limit_holds_without_a_setting(tmp_path, caplog):
    """A text longer than its positions is cut to them, and counted."""
    name = save_classifier(tmp_path, max_position_embeddings=12)
    reward = classifier(name)
    assert reward(REQUESTS).isfinite().all()
    assert "texts are longer than 12 tokens and lost their start" in caplog.text
    with pytest.raises(RewardError, match="max_length is 13, but it has 12 positions"):
        check_rewards([RewardSettings(model=name, max_length=13)], conversational=True)


@pytest.mark.parametrize("pad", [0, 1])
def test_positions_that_begin_after_the_paddings_are_fewer(tmp_path, caplog, pad):
    """RoBERTa and its kin have max_position_embeddings − pad − 1 of them; a longer text is cut to these."""
    encoder = {"bos_token_id": 2, "num_key_value_heads": None, "max_position_embeddings": 14}
    name = save_classifier(tmp_path, kind="roberta", pad=pad, tokenizer=tiny.tokenizer(chat=False), **encoder)
    reward, limit = classifier(name), 13 - pad
    assert reward([Request([5], [[7] * 30, [8, tiny.END]], Prompt("tell me " * 9))]).isfinite().all()
    assert f"2 of 2 texts are longer than {limit} tokens and lost their start" in caplog.text
    with pytest.raises(RewardError, match=f"max_length is 14, but it has {limit} positions"):
        check_rewards([RewardSettings(model=name, max_length=14)], conversational=False)


def test_the_limit_of_its_tokenizer_holds_without_a_setting(tmp_path, caplog):
    """model_max_length, where it is below the positions; max_length goes beyond it."""
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 11
    name = save_classifier(tmp_path, tokenizer=tokenizer)
    classifier(name)(REQUESTS)
    assert "texts are longer than 11 tokens and lost their start" in caplog.text
    assert find_classifier(name, max_length=12).max_length == 12


def test_a_classifier_that_cannot_read_the_rows_is_refused(tmp_path):
    """Chats need a template: said before any weights are loaded, and again if nobody asked."""
    name = save_classifier(tmp_path, tokenizer=tiny.tokenizer(chat=False))
    with pytest.raises(RewardError, match="the rows are chats and its tokenizer has no chat template"):
        check_rewards([RewardSettings(model=name)], conversational=True)
    check_rewards([RewardSettings(model=name)], conversational=False)
    with pytest.raises(RewardError, match="has no chat template"):
        classifier(name)(REQUESTS)


def test_models_that_are_no_reward_classifiers_are_refused(tmp_path, tiny_folder):
    """A language model, two labels, code of its own, a folder without weights."""
    two = save_classifier(tmp_path / "two", labels=2)
    code = save_classifier(tmp_path / "code")
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "mine.Config"}, "model_type": "mine"}
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    for name, message in (
        (str(tiny_folder), "it is a LlamaForCausalLM"),
        (two, "it has 2 labels"),
        (code, "it brings code of its own, which is not run"),
    ):
        with pytest.raises(InputError, match=message):
            check_rewards([RewardSettings(model=name)], conversational=True)


def test_a_classifier_without_a_score_head_is_refused(tmp_path):
    """A head that transformers would make up scores nothing."""
    from safetensors.torch import load_file, save_file

    name = save_classifier(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its files lack 1 of its tensors \(score\.weight\)"):
        classifier(name)


def test_a_score_that_is_no_number_is_refused(tmp_path):
    """Named, with the place."""
    reward = classifier(save_classifier(tmp_path))
    reward.model.score.weight.data.fill_(math.inf)
    with pytest.raises(RewardError, match="4 of 4 rewards are not finite"):
        reward(REQUESTS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("conversational", [True, False])
def test_what_trl_trains_drops_in(tmp_path, adapter, conversational):
    """A model or adapter of TRL's RewardTrainer: our scores are its model's on the ids that TRL itself makes."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig

    start = save_classifier(tmp_path / "start", pad=None)
    tokenizer = tiny.tokenizer()
    rows, requests = [], []
    for number, text in enumerate(tiny.prompts(4)):
        good, bad = "happy warm sun", "cold rain"
        prompt = chat(text).prompt if conversational else f"{text} "
        say = (lambda t: [{"role": "assistant", "content": t}]) if conversational else str
        rows.append({"prompt": prompt, "chosen": say(good), "rejected": say(bad)})
        answers = [[*tokenizer(answer)["input_ids"], tiny.END] for answer in (good, bad)]
        requests.append(Request([5 + number], answers, Prompt(prompt)))
    trainer = trl.RewardTrainer(
        model=start,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]) if adapter else None,
        args=trl.RewardConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
            save_strategy="no",
        ),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    trainer.model.eval()
    expected = []
    for row in trainer.train_dataset:
        for ids in (row["chosen_ids"], row["rejected_ids"]):
            with torch.no_grad():
                expected.append(float(trainer.model(input_ids=torch.tensor([ids])).logits[0, 0]))
    settings = [RewardSettings(model=str(tmp_path / "out"))]
    check_rewards(settings, conversational=conversational)
    found = classifier(str(tmp_path / "out"))(requests)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_an_adapter_without_a_head_is_refused(tmp_path, tiny_folder):
    """The adapter of a policy is no reward classifier."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path / "policy")
    with pytest.raises(RewardError, match="the adapter holds no score head"):
        check_rewards([RewardSettings(model=str(tmp_path / "policy"))], conversational=True)
