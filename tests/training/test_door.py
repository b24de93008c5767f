"""The Python door: a model, a method, settings and rows as people have them, offline and on-policy."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import functools
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from peft import (
    AdaptionPromptConfig,
    LoraConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    ShiraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from distalign import DPO, PD, PMLE, RKL, AlignmentConfig, AlignmentTrainer, ColumnReward, InputError, RewardTraining
from distalign.data import DataError, read_pairs, split_by_prompt
from distalign.experiments.recipe import Recipe
from distalign.models.load import ModelError
from distalign.training.health import HealthSettings
from distalign.training.inputs import check_arguments, warn_of_reloading
from distalign.training.rollout_settings import RolloutSettings, TrainingError

METHODS = {"offline": PMLE(gamma=0.5, beta=0.0), "on-policy": RKL(gamma=0.5, beta=0.1)}
LORA = LoraConfig(r=4, target_modules="all-linear")


def warmth(prompts, completions, **columns):
    """A reward in TRL's convention: warm words in the completion's message."""
    assert len(prompts) == len(completions) == len(columns["completion_ids"])
    return [sum(word in ("happy", "kind", "warm") for word in text[0]["content"].split()) for text in completions]


def rows(n=12):
    """Conversational rows in TRL's columns."""
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": f"happy warm {'tea ' * (i % 3)}"}],
            "rejected": [{"role": "assistant", "content": "cold bad rain"}],
        }
        for i, prompt in enumerate(tiny.prompts(n))
    ]


def config(folder, **settings):
    """Two small steps."""
    return AlignmentConfig(
        output_dir=str(folder),
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "max_completion_length": 5,
            "token_budget": 512,
            "use_cpu": True,
            **settings,
        },
    )


def trainer(folder, method, model=None, data=None, **options):
    """A trainer of a method; a method that reads a reward gets `warmth`."""
    model = tiny.model() if model is None else model
    options = {"processing_class": tiny.tokenizer(), **options}
    if method.needs.reward:
        options = {"reward_funcs": warmth, **options}
    args = options.pop("args", None) or config(folder)
    return AlignmentTrainer(model, method, args, rows() if data is None else data, **options)


def weights(model):
    """All weights in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("form", ["list", "dataset", "path", "iterable"])
def test_rows_in_every_form_are_the_same(tmp_path, kind, form):
    """A list of dicts, a Dataset, a file and an iterable are the same rows."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    data = {"list": rows(), "dataset": Dataset.from_list(rows()), "path": file, "iterable": iter(rows())}[form]
    found, expected = trainer(tmp_path / "a", METHODS[kind], data=data), trainer(tmp_path / "b", METHODS[kind])
    assert [row.prompt for row in found.rows] == [row.prompt for row in expected.rows]
    if kind == "offline":
        assert [row.key for row in found.rows] == [row.key for row in expected.rows]
    found.train()


def test_rows_of_one_prompt_with_other_columns_are_several(tmp_path):
    """A reward may read them: each is drawn for; a row that stands twice is drawn for once."""
    data, seen = [{"prompt": "tell me", "answer": str(i % 3)} for i in range(6)], set()

    def right(completions, answer, **_):
        seen.update(answer)
        return [float(len(one)) for one in completions]

    made = trainer(tmp_path, METHODS["on-policy"], data=data, reward_funcs=right)
    made.train()
    assert len(made.rows) == 3
    assert seen == {"0", "1", "2"}


