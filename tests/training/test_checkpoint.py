"""Checkpoints are whole or not there, of this run or refused; a stopped run ends as if nothing had stopped it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from acting import METHODS, Warmth, exit_code_elsewhere, logs, parameters, trainer
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from distalign.data import Pair
from distalign.errors import InputError
from distalign.methods import DPO, PD, PMLE
from distalign.models.policy import Lora
from distalign.rewards import RewardError
from distalign.training import checkpoint as checkpoints
from distalign.training import run_folder
from distalign.training.checkpoint import MANIFEST, newest_complete
from distalign.training.config import AlignmentConfig
from distalign.training.health import HealthSettings
from distalign.training.rollout_settings import TrainingError
from distalign.training.run_folder import cut_log, locked, remove, write_text
from distalign.training.trainer import AlignmentTrainer

SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "per_device_train_batch_size": 4}


class Lost(Exception):
    """The process, as far as a test is concerned."""


def lost_before_step(monkeypatch, step):
    """Training ends with Lost where it would begin the step after `step`; the function that is given mends it."""
    real = AlignmentTrainer.training_step

    def failing(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Lost
        return real(self, *args, **kwargs)

    monkeypatch.setattr(AlignmentTrainer, "training_step", failing)
    return lambda: monkeypatch.setattr(AlignmentTrainer, "training_step", real)


def interrupted(monkeypatch, folder, method, at, **settings):
    """A run that is lost before step `at` + 1."""
    mend = lost_before_step(monkeypatch, at)
    with pytest.raises(Lost):
        trainer(folder, METHODS[method], **settings).train()
    mend()


# A run that goes on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pmle", "rkl-gae", "pd-data+reference"])
@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_run_that_goes_on_logs_what_it_would_have(tmp_path, monkeypatch, method, logging_steps):
    """Lost at step 3 with a checkpoint of step 2, between two log lines or not: all lines and the weights are equal."""
    settings = {**SAVED, "logging_steps": logging_steps, "health": HealthSettings(), "minibatches": 2}
    whole = trainer(tmp_path / "whole", METHODS[method], **settings)
    whole.train()
    interrupted(monkeypatch, tmp_path / "cut", method, 3, **settings)
    again = trainer(tmp_path / "cut", METHODS[method], **settings)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(again), parameters(whole))
    assert logs(tmp_path / "cut") == logs(tmp_path / "whole")


class Failing(Warmth):
    """A reward that fails when it is called for the `at`-th time."""

    def __init__(self, at=0):
        self.calls, self.at = 0, at

    def __call__(self, requests):
        """A reward a response, or a failure."""
        self.calls += 1
        if self.calls == self.at:
            raise RewardError("down")
        return super().__call__(requests)


@pytest.mark.parametrize("at", [2, 6], ids=["first step", "third step"])
def test_a_step_that_failed_half_way_begins_anew_with_its_dropout(tmp_path, at):
    """In its second batch, of the first step or of another: the run is the one whose reward did not fail."""
    settings = {**SAVED, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "token_budget": 512}
    settings |= {"lora": Lora(r=4, dropout=0.3)}
    method = PD(0.5, 0.0, pairs="data")
    rows = tiny.encoded_pairs(16)
    ends = []
    for failing in (False, True):
        made = trainer(tmp_path / str(failing), method, reward=Failing(at * failing), rows=rows, **settings)
        if failing:
            with pytest.raises(RewardError, match=r"down; .* fix it and --resume"):
                made.train()
            made = trainer(tmp_path / str(failing), method, reward=Failing(), rows=rows, **settings)
        made.train(resume_from_checkpoint=failing)
        ends.append(parameters(made))
    assert torch.equal(*ends)
    assert logs(tmp_path / "True") == logs(tmp_path / "False")


def test_a_run_that_goes_on_from_an_earlier_step_keeps_the_later_ones_until_it_saves(tmp_path, monkeypatch):
    """Lost before: they wait, and the newest is the one it went on from; its next one takes their place."""
    settings = {**SAVED, "max_steps": 8}
    whole = trainer(tmp_path, METHODS["rkl"], **settings)
    whole.train()
    expected = logs(tmp_path)
    mend = lost_before_step(monkeypatch, 3)
    with pytest.raises(Lost):
        trainer(tmp_path, METHODS["rkl"], **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    mend()
    with pytest.raises(TrainingError, match="waits there to be removed"):
        trainer(tmp_path, PMLE(0.5, 0.0), **SAVED).train(
            resume_from_checkpoint=str(tmp_path / ".later" / "checkpoint-6")
        )
    later = [path.name for path in checkpoints.checkpoints(tmp_path / checkpoints.LATER)]
    assert later == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-2"
    again = trainer(tmp_path, METHODS["rkl"], **settings)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(again), parameters(whole))
    assert logs(tmp_path) == expected
    assert not (tmp_path / checkpoints.LATER).exists()


def offline(folder, *, swapped=False, **settings):
    """PMLE on pairs alone, evaluated, or on `swapped` labels: responses are drawn only to watch its health."""
    pairs = tiny.encoded_pairs(8)
    held = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs] if swapped else pairs
    torch.manual_seed(0)
    args = {**SAVED, "use_cpu": True, "max_completion_length": 5, "token_budget": 512, "eval_strategy": "steps"}
    args |= {"eval_steps": 1, "learning_rate": 1e-2, "save_total_limit": None, **settings}
    model, tokenizer = tiny.model(), tiny.tokenizer()
    args = AlignmentConfig(str(folder), **args)
    return AlignmentTrainer(model, PMLE(0.5, 0.0), args, pairs, held, processing_class=tokenizer)


def test_an_offline_run_remembers_its_health(tmp_path, monkeypatch):
    """What its start was, and what was warned of: its lines and its monitor are those of the run that was not lost."""
    whole = offline(tmp_path / "whole")
    whole.train()
    mend = lost_before_step(monkeypatch, 3)
    with pytest.raises(Lost):
        offline(tmp_path / "cut").train()
    mend()
    again = offline(tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert logs(tmp_path / "cut") == logs(tmp_path / "whole")
    assert again.monitor.state_dict() == whole.monitor.state_dict()


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_run_that_has_ended_trains_nothing(tmp_path, monkeypatch, caplog, strategy):
    """By its steps or in the middle of an epoch: same weights and lines, no step, and it says so."""
    settings = {"save_strategy": strategy, "eval_strategy": strategy, "max_steps": 3}
    whole = offline(tmp_path, **settings)
    whole.train()
    expected = logs(tmp_path)
    monkeypatch.setattr(AlignmentTrainer, "training_step", lambda *_: pytest.fail("a step was trained"))
    again = offline(tmp_path, **settings)
    with caplog.at_level(logging.INFO, "distalign"):
        again.train(resume_from_checkpoint=True)
    assert "had ended at step 3: nothing is trained" in caplog.text
    assert torch.equal(parameters(again), parameters(whole))
    assert logs(tmp_path) == expected


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "lost"])
def test_a_folder_that_was_moved_still_has_its_best_step(tmp_path, monkeypatch, ended):
    """Here the start: a run that goes on in another folder restores it, and does not keep the last step instead."""
    settings = {"swapped": True, "max_steps": 4, "save_steps": 1, "save_total_limit": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_on_start": True}
    whole = offline(tmp_path / "whole", **settings)
    whole.train()
    assert whole.kept_step == 0
    if not ended:
        mend = lost_before_step(monkeypatch, 2)
        with pytest.raises(Lost):
            offline(tmp_path / "cut", **settings).train()
        mend()
    (tmp_path / ("whole" if ended else "cut")).rename(tmp_path / "moved")
    again = offline(tmp_path / "moved", **settings)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(again), parameters(whole))
    remove(tmp_path / "moved" / "checkpoint-0")
    with pytest.raises(TrainingError, match="checkpoint-0: it held the best step so far and is gone"):
        offline(tmp_path / "moved", **settings).train(resume_from_checkpoint=True)


def test_another_base_is_refused_wherever_it_differs(tmp_path):
    """Not in its first numbers alone."""
    made = offline(tmp_path)
    made.train()
    other = offline(tmp_path)
    with torch.no_grad():
        other.model.get_input_embeddings().weight.flatten()[64:].normal_()
    with pytest.raises(InputError, match="model"):
        other.train(resume_from_checkpoint=True)


REFUSED = {
    "save_only_model is True; a run could not go on": {"save_only_model": True},
    "train_sampling_strategy is group_by_length": {"train_sampling_strategy": "group_by_length"},
    "ignore_data_skip is True; a run that goes on would train on the first rows": {"ignore_data_skip": True},
    "debug is": {"debug": "underflow_overflow"},
    "include_num_input_tokens_seen is all; it counts nothing here": {"include_num_input_tokens_seen": "all"},
    "accelerator_config is .*; a batch of rows is no tensor": {"accelerator_config": {"dispatch_batches": True}},
    "fp16 is True; it has no effect on a CPU": {"fp16": True},
    "bf16_full_eval is True; evaluations compute as": {"bf16_full_eval": True},
    "fp16_full_eval is True; evaluations compute as": {"fp16_full_eval": True},
    "dataloader_persistent_workers is True; there are none": {"dataloader_persistent_workers": True},
    "label_smoothing_factor is 0.1; .* the column p_chosen": {"label_smoothing_factor": 0.1},
    "neftune_noise_alpha is 1.0; the engine adds no noise": {"neftune_noise_alpha": 1.0},
    "per_device_train_batch_size is 99999999999999999999": {"per_device_train_batch_size": 99999999999999999999},
    "dataloader_num_workers is -1; a number of processes": {"dataloader_num_workers": -1},
    "data_seed is -1; a seed is": {"data_seed": -1},
    "weight_decay is -1.0; weights would grow": {"weight_decay": -1.0},
    "max_steps is 0; nothing would be trained": {"max_steps": 0},
    "num_train_epochs is -1; nothing would be trained": {"max_steps": -1, "num_train_epochs": -1},
    "the optimizer or its schedule cannot be made": {"adam_beta1": 2.0},
    "the optimizer or its schedule cannot be made .*no_such": {"lr_scheduler_kwargs": {"no_such": 1}},
    "8 rows are less than one of 64": {"dataloader_drop_last": True, "per_device_train_batch_size": 64},
}


@pytest.mark.parametrize("found", REFUSED)
def test_settings_of_transformers_that_cannot_be_followed(tmp_path, found):
    """A message, no traceback of another library's, and no run that trains nothing."""
    with pytest.raises(InputError, match=found):
        offline(tmp_path, **REFUSED[found]).train()


