"""The trainer: the update does not depend on how it is computed, the numbers are what they say, a run can go on."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from transformers import EarlyStoppingCallback

from distalign.engine import Group, score
from distalign.methods import METHODS, Method, Needs, Pairs, Samples
from distalign.models.load import ModelError, Source
from distalign.models.policy import Lora, make_policy
from distalign.training.checkpoint import load_reference, newest_complete, save_reference
from distalign.training.config import AlignmentConfig
from distalign.training.rollout_settings import TrainingError
from distalign.training.trainer import AlignmentTrainer

PMLE, DPO = METHODS["pmle"](gamma=0.5, beta=0.0), METHODS["dpo"](gamma=0.5)
SOURCE = Source("tiny", "tiny", "made here")
TRAIN_METRICS = {
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"),
    *("logps/rejected", "tokens_per_second", "step_time", "learning_rate", "grad_norm", "step"),
}


def trainer(folder, method=PMLE, pairs=None, held=None, *, lora=None, token_budget=4096, policy=None, **settings):
    """A trainer on the tiny model; settings of its own and of AlignmentConfig."""
    own = ("callbacks", "extra_evaluation", "reference_cache")
    if patience := settings.pop("patience", None):
        settings["callbacks"] = [EarlyStoppingCallback(patience, settings.pop("min_delta", 0.0))]
    options = {key: settings.pop(key) for key in own if key in settings}
    if policy is None:
        torch.manual_seed(0)
        policy = make_policy(tiny.model(), tiny.tokenizer(), SOURCE, lora=lora, reference=method.needs.reference)
    arguments = {
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "save_total_limit": None,
        "report_to": "none",
        "use_cpu": True,
        "max_grad_norm": 0.0,
        **settings,
    }
    args = AlignmentConfig(output_dir=str(folder), token_budget=token_budget, health=None, **arguments)
    pairs = tiny.encoded_pairs(8) if pairs is None else pairs
    return AlignmentTrainer(policy, method, args, pairs, held, **options)


def parameters(made):
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


def metrics(folder):
    """Lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def direct_loss(method, policy, pairs):
    """The method's loss of all pairs at once, without the trainer."""
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]
    scores = score(policy.model, groups, reference=policy.reference)
    collected = {} if policy.reference is None else {"reference_logps": scores.reference_logps.view(-1, 2)}
    if pairs[0].probability is not None:
        collected["probability"] = torch.tensor([pair.probability for pair in pairs]).double()
    return method.loss(Pairs(scores.logps.view(-1, 2), **collected), Samples())


# One update -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PMLE, DPO], ids=["pmle", "dpo"])
@pytest.mark.parametrize(
    ("n", "settings"),
    [
        (8, {"per_device_train_batch_size": 8}),
        (8, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        (8, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}),
        (8, {"per_device_train_batch_size": 8, "token_budget": 1}),
        (7, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        (7, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "token_budget": 40}),
    ],
)
def test_an_update_does_not_depend_on_the_split(tmp_path, method, n, settings):
    """One SGD step = −learning rate × gradient of the mean loss over all pairs, uneven last batches too (1e-5)."""
    pairs = tiny.encoded_pairs(n, soft=True)
    made = trainer(tmp_path, method, pairs, **settings)
    made.policy.model.train()
    loss = direct_loss(method, made.policy, pairs)
    wanted = [p for p in made.model.parameters() if p.requires_grad]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)])
    before = parameters(made)
    made.train()
    update = (before - parameters(made)) / 1e-2
    torch.testing.assert_close(update, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 2e-5)
    assert float((update - gradient).norm() / gradient.norm()) < 1e-4
    assert made.kept_step == 1
    line = metrics(tmp_path)[0]
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


@pytest.mark.parametrize("method", [PMLE, DPO], ids=["pmle", "dpo"])
def test_metrics_have_their_names_and_are_means_over_pairs(tmp_path, method):
    """Every name of the documentation is in metrics.jsonl, and the numbers are those of a direct computation."""
    pairs = tiny.encoded_pairs(7)
    made = trainer(tmp_path, method, pairs, pairs, eval_strategy="steps", eval_steps=1, token_budget=60)
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]
    with torch.no_grad():
        logps = score(made.model, groups).logps.view(-1, 2)
        rewards = method.implicit_reward(logps, logps)
    start = made.evaluate()
    made.train()
    first = metrics(tmp_path)[1]
    assert set(first) >= TRAIN_METRICS
    for line, prefix in ((first, ""), (start, "eval_")):
        assert line[f"{prefix}logps/chosen"] == pytest.approx(float(logps[:, 0].mean()), rel=1e-5)
        assert line[f"{prefix}logps/rejected"] == pytest.approx(float(logps[:, 1].mean()), rel=1e-5)
        margin = float((rewards[:, 0] - rewards[:, 1]).mean())
        assert line[f"{prefix}rewards/margins"] == pytest.approx(margin, rel=1e-4, abs=1e-5)
        assert line[f"{prefix}loss"] == pytest.approx(
            float(method.loss(Pairs(logps=logps, reference_logps=logps), Samples())), rel=1e-5
        )
    second = metrics(tmp_path)[2]
    change = second["eval_logps/chosen"] - start["eval_logps/chosen"]
    assert second["eval_health/chosen_logps_change"] == pytest.approx(change)