@pytest.mark.parametrize("kind", METHODS)
def test_a_model_by_its_folder(tmp_path, kind, tiny_folder):
    """Model and tokenizer come from the folder; save_model writes model, tokenizer and card, which load again."""
    made = trainer(tmp_path, METHODS[kind], model=str(tiny_folder), processing_class=None, peft_config=LORA)
    made.train()
    made.save_model()
    assert {"adapter_model.safetensors", "tokenizer_config.json", "README.md"} <= {f.name for f in tmp_path.iterdir()}
    card = (tmp_path / "README.md").read_text()
    assert made.name in card
    assert "learning_rate" in card
    again = trainer(tmp_path / "again", PMLE(0.5, 0.0), model=str(tmp_path), processing_class=None, peft_config=LORA)
    ids = torch.tensor([[2, 4, 7, 3]])
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, made.model.eval()(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", METHODS)
def test_an_own_model_is_trained_in_place(tmp_path, kind):
    """The object that was given has moved; with a peft_config it has not, and the adapter has."""
    model = tiny.model()
    before = weights(model)
    trainer(tmp_path / "full", METHODS[kind], model=model).train()
    assert not torch.equal(weights(model), before)
    model = tiny.model()
    made = trainer(tmp_path / "lora", METHODS[kind], model=model, peft_config=LORA)
    made.train()
    assert torch.equal(weights(model), before)
    assert any(parameter.abs().max() > 0 for name, parameter in made.model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("kind", METHODS)
def test_an_own_adapter_is_trained_and_its_reference_is_the_model_without(tmp_path, kind, caplog):
    """Its own adapter moves, the weights below do not; one that is trained already is warned about."""
    adapted = get_peft_model(tiny.model(), copy.deepcopy(LORA))
    base = weights(tiny.model())
    made = trainer(tmp_path / "a", DPO(gamma=0.5) if kind == "offline" else METHODS[kind], model=adapted)
    made.train()
    assert made.model is adapted
    with made.policy.as_reference() as reference, torch.no_grad():
        ids = torch.tensor([[2, 4, 7, 3]])
        torch.testing.assert_close(reference(ids).logits, tiny.model()(ids).logits)
    assert torch.equal(weights(tiny.model()), base)
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path / "b", METHODS[kind], model=adapted).train()
    assert "the adapter is trained already" in caplog.text
    with pytest.raises(TrainingError, match="give one of them"):
        trainer(tmp_path / "c", METHODS[kind], model=adapted, peft_config=LORA)


def test_adapters_that_could_not_be_kept_as_they_are_trained_are_refused(tmp_path, tiny_folder):
    """Biases of the base, layers that share weights, adapters of other names or several, biases the base has not."""
    for bias in ("all", "lora_only"):
        config = LoraConfig(r=4, target_modules="all-linear", bias=bias)
        adapted = {"model": get_peft_model(tiny.model(), config)}
        for given in ({"model": str(tiny_folder), "peft_config": config}, adapted):
            with pytest.raises(TrainingError, match=f'bias="{bias}", .*would move with them; give bias="none"'):
                trainer(tmp_path, METHODS["offline"], **given)
    copies = LoraConfig(r=4, target_modules="all-linear", layer_replication=[[0, 2], [1, 2]])
    adapted = {"model": get_peft_model(tiny.model(), copies)}
    for given in ({"model": str(tiny_folder), "peft_config": copies}, adapted):
        with pytest.raises(ModelError, match=r"model: its adapter has layer_replication.*train one without it"):
            trainer(tmp_path, METHODS["offline"], **given)
    named = get_peft_model(tiny.model(), copy.deepcopy(LORA), adapter_name="policy")
    several = get_peft_model(tiny.model(), copy.deepcopy(LORA))
    several.add_adapter("other", copy.deepcopy(LORA))
    several.set_adapter("other")
    for model, names in ((named, r"policy \(active: policy"), (several, r"default, other \(active: other")):
        with pytest.raises(TrainingError, match=f'has the adapters {names}.*as adapter_name="default"'):
            trainer(tmp_path, METHODS["offline"], model=model)
    several.set_adapter("default")
    several.delete_adapter("other")
    trainer(tmp_path, METHODS["offline"], model=several)
    with_bias = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], lora_bias=True)
    with pytest.warns(UserWarning, match="lora_bias"), pytest.raises(TrainingError, match="o_proj has no bias"):
        trainer(tmp_path, METHODS["offline"], model=tiny.model("qwen2"), peft_config=with_bias)
    with_bias.target_modules = ["q_proj"]
    trainer(tmp_path, METHODS["offline"], model=tiny.model("qwen2"), peft_config=with_bias)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5]), "its adapter has alora_invocation_tokens"),
        (PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "its adapter is of the type Poly"),
        (AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1), "of the type ADAPTION_PROMPT"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "its adapter is a learned prompt"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "its adapter is a learned prompt"),
    ],
)
def test_adapters_that_are_more_than_their_layers_are_refused(tmp_path, config, why):
    """New, given and saved ones: the engine calls the layers, and would score the model without the adapter."""
    adapted = get_peft_model(tiny.model(), copy.deepcopy(config))
    adapted.save_pretrained(tmp_path)
    for options in ({"model": adapted}, {"peft_config": config}, {"model": str(tmp_path), "processing_class": None}):
        with pytest.raises(ModelError, match=why):
            trainer(tmp_path / "run", METHODS["offline"], **options)


def test_layers_of_an_adapter_without_its_model_are_refused(tmp_path):
    """They would be saved as weights of another model."""
    with pytest.raises(TrainingError, match="layers of an adapter and is no PeftModel"):
        trainer(tmp_path, METHODS["offline"], model=inject_adapter_in_model(LORA, tiny.model()))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_an_adapter_of_sparse_weights_trains(tmp_path):
    """Memory is measured although they have no storage."""
    config = ShiraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    made = trainer(tmp_path, METHODS["offline"], peft_config=config)
    made.train()
    assert any(weight.abs().max() > 0 for name, weight in made.model.named_parameters() if "shira" in name)