def test_a_run_that_a_callback_stopped_goes_on(tmp_path):
    """Such as one for a cluster's time limit: only patience that is used up ends a run."""

    class Limit(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            """Stop after a step, and save."""
            control.should_save = control.should_training_stop = True

    made = offline(tmp_path)
    made.add_callback(Limit())
    made.train()
    assert made.state.global_step == 1
    again = offline(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5


def test_a_run_that_stopped_early_has_ended(tmp_path, monkeypatch, caplog):
    """Its patience is over, and it says so; the best step is what it gives again, and the last one is still there."""

    def stopping():
        made = offline(
            tmp_path,
            max_steps=9,
            save_steps=1,
            load_best_model_at_end=True,
            learning_rate=0.5,
            save_total_limit=1,
        )
        made.add_callback(EarlyStoppingCallback(2))
        return made

    whole = stopping()
    whole.train()
    assert whole.state.global_step < 9
    monkeypatch.setattr(AlignmentTrainer, "training_step", lambda *_: pytest.fail("a step was trained"))
    again = stopping()
    again.train(resume_from_checkpoint=True)
    assert f"early stopping ended the run at step {whole.state.global_step}" in caplog.text
    assert again.kept_step == whole.kept_step
    assert torch.equal(parameters(again), parameters(whole))


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(tmp_path):
    """More steps than before: it had not ended."""
    settings = {**SAVED, "lr_scheduler_type": "constant"}
    trainer(tmp_path, METHODS["rkl"], **settings).train()
    longer = trainer(tmp_path, METHODS["rkl"], **{**settings, "max_steps": 7})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 7


# Whole, or passed over ------------------------------------------------------------------------------------------------


def a_run(folder, **settings):
    """Checkpoints of steps 2, 4 and 5."""
    made = trainer(folder, METHODS["rkl"], **{**SAVED, **settings})
    made.train()
    return made


def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    """While anything is written the older one is the only one; every file is synced and in the manifest."""
    seen, synced = [], set()
    real = checkpoints.write_text
    monkeypatch.setattr(os, "fsync", lambda number: synced.add(os.readlink(f"/proc/self/fd/{number}")))

    def note(path, text):
        seen.append([place.name for place in checkpoints.checkpoints(tmp_path)])
        real(path, text)

    monkeypatch.setattr(checkpoints, "write_text", note)
    a_run(tmp_path, save_total_limit=1)
    assert seen == [[], ["checkpoint-2"], ["checkpoint-4"]]
    assert [place.name for place in checkpoints.checkpoints(tmp_path)] == ["checkpoint-5"]
    files = {path.name for path in (tmp_path / "checkpoint-5").rglob("*") if path.is_file()}
    ours = {"rollout.json", "rollout.safetensors", "distalign.json"}
    assert ours | {"optimizer.pt", "rng_state.pth", "trainer_state.json"} <= files
    manifest = json.loads((tmp_path / "checkpoint-5" / MANIFEST).read_text())
    assert manifest["files"].keys() == files - {MANIFEST}
    place = tmp_path / checkpoints.SAVING / "checkpoint-5"
    assert {str(place / name) for name in files - {MANIFEST}} <= synced
    assert str(tmp_path / "metrics.jsonl") in synced


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no manifest", "of another step", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, damage):
    """By its name and with the reason; the one before it is taken, and given by its path it is refused."""
    a_run(tmp_path)
    newest, before = tmp_path / "checkpoint-5", tmp_path / "checkpoint-4"
    file = newest / "rollout.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    if damage == "cut":
        file.write_bytes(content[:-5])
    elif damage == "changed":
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    elif damage == "no manifest":
        (newest / MANIFEST).unlink()
    elif damage == "manifest":
        (newest / MANIFEST).write_text('{"step": 5, "fil')
    else:
        # The round of another step: whatever it is, it is not what was saved here.
        file.write_bytes((before / "rollout.safetensors").read_bytes())
    assert newest_complete(tmp_path) == before
    reason = {
        "missing": "rollout.safetensors is missing",
        "no manifest": "has no manifest.json",
        "manifest": "cannot be read",
    }
    assert f"{newest} is passed over: " in caplog.text
    assert reason.get(damage, "rollout.safetensors is not what was saved") in caplog.text
    with pytest.raises(TrainingError, match=r"checkpoint-5: .*; go on from another checkpoint"):
        trainer(tmp_path, METHODS["rkl"], **SAVED).train(resume_from_checkpoint=str(newest))
    again = trainer(tmp_path, METHODS["rkl"], **SAVED)
    again.train(resume_from_checkpoint=True)
    assert checkpoints.defect(newest) is None, "the run that went on wrote its own"


def test_a_renamed_checkpoint_is_not_of_that_step(tmp_path, caplog):
    """A name says a step, the manifest another; or it says none."""
    a_run(tmp_path)
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-9")
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-5"
    assert "checkpoint-9 is passed over: it is of step 4" in caplog.text
    best = (tmp_path / "checkpoint-9").rename(tmp_path / "best")
    assert checkpoints.defect(best) == "it is of step 4, and its folder is not named checkpoint-4"


def test_a_checkpoint_that_only_wanted_its_name_gets_it(tmp_path):
    """Killed after the old one of the same step was removed, before the new one was renamed."""
    a_run(tmp_path)
    (tmp_path / checkpoints.SAVING).mkdir(exist_ok=True)
    (tmp_path / "checkpoint-5").rename(tmp_path / checkpoints.SAVING / "checkpoint-5")
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-5"


def test_the_text_of_a_value_lasts():
    """In another process a set has another order, and an object lies elsewhere."""
    one, other = object(), object()
    assert checkpoints.lasting({"a": [{"x", "y"}, one], "b": 1}) == checkpoints.lasting(
        {"b": 1, "a": [{"y", "x"}, other]}
    )
    assert checkpoints.lasting({"a": 1}) != checkpoints.lasting({"a": "1"})


def test_other_held_out_pairs_are_of_another_run(tmp_path):
    """The best step would be chosen by two sets."""
    offline(tmp_path, max_steps=2).train()
    with pytest.raises(InputError, match="another held-out pairs; give the same"):
        offline(tmp_path, max_steps=2, swapped=True).train(resume_from_checkpoint=True)


def test_the_order_of_rows_is_the_seeds(tmp_path):
    """Whatever is drawn between the trainer and its training."""
    ends = []
    for name in ("a", "b"):
        made = trainer(tmp_path / name, PMLE(0.5, 0.0), **SAVED)
        torch.manual_seed(len(ends))
        made.train()
        ends.append(parameters(made))
    assert torch.equal(*ends)


REWARDED = Pair("tell me", "warm", "cold", chosen_reward=2.0, rejected_reward=1.0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("method", {"method": DPO(0.5)}),
        ("method", {"method": PMLE(0.4, 0.0)}),
        ("data", {"rows": [replace(pair, chosen=[8, 3]) for pair in tiny.encoded_pairs(8)]}),
        ("data", {"rows": tiny.encoded_pairs(8)[::-1]}),
        ("model", {"kind": "qwen2"}),
        ("seed", {"seed": 1}),
        ("batches", {"per_device_train_batch_size": 8}),
        ("learning_rate", {"learning_rate": 0.5}),
        ("adam_beta1", {"adam_beta1": 0.5}),
        ("max_steps", {"max_steps": 3}),
        ("warmup_steps", {"warmup_steps": 1}),
        ("data_seed", {"data_seed": 5}),
        ("train_sampling_strategy", {"train_sampling_strategy": "sequential"}),
        ("data", {"rows": [replace(pair, row=REWARDED) for pair in tiny.encoded_pairs(8)]}),
        (
            "data",
            {"rows": [replace(pair, row=Pair("", "", "", extra={"key": 1})) for pair in tiny.encoded_pairs(8)]},
        ),
    ],
    ids=[
        *("method", "gamma", "rows", "order", "model", "seed", "batches"),
        *("learning_rate", "adam_beta1", "length", "warmup", "data_seed", "strategy", "column rewards", "columns"),
    ],
)
@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, name, changes, lora):
    """With what is different; nothing is changed in the folder."""
    settings = {**SAVED, "max_steps": 2, "lora": lora, "lr_scheduler_type": "linear"}
    trainer(tmp_path, PMLE(0.5, 0.0), **settings).train()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    again = {"method": PMLE(0.5, 0.0), **settings, **changes}
    with pytest.raises(InputError, match=rf"checkpoint-2: is of a run with another {name}.*give the same"):
        trainer(tmp_path, **again).train(resume_from_checkpoint=True)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}.items()