def test_a_launcher_hears_how_many_processes_there_are(tmp_path, monkeypatch, caplog):
    """`accelerate launch --cpu --num_processes 2` starts one."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with caplog.at_level("INFO"):
        trainer(tmp_path).train()
    assert "processes: 1 (NO), 8 prompts each" in caplog.text


def test_soft_labels_are_a_cross_entropy(tmp_path):
    """With p_chosen the held-out loss is −p ln σ(l) − (1 − p) ln σ(−l); pairs without one are certain."""
    pairs = tiny.encoded_pairs(6, soft=True)
    pairs[2] = replace(pairs[2], probability=None)
    made = trainer(tmp_path, PMLE, pairs, pairs)
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]
    with torch.no_grad():
        logps = score(made.model, groups).logps.view(-1, 2)
    logit = 0.5 * (logps[:, 0] - logps[:, 1])
    p = torch.tensor([pair.label for pair in pairs]).double()
    expected = -(p * logit.sigmoid().log() + (1 - p) * (-logit).sigmoid().log()).mean()
    assert made.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
def test_the_reference_is_scored_once_and_not_touched(tmp_path, lora):
    """DPO's cached log-probabilities are the base's, also after steps; trainers may share them."""
    pairs, cache = tiny.encoded_pairs(8), {}
    base = tiny.model()
    policy = make_policy(base, tiny.tokenizer(), SOURCE, lora=lora, reference=True)
    made = trainer(tmp_path, DPO, pairs, policy=policy, max_steps=3, learning_rate=0.3, reference_cache=cache)
    made.train()
    groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]
    with torch.no_grad():
        expected = score(tiny.model(), groups).logps.view(-1, 2)
        torch.testing.assert_close(score(base, groups).logps.view(-1, 2), expected)
        assert not torch.allclose(score(made.model.eval(), groups).logps.view(-1, 2), expected, atol=1e-2)
    rows = made.labelled(pairs, reference=True)
    torch.testing.assert_close(torch.stack([row.reference_logps for row in rows]), expected, rtol=0, atol=1e-4)
    assert len(cache) == 8


def test_pairs_of_one_prompt_have_each_their_reference(tmp_path):
    """Two pairs that differ in their responses alone."""
    first, other = tiny.encoded_pairs(2)
    pairs = [first, replace(other, prompt=first.prompt)]
    made = trainer(tmp_path, DPO, pairs)
    found = torch.stack([row.reference_logps for row in made.labelled(pairs, reference=True)])
    expected = score(tiny.model(), [Group(first.prompt, [pair.chosen, pair.rejected]) for pair in pairs]).logps
    torch.testing.assert_close(found, expected.detach().view(-1, 2), rtol=0, atol=1e-4)


def test_pairs_from_another_process_have_their_own_reference(tmp_path):
    """Worker processes send copies of the rows: what is remembered of a pair goes by its text, not by its place."""
    pairs = tiny.encoded_pairs(12)
    losses = []
    for workers in (0, 2):
        made = trainer(
            tmp_path / str(workers),
            DPO,
            pairs,
            per_device_train_batch_size=2,
            max_steps=12,
            dataloader_num_workers=workers,
        )
        made.train()
        losses.append([row["loss"] for row in metrics(tmp_path / str(workers)) if "loss" in row])
    assert losses[0] == losses[1]


def test_it_learns(tmp_path):
    """On pairs that differ in their words the loss falls from ln 2 and held-out labels are predicted."""
    made = trainer(
        tmp_path,
        DPO,
        tiny.encoded_pairs(64),
        tiny.encoded_pairs(40, seed=1),
        lora=Lora(r=4),
        optim="adamw_torch",
        max_steps=16,
        learning_rate=1e-2,
    )
    assert made.evaluate()["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    made.train()
    found = made.evaluate()
    assert found["eval_loss"] < 0.4
    assert found["eval_rewards/accuracies"] > 0.85


# Early stopping -------------------------------------------------------------------------------------------------------


def stopping(folder, held=None, **settings):
    """A trainer that keeps the best step."""
    return trainer(
        folder,
        PMLE,
        tiny.encoded_pairs(32),
        held or tiny.encoded_pairs(16, seed=1),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "eval_on_start": True,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "patience": 2,
            **settings,
        },
    )


def test_the_best_step_is_kept_though_no_save_was_due(tmp_path):
    """`save_steps` may be a multiple of `eval_steps`; the best step that lies between is saved all the same."""
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in tiny.encoded_pairs(16, seed=1)]
    made = stopping(tmp_path, held=swapped, save_steps=8, eval_on_start=False, patience=8, optim="adamw_torch")
    made.train()
    losses = {row["step"]: row["eval_loss"] for row in metrics(tmp_path) if "eval_loss" in row}
    assert made.kept_step == min(losses, key=lambda step: losses[step]) < 8
    assert made.evaluate()["eval_loss"] == pytest.approx(losses[made.kept_step], abs=1e-6)


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
def test_training_that_only_hurts_keeps_the_start(tmp_path, lora):
    """Held-out labels say the opposite: it stops by its patience, and the weights are those of step 0."""
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in tiny.encoded_pairs(16, seed=1)]
    made = stopping(tmp_path, held=swapped, lora=lora, optim="adamw_torch", learning_rate=0.03)
    before = parameters(made)
    made.train()
    losses = [row["eval_loss"] for row in metrics(tmp_path) if "eval_loss" in row]
    assert len(losses) == 3
    assert not min(losses[1:]) < losses[0]
    assert made.state.global_step == 2
    assert made.kept_step == 0
    assert torch.equal(parameters(made), before)
    state = json.loads((tmp_path / "checkpoint-0" / "trainer_state.json").read_text())
    assert state["best_metric"] == losses[0], "a run that goes on from here must know that the start is the best yet"
    assert made.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
def test_the_best_step_is_kept(tmp_path, lora):
    """kept_step is the one with the smallest held-out loss, and the model has its weights."""
    made = stopping(tmp_path, lora=lora, optim="adamw_torch", learning_rate=0.05, patience=9, max_steps=10)
    made.train()
    losses = {row["step"]: row["eval_loss"] for row in metrics(tmp_path) if "eval_loss" in row}
    assert made.kept_step == min(losses, key=lambda step: losses[step])
    assert made.kept_step != 0
    assert made.evaluate()["eval_loss"] == pytest.approx(losses[made.kept_step], rel=1e-6)


def test_the_best_step_may_be_the_best_by_another_number(tmp_path):
    """The start is compared by that number too: here the mean log-probability of the chosen responses."""
    made = stopping(
        tmp_path,
        optim="adamw_torch",
        learning_rate=0.02,
        patience=9,
        metric_for_best_model="eval_logps/chosen",
        greater_is_better=True,
    )
    made.train()
    found = {row["step"]: row["eval_logps/chosen"] for row in metrics(tmp_path) if "eval_loss" in row}
    assert made.kept_step == max(found, key=lambda step: found[step])
    assert made.evaluate()["eval_logps/chosen"] == pytest.approx(max(found.values()), rel=1e-6)


def test_a_run_that_breaks_keeps_the_best_step_before(tmp_path):
    """It stops, and what it had saved is whole."""
    made = stopping(tmp_path, optim="sgd", learning_rate=1e6)
    with pytest.raises(TrainingError, match=r"at step \d|after step \d|held-out loss"):
        made.train()
    losses = [row["eval_loss"] for row in metrics(tmp_path) if "eval_loss" in row]
    assert made.state.best_metric == pytest.approx(min(losses))
    assert newest_complete(tmp_path) is not None


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, Lora(r=4, dropout=0.2)], ids=["full", "lora"])
def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path, lora):
    """6 steps = 3 steps and 3 more from the checkpoint, bit for bit: parameters, metrics, patience, the step kept."""
    settings = {"lora": lora, "optim": "adamw_torch", "lr_scheduler_type": "linear", "save_total_limit": None}
    settings |= {"max_steps": 6, "per_device_train_batch_size": 5, "patience": 4, "learning_rate": 0.03}
    settings |= {"restore_callback_states_from_checkpoint": True}
    whole = stopping(tmp_path / "whole", **settings)
    whole.train()
    again = stopping(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(parameters(again), parameters(whole))
    assert again.kept_step == whole.kept_step
    timing = {"step_time", "tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    told = [
        [{k: v for k, v in row.items() if k not in timing} for row in metrics(tmp_path / name) if row["step"] > 3]
        for name in ("whole", "again")
    ]
    assert told[0] == told[1]
    assert not [row for row in metrics(tmp_path / "again") if row["step"] <= 3]
    patience = [
        callback.early_stopping_patience_counter
        for made in (whole, again)
        for callback in made.callback_handler.callbacks
        if hasattr(callback, "early_stopping_patience_counter")
    ]
    assert patience[0] == patience[1]


def test_a_saved_reference_belongs_to_its_pairs(tmp_path):
    """Rows in another order, fewer or other ones: each pair gets the log-probabilities that were its own, or none."""
    pairs = tiny.encoded_pairs(8)
    saved = {pair.key: torch.tensor([float(i), -float(i)]) for i, pair in enumerate(pairs)}
    save_reference(pairs, saved, tmp_path)
    rows = [*tiny.encoded_pairs(10)[8:], *pairs[:3:-1]]
    loaded = load_reference(rows, tmp_path, torch.device("cpu"))
    assert loaded.keys() == {pair.key for pair in pairs[4:]}
    assert all(torch.equal(logps, saved[key]) for key, logps in loaded.items())


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_reads_a_reward_wants_one(tmp_path, name):
    """Without one it is refused, with the way out; the others pass. No method is known by its name."""
    method = METHODS[name]()
    torch.manual_seed(0)
    policy = make_policy(tiny.model(), tiny.tokenizer(), SOURCE, reference=True)
    settings = {"policy": policy, "max_completion_length": 5}
    if not method.needs.reward:
        trainer(tmp_path, method, **settings)
        return
    with pytest.raises(TrainingError, match="needs a reward for the responses; give one as reward_funcs"):
        trainer(tmp_path, method, **settings)


def test_a_method_that_no_one_has_heard_of_is_trained(tmp_path):
    """Needs, a loss and an implicit reward are all that the trainer asks for."""

    @dataclass(frozen=True)
    class Likelihood(Method):
        needs = Needs(pairs="labelled")

        def loss(self, pairs, samples):
            return -pairs.logps[:, 0].mean()

        def implicit_reward(self, logps, reference_logps):
            return logps

    made = trainer(tmp_path, Likelihood(), max_steps=2)
    made.train()
    losses = [row["loss"] for row in metrics(tmp_path) if "loss" in row]
    assert losses[1] < losses[0]


def test_a_policy_without_the_reference_that_is_needed_is_refused(tmp_path):
    """At once, not at the first step."""
    policy = make_policy(tiny.model(), tiny.tokenizer(), SOURCE, lora=None, reference=False)
    with pytest.raises(TrainingError, match=r"needs the reference.*pass reference=True"):
        trainer(tmp_path, DPO, policy=policy)


def test_a_policy_that_moved_is_refused_before_the_first_step(tmp_path):
    """Also where the start is evaluated first."""
    policy = make_policy(tiny.model(), tiny.tokenizer(), SOURCE, lora=None, reference=True)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1.5)
    made = trainer(tmp_path, DPO, policy=policy, held=tiny.encoded_pairs(4), eval_strategy="steps", eval_on_start=True)
    with pytest.raises(ModelError, match="is not its reference"):
        made.train()


@pytest.mark.parametrize(("gamma", "message"), [(5.0, "lower gamma"), (1e-3, "raise gamma"), (0.3, None)])
def test_a_sharpness_that_tells_nothing_is_warned_of(tmp_path, caplog, gamma, message):
    """At the first evaluation, once."""
    made = trainer(tmp_path, METHODS["pmle"](gamma=gamma, beta=0.0), held=tiny.encoded_pairs(8))
    with caplog.at_level(logging.WARNING, "distalign.training.trainer"):
        made.evaluate()
        made.evaluate()
    told = [record.getMessage() for record in caplog.records if record.name == "distalign.training.trainer"]
    assert len(told) == (message is not None)
    assert message is None or message in told[0]


def test_an_evaluation_may_be_extended(tmp_path):
    """What `extra_evaluation` returns is among the metrics, and it is given the model in evaluation mode."""
    modes = []

    def extra(model):
        modes.append(model.training)
        return {"target/forward_kl": 1.5}

    made = trainer(tmp_path, held=tiny.encoded_pairs(4), extra_evaluation=extra)
    made.model.train()
    assert made.evaluate()["eval_target/forward_kl"] == 1.5
    assert modes == [False]
    assert made.model.training