@pytest.mark.parametrize("kind", METHODS)
def test_an_own_callback_and_an_own_optimizer(tmp_path, kind):
    """Both are used: the callback sees every step, and a rate of zero leaves the weights alone."""
    seen = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            """Note the step."""
            seen.append(state.global_step)

    model = tiny.model()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    made = trainer(tmp_path, METHODS[kind], model=model, callbacks=[Count()], optimizers=(optimizer, None))
    made.train()
    assert seen == [1, 2]
    assert torch.equal(weights(model), before)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"another optimizer: it had SGD .*'lr': 0.0.*, this run has SGD .*'lr': 0.1"):
        trainer(tmp_path, METHODS[kind], model=model, optimizers=(optimizer, None)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", METHODS)
def test_an_own_tokenizer(tmp_path, kind):
    """Its template is what the rows are rendered with."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "<|im_start|>system\nkind<|im_end|>\n" + tiny.TEMPLATE
    made = trainer(tmp_path, METHODS[kind], processing_class=tokenizer)
    assert made.rows[0].prompt[1] == tokenizer.convert_tokens_to_ids("system")
    made.train()


@pytest.mark.parametrize("kind", METHODS)
def test_several_held_out_sets(tmp_path, kind):
    """Each has its name in the metrics; evaluate takes another one, raw; without any it says so."""
    sets = {"first": rows(4), "second": rows(6)}
    args = config(tmp_path, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, save_strategy="steps",
                  save_steps=1, metric_for_best_model="eval_second_loss", eval_on_start=True)  # fmt: skip
    made = trainer(tmp_path, METHODS[kind], args=args, eval_dataset=sets)
    made.train()
    metrics = made.evaluate()
    assert {"eval_first_loss", "eval_second_loss", "eval_second_rewards/accuracies"} <= metrics.keys()
    alone = made.evaluate(rows(6), metric_key_prefix="other")
    assert alone["other_loss"] == pytest.approx(metrics["eval_second_loss"])
    with pytest.raises(TrainingError, match="nothing to evaluate on; pass eval_dataset"):
        trainer(tmp_path / "b", METHODS[kind]).evaluate()


def test_several_held_out_sets_have_each_its_loss(tmp_path):
    """There is no eval_loss that could say which step is the best."""
    args = config(tmp_path, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, save_steps=1)
    with pytest.raises(TrainingError, match=r"metric_for_best_model is loss.* metric_for_best_model=eval_first_loss"):
        trainer(tmp_path, METHODS["offline"], args=args, eval_dataset={"first": rows(4)})


def test_rows_that_a_callback_evaluates_choose_no_step(tmp_path):
    """An easier set measured before the first step is not what the steps are compared with."""

    class Looking(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            made.evaluate(rows(1))

    kept = []
    for callbacks in ([], [Looking()]):
        args = config(tmp_path / str(len(kept)), eval_strategy="steps", eval_steps=1, save_strategy="steps",
                      load_best_model_at_end=True, save_steps=1, max_steps=4)  # fmt: skip
        made = trainer(tmp_path, METHODS["offline"], args=args, eval_dataset=rows(8), callbacks=callbacks)
        made.train()
        kept.append((made.kept_step, made.state.best_metric))
    assert kept[0] == kept[1]


def test_a_loss_of_ones_own_is_a_method(tmp_path):
    """The usual way to change a Trainer would not be called."""

    class Own(AlignmentTrainer):
        def compute_loss(self, *_, **__):
            raise AssertionError

    with pytest.raises(TrainingError, match=r"Own has a compute_loss, which is not called.* write it as a Method"):
        Own(str(tiny.save(tmp_path / "m")), METHODS["offline"], config(tmp_path), rows(4))


UNSOUND = {
    "probability is 1.7, not between 0 and 1": {"probability": 1.7},
    "chosen and rejected are the same tokens": {"chosen": [5, 3], "rejected": [5, 3]},
    "no token, or one below 0": {"prompt": []},
    "no token, or one below 0, in": {"chosen": [-1, 3]},
}


@pytest.mark.parametrize("found", UNSOUND)
def test_encoded_rows_are_checked_too(tmp_path, found):
    """Each with its place."""
    encoded = [dataclasses.replace(pair, **UNSOUND[found]) for pair in tiny.encoded_pairs(2)]
    with pytest.raises(DataError, match=rf"train_dataset:1: {found}"):
        trainer(tmp_path, METHODS["offline"], data=encoded)


def test_health_is_watched_on_the_first_set(tmp_path):
    """Its change is against its own start; rows that only evaluate was given have none."""
    long = [{**row, "chosen": [{"role": "assistant", "content": "tea " * 30}]} for row in rows(4)]
    made = trainer(tmp_path, METHODS["offline"], eval_dataset={"short": rows(4), "long": long})
    metrics = made.evaluate()
    assert metrics["eval_short_health/chosen_logps_change"] == metrics["eval_long_health/chosen_logps_change"] == 0
    assert "eval_short_objective/entropy" in metrics
    assert "eval_long_objective/entropy" not in metrics
    assert not [name for name in made.evaluate(long) if "health" in name]


def test_prompts_alone_are_enough_for_a_method_without_labels(tmp_path):
    """Each prompt once, whether it comes with pairs or without."""
    prompts = [{"prompt": row["prompt"]} for row in [*rows(5), *rows(5)]]
    assert len(trainer(tmp_path, METHODS["on-policy"], data=prompts).rows) == 5
    assert len(trainer(tmp_path, METHODS["on-policy"], data=[*rows(5), *rows(5)]).rows) == 5
    with pytest.raises(DataError, match='no column "chosen"'):
        trainer(tmp_path, METHODS["offline"], data=prompts)


def test_rewards_are_summed_with_their_weights(tmp_path):
    """Two functions, of whose sum the metrics tell; a number of weights that does not fit is refused."""

    def long(completions, **_):
        return [len(text[0]["content"].split()) for text in completions]

    args = config(tmp_path, reward_weights=[0.5, 2.0])
    made = trainer(tmp_path, METHODS["on-policy"], args=args, reward_funcs=[warmth, long])
    made.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "objective/reward" in lines[0]
    with pytest.raises(InputError, match="3 numbers for 1 reward_funcs"):
        trainer(tmp_path, METHODS["on-policy"], args=config(tmp_path, reward_weights=[1.0, 2.0, 3.0]))
    bad = trainer(tmp_path / "b", METHODS["on-policy"], reward_funcs=lambda prompts, completions: ["?"] * len(prompts))
    with pytest.raises(InputError, match=r"its answer to completion 0 is '\?'"):
        bad.train()


def test_a_reward_trained_on_the_pairs_first(tmp_path):
    """One line; it is saved, and its folder is a reward too."""
    options = {"eval_dataset": rows(4), "peft_config": LORA}
    made = trainer(tmp_path, METHODS["on-policy"], reward_funcs=RewardTraining(gamma=0.5), **options)
    made.train()
    trainer(tmp_path / "b", METHODS["on-policy"], reward_funcs=str(tmp_path / "reward"), **options).train()
    with pytest.raises(InputError, match="stops by held-out pairs; pass them as eval_dataset"):
        trainer(tmp_path / "c", METHODS["on-policy"], reward_funcs=RewardTraining(gamma=0.5))


def test_a_trained_reward_takes_its_place_when_the_run_begins(tmp_path):
    """The one of an earlier run stays while another process trains there, and goes with the run's own first step."""
    options = {"reward_funcs": RewardTraining(gamma=0.5), "eval_dataset": rows(4)}
    trainer(tmp_path, METHODS["on-policy"], **options).train()
    place = tmp_path / "reward" / "reward.json"
    before = place.read_text()
    made = trainer(tmp_path, METHODS["on-policy"], **{**options, "reward_funcs": RewardTraining(gamma=0.4)})
    with (tmp_path / ".lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="works in this folder; wait for its end"):
            made.train()
    assert place.read_text() == before
    made.train()
    assert json.loads(place.read_text())["gamma"] == 0.4


def test_a_folder_that_holds_no_reward_is_not_replaced_by_one(tmp_path):
    """Whatever the user has put there stays, and nothing is trained."""
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"reward: the reward that is trained is saved there, .*; move it"):
        trainer(tmp_path, METHODS["on-policy"], reward_funcs=RewardTraining(gamma=0.5), eval_dataset=rows(4))
    assert (tmp_path / "reward" / "README.md").read_text() == "mine"


def coldness(prompts, completions, **columns):
    """Another reward."""
    return [-value for value in warmth(prompts, completions, **columns)]


@pytest.mark.parametrize(
    ("name", "first", "second", "weights"),
    [
        ("reward: it had .* warmth, this run has .* coldness", warmth, coldness, None),
        ("reward_weights", warmth, warmth, [0.5]),
        ("reward: it had .*'gamma': 0.5.*'gamma': 0.1", RewardTraining(gamma=0.5), RewardTraining(gamma=0.1), None),
        ("reward: it had .*'scale': 1.*'scale': 2", ColumnReward(scale=1.0), ColumnReward(scale=2.0), None),
    ],
    ids=["function", "weights", "training", "columns"],
)
def test_a_run_does_not_go_on_with_another_reward(tmp_path, name, first, second, weights):
    """Another function, weight, training or scale; with the same it goes on."""
    method = PD(gamma=0.5, beta=0.0, pairs="data") if isinstance(first, ColumnReward) else METHODS["on-policy"]
    data = [{**row, "chosen_reward": 1.0, "rejected_reward": 0.0} for row in rows()]
    options = {"data": data, "eval_dataset": rows(4)}
    for resume in (False, True):
        trainer(tmp_path, method, reward_funcs=first, **options).train(resume_from_checkpoint=resume)
    args = config(tmp_path, reward_weights=weights)
    with pytest.raises(InputError, match=f"another {name}"):
        trainer(tmp_path, method, args=args, reward_funcs=second, **options).train(resume_from_checkpoint=True)


def test_a_reward_trained_again_under_its_name_is_another(tmp_path):
    """Its folder says what it is: by the numbers in it."""
    data, held, method = rows(), rows(4), METHODS["on-policy"]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in data]
    for place, pairs in (("a", data), ("b", swapped)):
        args = config(tmp_path / place, max_steps=1)
        training = RewardTraining(gamma=0.5)
        trainer(tmp_path, method, args=args, data=pairs, reward_funcs=training, eval_dataset=held).train()
    folder = tmp_path / "reward"
    shutil.copytree(tmp_path / "a" / "reward", folder)
    trainer(tmp_path / "run", method, reward_funcs=str(folder)).train()
    trainer(tmp_path / "run", method, reward_funcs=str(folder)).train(resume_from_checkpoint=True)
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "b" / "reward", folder)
    with pytest.raises(InputError, match="another reward; give the same"):
        trainer(tmp_path / "run", method, reward_funcs=str(folder)).train(resume_from_checkpoint=True)