@pytest.mark.parametrize(
    ("name", "other"),
    [("lora_alpha", {"lora_alpha": 32}), ("use_rslora", {"use_rslora": True}), ("lora_dropout", {"lora_dropout": 0.1}),
     ("r", {"r": 2}), ("target_modules", {"target_modules": ["q_proj"]})],
)  # fmt: skip
def test_another_adapter_is_refused(tmp_path, name, other):
    """By the setting that differs, whichever run has it; with the same a run goes on."""
    settings, plain = {**SAVED, "max_steps": 2}, {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    for first, second in ((plain, plain | other), (plain | other, plain)):
        trainer(tmp_path, PMLE(0.5, 0.0), lora=LoraConfig(**first), **settings).train()
        with pytest.raises(InputError, match=f"another adapter {name}: it had .*, this run has .*give the same"):
            trainer(tmp_path, PMLE(0.5, 0.0), lora=LoraConfig(**second), **settings).train(resume_from_checkpoint=True)
    trainer(tmp_path, PMLE(0.5, 0.0), lora=LoraConfig(**first), **settings).train(resume_from_checkpoint=True)


@dataclass(frozen=True)
class Layered(PMLE):
    """A user's method with a setting that is no number."""

    layers: tuple[int, ...] = (1, 2)
    shape: object = None


def test_every_setting_of_a_method_counts(tmp_path):
    """Not numbers and words alone; a function is the same in another process."""
    settings = {**SAVED, "max_steps": 2}
    for resume in (False, True):
        method = Layered(0.5, 0.0, shape=lambda x: x)
        trainer(tmp_path, method, **settings).train(resume_from_checkpoint=resume)
    with pytest.raises(InputError, match=r"another method: it had .*\(1, 2\)"):
        trainer(tmp_path, Layered(0.5, 0.0, layers=(1, 3)), **settings).train(resume_from_checkpoint=True)


def test_a_configuration_that_computes_otherwise_is_another_model(tmp_path):
    """Of the same weights."""

    def changed(model):
        model.config.rms_norm_eps = 1e-2

    trainer(tmp_path, PMLE(0.5, 0.0), **{**SAVED, "max_steps": 2}).train()
    with pytest.raises(InputError, match="is of a run with another model"):
        trainer(tmp_path, PMLE(0.5, 0.0), prepare=changed, **{**SAVED, "max_steps": 2}).train(
            resume_from_checkpoint=True
        )


def test_a_secret_of_a_method_is_not_in_its_checkpoints(tmp_path):
    """And may be another where the run goes on."""

    @dataclass(frozen=True)
    class Asking(PMLE):
        api_key: str = ""

    settings = {**SAVED, "max_steps": 2}
    trainer(tmp_path, Asking(0.5, 0.0, "a-secret-word"), **settings).train()
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"a-secret-word" in p.read_bytes()]
    trainer(tmp_path, Asking(0.5, 0.0, "a-newer-word"), **settings).train(resume_from_checkpoint=True)