def test_what_a_reward_was_made_with_is_written_nowhere(tmp_path):
    """An argument of a partial may be the key of a service."""
    hidden = functools.partial(warmth, api_key="sk-0123456789abcdef")
    trainer(tmp_path, METHODS["on-policy"], reward_funcs=hidden).train()
    assert (tmp_path / "checkpoint-2" / "manifest.json").is_file()
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"sk-0123456789abcdef" not in file.read_bytes(), file


def test_an_adapter_on_other_weights_than_its_base_has_is_refused(tmp_path):
    """A model trained in memory is not the one in the folder that it came from, and that the adapter would name."""
    base = tiny.save(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer(tmp_path / "lora", METHODS["offline"], copy.deepcopy(model), peft_config=LORA)
    trainer(tmp_path / "full", METHODS["offline"], model).train()
    for given, options in ((model, {"peft_config": LORA}), (get_peft_model(copy.deepcopy(model), copy.copy(LORA)), {})):
        with pytest.raises(ModelError, match="came as an object with other weights than its folder has"):
            trainer(tmp_path / "again", METHODS["offline"], given, **options)
    rounded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).float()
    trainer(tmp_path / "rounded", METHODS["offline"], rounded, peft_config=copy.copy(LORA))
    model.save_pretrained(tmp_path / "trained")
    model.name_or_path = str(tmp_path / "trained")
    trainer(tmp_path / "again", METHODS["offline"], model, peft_config=LORA).train()


def test_sixteen_bit_weights_that_are_trained_are_told(tmp_path, caplog):
    """Updates below their rounding are lost; an adapter's weights are of 32 bits."""
    trainer(tmp_path / "a", METHODS["offline"], tiny.model().bfloat16(), peft_config=LORA)
    trainer(tmp_path / "b", METHODS["offline"])
    assert "lost to rounding" not in caplog.text
    trainer(tmp_path / "c", METHODS["offline"], tiny.model().bfloat16())
    assert "weights in bfloat16 are trained as they are, and most updates are lost to rounding" in caplog.text


def test_a_start_that_was_trained_at_another_temperature_is_told(tmp_path, caplog):
    """Its distribution is not softmax(logits)."""
    args = config(tmp_path / "a", temperature=0.7, max_steps=1)
    first = trainer(tmp_path / "a", METHODS["on-policy"], args=args)
    first.train()
    first.save_model(str(tmp_path / "model"))
    trainer(tmp_path / "b", METHODS["on-policy"], str(tmp_path / "model"), args=args)
    assert "trained at temperature" not in caplog.text
    trainer(tmp_path / "c", METHODS["offline"], str(tmp_path / "model"))
    assert "the model was trained at temperature 0.7 and is taken at 1, as start and reference" in caplog.text


def test_the_card_has_the_numbers_of_the_held_out_pairs(tmp_path):
    """Not of others that were evaluated later."""
    made = trainer(tmp_path, METHODS["offline"], eval_dataset=rows(4))
    made.train()
    held = made.evaluate()
    assert made.evaluate(rows(12)[4:])["eval_loss"] != held["eval_loss"]
    assert made.last_evaluation()["eval_loss"] == held["eval_loss"]


def test_two_trainers_of_one_model_do_not_train_it_in_turns(tmp_path):
    """The one's adapter has frozen what the other trains, or its reference is what the model was."""
    model = tiny.model()
    full, other = (trainer(tmp_path / name, DPO(0.5), model) for name in "ab")
    full.train()
    with pytest.raises(ModelError, match="another trainer has trained the model since"):
        other.train()
    trainer(tmp_path / "c", METHODS["offline"], model, peft_config=LORA)
    with pytest.raises(TrainingError, match=r"every weight of the model is frozen \(by another trainer"):
        full.train()


def test_what_is_refused_says_what_to_do(tmp_path):
    """Before a model is loaded: none of these names a model that there is."""
    nowhere = "no/such-model"
    with pytest.raises(InputError, match=r"method is 'pmel'; give a Method or one of .*; did you mean \"pmle\""):
        AlignmentTrainer(nowhere, "pmel", config(tmp_path), rows())
    with pytest.raises(InputError, match=r"args is TrainingArguments; give distalign\.AlignmentConfig"):
        check_arguments("train pmle", TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(InputError, match="rkl needs a reward for the responses; give one as reward_funcs"):
        AlignmentTrainer(nowhere, "rkl", config(tmp_path), rows())
    with pytest.raises(InputError, match="train_dataset is None"):
        AlignmentTrainer(tiny.model(), "pmle", config(tmp_path), processing_class=tiny.tokenizer())
    model = tiny.model()
    with pytest.raises(ModelError, match="it came as an object; pass its tokenizer as processing_class"):
        AlignmentTrainer(model, "pmle", config(tmp_path), rows())
    with pytest.raises(InputError, match=r"temperature is 0\.0; input should be greater than 0"):
        config(tmp_path, temperature=0.0)
    with pytest.raises(InputError, match="min_new_tokens is 9 and max_completion_length 5"):
        config(tmp_path, min_new_tokens=9)
    with pytest.raises(InputError, match="model_init_kwargs has device_map"):
        config(tmp_path, model_init_kwargs={"device_map": "auto"})


def test_settings_that_there_are_not_name_the_one_that_was_meant(tmp_path):
    """What TRL's users write, and a slip."""
    for settings, message in {
        ("beta", 0.1): "it is the method's: DPO",
        ("max_prompt_length", 9): "prompts are never cut: max_length",
        ("num_generation", 2): 'did you mean "num_generations"',
    }.items():
        with pytest.raises(TrainingError, match=f'AlignmentConfig has no setting "{settings[0]}"; {message}'):
            config(tmp_path, **dict([settings]))


WRONG = """
import tiny
from transformers import AutoModelForSeq2SeqLM, LlamaForSequenceClassification, T5Config

from distalign import AlignmentConfig, AlignmentTrainer, InputError, RewardTraining

tea = [{"prompt": "tea", "chosen": "warm", "rejected": "cold"}]
given = {"model": tiny.model(), "method": "pmle", "train_dataset": tea, "processing_class": tiny.tokenizer()}
classifier = LlamaForSequenceClassification(tiny.model().config)
for wrong in (
    {"model": 5},
    {"method": 5},
    {"train_dataset": ["tea"]},
    {"method": "rkl", "reward_funcs": RewardTraining},
    {"tokenizer": 1},
    {"model": classifier},
    {"model": tiny.model().model},
    {"model": AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=60, d_model=8, d_kv=4, d_ff=8, num_layers=1))},
    {"processing_class": "gpt2"},
    {"peft_config": {"r": 4}},
    {"optimizers": print},
    {"callbacks": print},
    {"train_dataset": 5},
    {"eval_dataset": {"a": None}},
    {"method": "rkl", "reward_funcs": classifier},
    {"args": AlignmentConfig("tiny.py/run", use_cpu=True)},
):
    try:
        AlignmentTrainer(**{"args": AlignmentConfig("unused", use_cpu=True)} | given | wrong)
    except InputError as error:
        print(error)
"""


def test_what_is_of_the_wrong_kind_is_refused(tmp_path):
    """With what was found and what to give; in a process where annotations are not checked, as a user's."""
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", WRONG], capture_output=True, text=True, cwd=root, check=True)
    assert [line.split(";")[0] for line in run.stdout.splitlines()] == [
        "model is a int",
        "method is a int",
        "rows:1: str, not a row",
        "reward_funcs has <class 'distalign.rewards.reward_model.RewardTraining'>",
        'AlignmentTrainer has no setting "tokenizer"',
        "model LlamaForSequenceClassification: a LlamaForSequenceClassification is no causal language model",
        "model LlamaModel: a LlamaModel is no causal language model",
        "model T5ForConditionalGeneration: a T5ForConditionalGeneration is no causal language model",
        "processing_class is a str",
        "peft_config is a dict",
        "optimizers is a builtin_function_or_method",
        "callbacks is a builtin_function_or_method",
        "train_dataset is a int",
        "eval_dataset a is a NoneType",
        "reward_funcs has a LlamaForSequenceClassification of no folder, whose tokenizer is not known",
        "train pmle: output_dir is tiny.py/run, which is a file or in one",
    ]
    with pytest.raises(TrainingError, match="there is no eval_dataset; pass one"):
        trainer(tmp_path, METHODS["offline"], args=config(tmp_path, eval_strategy="epoch"), eval_dataset={})
    with pytest.raises(TrainingError, match="end_token_id is 999, and the model has no such token"):
        trainer(tmp_path, METHODS["offline"], args=config(tmp_path, end_token_id=999))


def test_nothing_to_train_is_refused(tmp_path):
    """A frozen model, and an optimizer of other weights than those that are trained."""
    with pytest.raises(TrainingError, match="every weight of the model is frozen"):
        trainer(tmp_path, METHODS["offline"], model=tiny.model().requires_grad_(False))
    model = tiny.model()
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TrainingError, match="the optimizer holds none of the weights that are trained"):
        trainer(tmp_path, METHODS["offline"], model=model, peft_config=LORA, optimizers=(other, None))