def test_weights_of_the_same_shape_are_another_model(tmp_path):
    """One weight far from the start of its tensor's neighbours is enough."""
    model = tiny.model()
    first = checkpoints.model_digest(model)
    assert checkpoints.model_digest(tiny.model()) == first
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    assert checkpoints.model_digest(model) != first


def test_by_default_the_last_checkpoint_is_kept(tmp_path):
    """Ten times a run, also of a method with a Python reward; beside the last the best, where there is one."""
    args = AlignmentConfig(str(tmp_path))
    assert (args.save_strategy, args.save_steps, args.save_total_limit) == ("steps", 0.1, 1)
    best = AlignmentConfig(str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", eval_steps=0.1)
    assert best.save_total_limit == 2


# A disk that is full --------------------------------------------------------------------------------------------------

FULL = {
    "torch.save": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    "torch.save, as its file is closed": RuntimeError("basic_ios::clear: iostream error"),
    "torch.save, of its writer": RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    "Python": OSError(28, "No space left on device"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, error):
    """It stops with a message that names it, leaves nothing half-written, and goes on once there is space."""
    whole = a_run(tmp_path / "whole", save_total_limit=1)
    real = checkpoints.save_file if isinstance(error, OSError) else torch.save

    def full(content, path, **more):
        if "checkpoint-4" in str(path):
            with open(path, "wb") as file:
                file.write(b"half")
            raise error
        return real(content, path, **more)

    with monkeypatch.context() as patch:
        if isinstance(error, OSError):
            patch.setattr(checkpoints, "save_file", full)
        else:
            patch.setattr(torch, "save", full)
        with pytest.raises(TrainingError, match=r"cannot be written .*make space; checkpoint-2 is whole.*--resume"):
            a_run(tmp_path / "full", save_total_limit=1)
    assert [path.name for path in (tmp_path / "full").rglob("checkpoint-*")] == ["checkpoint-2"]
    again = trainer(
        tmp_path / "full",
        METHODS["rkl"],
        **SAVED,
    )
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(again), parameters(whole))
    assert logs(tmp_path / "full") == logs(tmp_path / "whole")


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _heard():
    """SIGINT as on a terminal: what a shell starts in the background ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heard")
@pytest.mark.parametrize(("number", "stop"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("at", ["step", "log", "last step"])
def test_a_signal_lets_the_step_end_and_saves(tmp_path, monkeypatch, number, stop, at):
    """In the middle of a step or after it: its checkpoint is there, and the run ends as if nothing had been."""
    settings = {**SAVED, "save_strategy": "no", "optim": "adamw_torch"}
    whole = trainer(tmp_path / "whole", METHODS["rkl"], **settings)
    whole.train()
    step = 4 if at == "last step" else 2
    name = "log" if at == "log" else "training_step"
    real = getattr(AlignmentTrainer, name)

    def signalled(self, *args, **kwargs):
        if self.state.global_step == step and self._stop_signal is None:
            os.kill(os.getpid(), number)
        return real(self, *args, **kwargs)

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(AlignmentTrainer, name, signalled)
        with pytest.raises(stop) as stopped:
            trainer(tmp_path / "cut", METHODS["rkl"], **settings).train()
    assert number == signal.SIGINT or stopped.value.code == 143
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    done = {"step": 3, "log": 2, "last step": 5}[at]
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "cut")] == [f"checkpoint-{done}"]
    again = trainer(tmp_path / "cut", METHODS["rkl"], **settings)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(again), parameters(whole))
    assert logs(tmp_path / "cut") == logs(tmp_path / "whole")


@pytest.mark.usefixtures("_heard")
def test_a_second_run_that_is_stopped_is_saved(tmp_path, caplog):
    """At the step at which the first was: what the message names holds its weights, not those of the first."""

    class Stopping(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    made = trainer(tmp_path, METHODS["pmle"], callbacks=[Stopping()], **{**SAVED, "save_strategy": "no"})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            made.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(weight, made.model.state_dict()[name]) for name, weight in saved.items())
    assert f"{tmp_path}: checkpoint-2 of an earlier run wait in .earlier" in caplog.text


def test_the_checkpoints_of_an_earlier_run_wait(tmp_path):
    """Another run in the folder removes them only when a third begins; moved back, the first goes on."""
    settings = {**SAVED, "save_total_limit": 1}
    first = trainer(tmp_path, PMLE(0.5, 0.0), **settings)
    first.train()
    trainer(tmp_path, DPO(0.5), **settings).train()
    assert newest_complete(tmp_path).name == "checkpoint-5"
    shutil.rmtree(tmp_path / "checkpoint-5")
    os.replace(tmp_path / ".earlier" / "checkpoint-5", tmp_path / "checkpoint-5")
    again = trainer(tmp_path, PMLE(0.5, 0.0), **settings)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(again), parameters(first))


@pytest.mark.usefixtures("_heard")
def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    """Without a checkpoint, in the middle of the step."""
    ended = []

    def signalled(self, *_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        ended.append(True)

    monkeypatch.setattr(AlignmentTrainer, "training_step", signalled)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, METHODS["rkl"], **SAVED).train()
    assert not ended
    assert not checkpoints.checkpoints(tmp_path)


# The folder -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_one_process_at_a_time(tmp_path):
    """A second one is refused, by name of the first; the lock is nobody's after its process was killed."""

    def lock():
        with locked(tmp_path):
            pass

    def killed():
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    with locked(tmp_path), locked(tmp_path):
        assert exit_code_elsewhere(lock) == 2
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()
    assert exit_code_elsewhere(lock) == 0
    assert exit_code_elsewhere(killed) == -signal.SIGKILL
    lock()


def test_a_lock_stays_where_its_folder_is_copied_and_goes_where_a_child_outlives(tmp_path):
    """A copy reads and closes the lock's file; a child of a killed process (a loader of data) holds nothing."""
    folder = tmp_path / "run"

    def lock():
        with locked(folder):
            pass

    with locked(folder):
        shutil.copytree(folder, tmp_path / "copy")
        assert exit_code_elsewhere(lock) == 2
    ends, go_on = os.pipe()

    def killed_with_a_child():
        with locked(folder):
            if os.fork() == 0:
                os.close(go_on)
                os.read(ends, 1)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code_elsewhere(killed_with_a_child) == -signal.SIGKILL
    lock()
    os.close(go_on)
    os.close(ends)


def test_a_second_trainer_is_refused_before_it_trains(tmp_path):
    """And has removed nothing."""
    a_run(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    made = trainer(tmp_path, METHODS["rkl"], **SAVED)
    with locked(tmp_path):
        assert exit_code_elsewhere(lambda: made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_torn_last_line_is_dropped_with_a_message(tmp_path, caplog):
    """Lines after the step and the line that ends a run go too; a line within that is none is refused by its number."""
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1}', '{"step": 2}', '{"step": 3}', '{"step": 2, "train_runtime": 1.0}', '{"step": 2, "lo']
    path.write_text("\n".join(lines))
    cut_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert f"{path}: the last line is torn and is dropped" in caplog.text
    path.write_text('{"step": 1, "prompt": "a\u2028b\x85"}\n')
    cut_log(path, 2)
    assert path.read_text() == '{"step": 1, "prompt": "a\u2028b\x85"}\n'
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not a line of this log; remove it"):
        cut_log(path, 2)
    cut_log(tmp_path / "samples.jsonl", 2)


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path, monkeypatch):
    """Lost while it is written, or before it is renamed."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(run_folder.os, name, lambda *_: (_ for _ in ()).throw(Lost))
            with pytest.raises(Lost):
                write_text(path, "new")
        assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_link_is_removed_and_what_it_points_to_is_not(tmp_path):
    """A folder, a file, a link to a folder; what is not there is no error."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    for name in ("link", "nothing"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["precious", "file"]