def test_an_optimizer_without_the_critic_is_refused(tmp_path):
    """The value head is made later, and would never be trained."""
    model, method = tiny.model(), RKL(gamma=0.5, beta=0.1, estimator="ppo")
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TrainingError, match=r"before the critic's value head .*; leave it to the settings \(optim"):
        trainer(tmp_path, method, model=model, optimizers=(own, None))


@pytest.mark.parametrize(
    "settings", [{"data_seed": 0}, {"dataloader_drop_last": True}, {"train_sampling_strategy": "sequential"}], ids=str
)
def test_an_order_that_rounds_do_not_follow_is_refused(tmp_path, settings):
    """By the setting's name."""
    with pytest.raises(TrainingError, match=f"{next(iter(settings))} is .*; rounds .* leave it out"):
        trainer(tmp_path, METHODS["on-policy"], args=config(tmp_path, **settings))


def test_a_push_without_the_setting_makes_the_repository_first(tmp_path, monkeypatch):
    """As transformers does: `push_to_hub()` is called by itself, too."""
    made = trainer(tmp_path, METHODS["offline"], args=config(tmp_path, hub_model_id="me/mine"))
    pushed = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, _: setattr(self, "hub_model_id", self.args.hub_model_id))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda _, repo_id, **__: pushed.append(repo_id))
    made.push_to_hub()
    assert pushed == ["me/mine"]


def test_a_held_out_set_is_evaluated_by_its_name(tmp_path):
    """As transformers does; its metrics have the name."""
    made = trainer(tmp_path, METHODS["offline"], eval_dataset={"a": rows(3), "b": rows(4)})
    assert made.evaluate("b")["eval_b_loss"] == made.evaluate()["eval_b_loss"]
    assert "eval_a_loss" not in made.evaluate("b")


def test_what_a_push_would_not_read_is_refused(tmp_path):
    """A repository that was to be private is not made public in silence."""
    with pytest.raises(TrainingError, match="push_to_hub has no create_pr, private; it takes commit_message"):
        trainer(tmp_path, METHODS["offline"]).push_to_hub(create_pr=True, private=True)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("recompute", "ful", "recompute is 'ful'; input should be 'none', 'selective' or 'full'"),
        ("reward_weights", 2.0, "reward_weights is 2.0; input should be a valid list"),
        ("reward_weights", ["a"], "reward_weights.0 is 'a'; input should be a valid number"),
        ("reward_timeout", "a", "reward_timeout is 'a'; input should be a valid number"),
        ("learning_rate", "fast", "learning_rate is 'fast'; input should be a valid number"),
        ("seed", -1, "seed is -1; input should be greater than or equal to 0"),
        ("health", "off", "health is 'off'; input should be a valid dictionary"),
        ("model_init_kwargs", "bf16", "model_init_kwargs is 'bf16'; input should be a valid dictionary"),
    ],
)
def test_a_value_that_there_is_not_is_refused(tmp_path, setting, value, message):
    """In Python as in a recipe: annotations are not checked there."""
    with pytest.raises(TrainingError, match=f"AlignmentConfig: {message}"):
        config(tmp_path, **{setting: value})


def test_settings_come_from_a_command_line(tmp_path):
    """By transformers' parser, mappings as JSON; a number that is text becomes one."""
    words = f"--output_dir {tmp_path} --use_cpu --reward_weights 1 2.5 --max_length 12 --learning_rate 1e-4".split()
    words += ["--health", '{"stop_on_collapse": true}', "--model_init_kwargs", '{"dtype": "bfloat16"}']
    words += ["--missing_end", '{"rule": "penalty", "value": -2}']
    (found,) = HfArgumentParser(AlignmentConfig).parse_args_into_dataclasses(words)
    assert (found.reward_weights, found.max_length, found.learning_rate) == ([1.0, 2.5], 12, 1e-4)
    assert found.health_settings == HealthSettings(stop_on_collapse=True)
    assert found.model_settings == {"dtype": "bfloat16"}
    assert found.rollout.missing_end.value == -2
    assert config(tmp_path, learning_rate="1e-4", temperature="0.5").learning_rate == 1e-4


def test_a_trainer_may_train_twice(tmp_path):
    """The policy is not at its reference the second time, and that is no fault."""
    made = trainer(tmp_path, DPO(gamma=0.5))
    made.train()
    once = weights(made.model)
    made.train()
    assert not torch.equal(weights(made.model), once)


def test_a_second_run_draws_its_own_responses(tmp_path):
    """Not those of the run before, whose weights were others."""
    made = trainer(tmp_path, METHODS["on-policy"], args=config(tmp_path, per_device_train_batch_size=12, max_steps=1))
    made.train()
    once = made.worker.round
    made.train()
    assert made.worker.round is not once


def test_a_critic_trains_once(tmp_path):
    """It is gone after a run."""
    run = trainer(tmp_path, RKL(gamma=0.5, beta=0.1, estimator="ppo"))
    run.train()
    with pytest.raises(TrainingError, match="has trained, and its critic is gone; make a new trainer"):
        run.train()


def test_held_out_rows_that_are_learned_from_are_told(tmp_path, caplog):
    """By their prompts, in a set of any name."""
    method = METHODS["offline"]
    trainer(
        tmp_path / "a",
        method,
        eval_dataset=[{**row, "prompt": [{**row["prompt"][0], "content": "new"}]} for row in rows(1)],
    )
    assert "held out they are not" not in caplog.text
    trainer(tmp_path / "b", method, eval_dataset={"own": rows(3)})
    assert "3 prompts of own are in train_dataset too: held out they are not" in caplog.text


def test_what_an_earlier_run_left_in_the_folder_is_told(tmp_path, caplog):
    """Its log, where it kept no checkpoint: this run's lines would follow."""
    for _ in range(2):
        made = trainer(tmp_path, METHODS["offline"], args=config(tmp_path, save_strategy="no"))
        assert "is of an earlier run" not in caplog.text
        made.train()
    assert f"{tmp_path / 'metrics.jsonl'} is of an earlier run" in caplog.text


def test_held_out_rows_of_another_form_are_refused(tmp_path):
    """Strings where chats are trained: another format would be measured."""
    with pytest.raises(TrainingError, match="own: rows of another form than train_dataset's"):
        trainer(
            tmp_path,
            METHODS["offline"],
            eval_dataset={"own": [{"prompt": "tell me", "chosen": "warm", "rejected": "cold"}]},
        )


def test_columns_that_a_reward_function_would_not_see_are_told(tmp_path, caplog):
    """A method that draws answers each prompt of pairs once."""
    same = [{**rows(1)[0], "answer": "happy"}, *({**row, "answer": "warm"} for row in rows(2))]
    trainer(tmp_path / "a", METHODS["on-policy"], data=same)
    assert "1 pairs have the prompt of another and other columns" in caplog.text
    caplog.clear()
    trainer(tmp_path / "d", PD(gamma=0.5, beta=0.0, pairs="data+reference"), data=same)
    assert "1 pairs have the prompt of another and other columns" in caplog.text
    caplog.clear()
    trainer(tmp_path / "b", METHODS["on-policy"], data=same[1:])
    # Of pairs that are rewarded themselves each has its own row.
    trainer(tmp_path / "c", PD(gamma=0.5, beta=0.0, pairs="data"), data=same)
    assert "other columns" not in caplog.text


def test_a_tokenizer_that_would_be_read_as_another_is_told(caplog):
    """transformers takes that of a Qwen2 model for a Qwen2Tokenizer, which splits text otherwise."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(["How do I say this"], trainers.BpeTrainer(special_tokens=["<unk>"]))
    own = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    warn_of_reloading(own, LlamaConfig())
    assert not caplog.text
    warn_of_reloading(own, Qwen2Config())
    assert "the saved model's tokenizer will give other tokens than processing_class" in caplog.text


def test_predict_says_what_to_call(tmp_path):
    """It is the Trainer's, for classifiers."""
    with pytest.raises(TrainingError, match=r"evaluate\(pairs\) measures"):
        trainer(tmp_path, METHODS["offline"]).predict(rows(2))


def test_a_reward_function_may_read_the_datas_responses(tmp_path):
    """As TRL gives them: every column of the row."""
    seen = []

    def like_the_chosen(completions, chosen, **_):
        seen.extend(text[0]["content"] for text in chosen)
        return [float(a[0]["content"] == b[0]["content"]) for a, b in zip(completions, chosen, strict=True)]

    trainer(tmp_path, METHODS["on-policy"], reward_funcs=like_the_chosen).train()
    assert seen
    assert all(text.startswith("happy warm") for text in seen)


def test_what_is_left_out_is_said(tmp_path, caplog):
    """A warning, which shows without any setting of logs."""
    long = {**rows(1)[0], "chosen": [{"role": "assistant", "content": "tea " * 70}]}
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, METHODS["offline"], args=config(tmp_path, too_long="drop"), data=[*rows(), long])
    assert "1 too long" in caplog.text


def test_what_would_not_be_read_is_refused(tmp_path):
    """A reward for a method that reads none, evaluations without held-out pairs."""
    with pytest.raises(TrainingError, match="reads no reward; leave reward_funcs out"):
        trainer(tmp_path, METHODS["offline"], reward_funcs=warmth)
    with pytest.raises(TrainingError, match="eval_strategy is set and there is no eval_dataset"):
        trainer(tmp_path, METHODS["offline"], args=config(tmp_path, eval_strategy="steps", eval_steps=1))


@pytest.mark.parametrize("kind", METHODS)
def test_rows_that_were_read_before(tmp_path, kind):
    """read_pairs and split_by_prompt give rows that the trainer takes."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    kept, held = split_by_prompt(read_pairs(file), 0.3)
    made = trainer(tmp_path / "a", METHODS[kind], data=kept, eval_dataset=held)
    made.train()
    assert len(made.rows) == len(kept)
    assert len(made.eval_dataset) == len(held)


def test_a_folder_with_an_adapter_is_a_model(tmp_path, tiny_folder):
    """Its adapter is merged, and all weights are trained."""
    first = trainer(tmp_path / "a", METHODS["offline"], model=str(tiny_folder), peft_config=LORA)
    first.train()
    first.save_model()
    second = trainer(tmp_path / "b", METHODS["offline"], model=str(tmp_path / "a"), processing_class=None)
    before = weights(second.model)
    second.train()
    assert not torch.equal(weights(second.model), before)


def test_max_length_beyond_the_model_is_the_models(tmp_path):
    """A pair that the model cannot read is refused before training, whatever max_length says."""
    long = {**rows(1)[0], "chosen": [{"role": "assistant", "content": "tea " * 70}]}
    with pytest.raises(DataError, match=f"max_length is {tiny.CONTEXT}"):
        trainer(tmp_path, METHODS["offline"], args=config(tmp_path, max_length=1000), data=[*rows(), long])
    args = config(tmp_path, max_length=1000, too_long="drop")
    assert len(trainer(tmp_path, METHODS["offline"], args=args, data=[*rows(), long]).rows) == 12


def test_a_gamma_that_is_too_large_is_warned_about_without_held_out_pairs(tmp_path, caplog):
    """From the first step's pairs; not again, and not by an evaluation after training."""
    made = trainer(tmp_path, PMLE(gamma=10.0, beta=0.0))
    made.train()
    made.evaluate(rows(4))
    assert caplog.text.count("labels look certain") == 1


def test_a_method_by_name_has_measured_settings(tmp_path):
    """Those of the packaged recipe pairs: PMLE draws nothing."""
    made = AlignmentTrainer(tiny.model(), "pmle", config(tmp_path), rows(), processing_class=tiny.tokenizer())
    assert made.method == PMLE(gamma=0.02, beta=0.0)
    assert made.worker is None


def test_the_token_budget_is_chosen_once_and_kept_on_resume(tmp_path, monkeypatch):
    """From free memory; a run that goes on has the same, whatever is free then."""
    settings = {
        "token_budget": None,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 1,
        "lr_scheduler_type": "constant",
    }
    made = trainer(tmp_path, METHODS["offline"], args=config(tmp_path, **settings))
    made.train()
    assert made.token_budget == 4096
    monkeypatch.setattr("distalign.training.trainer.available", lambda device: 3_000_000)
    again = trainer(tmp_path, METHODS["offline"], args=config(tmp_path, **settings | {"max_steps": 2}))
    again.train(resume_from_checkpoint=True)
    assert again.token_budget == 4096
    fresh = trainer(tmp_path / "fresh", METHODS["offline"], args=config(tmp_path / "fresh", **settings))
    fresh.train()
    assert fresh.token_budget < 4096


def test_defaults_are_the_recipes_defaults(tmp_path):
    """The same number has one default, wherever it is set."""
    args = AlignmentConfig(str(tmp_path), use_cpu=True)
    assert args.rollout == RolloutSettings()
    assert args.health_settings == HealthSettings()
    for name in ("token_budget", "recompute"):
        assert getattr(args, name) == Recipe.model_fields[name].default
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(AlignmentConfig)} - theirs
    documented = AlignmentConfig.__doc__
    assert all(f"{name}:" in documented or f"{name}," in documented for name in own)


def test_the_card_is_ours(tmp_path):
    """Method, settings, data; nothing secret."""
    made = trainer(tmp_path, METHODS["offline"], args=config(tmp_path, hub_token="hf_secret"))
    made.train()
    made.create_model_card(model_name="Kind", dataset_name="people/pairs", tags=["warm"])
    card = (tmp_path / "README.md").read_text()
    assert "# Kind" in card
    assert "people/pairs" in card
    assert "- warm" in card
    assert "gamma: 0.5" in card
    assert "hf_secret" not in card
