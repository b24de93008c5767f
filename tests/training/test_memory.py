"""Memory: what is said before a run, what to set when there is none left, and how much is free."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import acting
import pytest
import tiny
import torch
from engine_models import checkpointing
from test_trainer import DPO, PMLE, parameters, trainer

from distalign.engine import score
from distalign.engine.memory import MemoryEstimate, available, estimate
from distalign.methods import METHODS
from distalign.models.policy import Lora
from distalign.training.inputs import expected_lengths
from distalign.training.rollout_settings import TrainingError

WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 300, "max_position_embeddings": 512}
LENGTHS = (70, (40, 25))


def measured(model, lengths, **settings):
    """An estimate of `score` on groups of these lengths."""
    options = {"token_budget": 4096, "batch": 4, "state": 2.0, "free": 10**9, **settings}
    return estimate(model, lambda groups: score(model, groups), lengths, **options)


# What a run needs -----------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind():
    """Modes of single modules, the random state, parameters and gradients are those of before."""
    model = tiny.model("gpt2", **WIDE, n_positions=512)
    checkpointing(model)()
    model.transformer.h[0].train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = {name: p.clone() for name, p in model.named_parameters()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    measured(model, [LENGTHS])
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    first, *others = model.parameters()
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in others)


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
def test_weights_gradients_and_optimizer_are_what_there_is(tmp_path, lora):
    """Counted on the model and the optimizer after a step; models that a reference shares count once."""
    made = trainer(tmp_path, DPO, lora=lora, optim="adamw_torch")
    made.train()
    base = 4 * sum(p.numel() for n, p in made.model.named_parameters() if "lora" not in n)
    trained = 4 * sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    assert made.memory.weights == pytest.approx(base + trained, abs=100)
    assert made.memory.gradients == trained
    states = made.optimizer.optimizer.state.values()
    real = sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor) and v.numel() > 1)
    assert made.memory.optimizer == pytest.approx(real, rel=0.01)


def test_groups_that_will_come():
    """Pairs as they are; responses at their longest."""
    made = acting.trainer(Path("unused"), METHODS["pd"](0.5, 0.3), num_generations=3, max_completion_length=7)
    prompts, rollout = made.rows, made.rollout.settings
    assert expected_lengths(prompts[:1], made.method, rollout) == [(len(prompts[0].prompt), (7,) * 3)]
    pairs = tiny.encoded_pairs(2)
    lengths = [(len(p.prompt), (len(p.chosen), len(p.rejected))) for p in pairs]
    assert expected_lengths(pairs, PMLE, rollout) == lengths
    together = expected_lengths(pairs, METHODS["pmle"](0.5, 0.3), rollout)
    assert together == [(prompt, (*pair, 7, 7, 7)) for prompt, pair in lengths]


def test_the_largest_micro_batch_is_what_the_data_give():
    """The budget, or a whole batch if that is less, or the longest group if that is more."""
    model, lengths = tiny.model(), [(10, (3, 2)), (20, (8, 2)), (5, (1, 1))]
    assert measured(model, lengths, token_budget=40, batch=8).tokens == 40
    assert measured(model, lengths, token_budget=400, batch=2).tokens == 45
    assert measured(model, lengths, token_budget=4, batch=2).tokens == 30
    with pytest.raises(ValueError, match="no groups"):
        measured(model, [])


def some_memory(**settings):
    """1 GB of weights, 0.3 of gradients and optimizer, 1 MB for each token."""
    options = {"weights": 10**9, "gradients": 10**8, "optimizer": 2 * 10**8, "fixed": 0.0, "per_token": 1e6}
    return MemoryEstimate(**{**options, "tokens": 4096, "longest": 300, "free": 10**10, **settings})


@pytest.mark.parametrize("free", [700 * 10**6, 3 * 10**9, 40 * 10**9])
def test_the_largest_budget_fits_and_no_larger_one(free):
    """To two digits; 0 where the longest group does not fit; None where what is free is not known."""
    memory = some_memory(free=free)
    largest = memory.largest_budget()
    assert memory.needed(largest) <= free < memory.needed(round(largest * 1.1) + 1)
    assert [some_memory(free=free).largest_budget() for free in (500 * 10**6, None)] == [0, None]


# What is said ---------------------------------------------------------------------------------------------------------


def test_the_line_before_the_first_step(tmp_path, caplog):
    """Once in a run, with its parts; no warning where there is enough."""
    made = trainer(tmp_path, PMLE, max_steps=2)
    with caplog.at_level(logging.INFO, "distalign.training.trainer"):
        made.train()
    lines = [record.getMessage() for record in caplog.records if "memory" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("memory: weights 0.00 GB, gradients 0.00, optimizer unknown, micro-batch of ")
    assert "the largest token_budget that fits is" in lines[0]


@pytest.mark.parametrize(
    ("free", "message"),
    [(3 * 10**9, "set token_budget to 2700 or less"), (10**8, "no token_budget helps.*has 300 tokens"), (10**10, None)],
)
def test_too_little_memory_is_warned_of(tmp_path, caplog, monkeypatch, free, message):
    """With the number to set; never refused."""
    monkeypatch.setattr("distalign.training.trainer.estimate", lambda *_, **__: some_memory(free=free))
    with caplog.at_level(logging.WARNING, "distalign.training.trainer"):
        trainer(tmp_path, PMLE).train()
    warnings = [record.getMessage() for record in caplog.records if "memory" in record.getMessage()]
    assert len(warnings) == (message is not None)
    if message:
        assert re.search(message, warnings[0])


def failing(after, error):
    """PMLE, which runs out of memory once: when it was asked for a loss `after` times."""
    left = [after]

    class Fails(type(PMLE)):
        def loss(self, pairs, samples):
            left[0] -= 1
            if left[0] == -1:
                raise error
            return super().loss(pairs, samples)

    # It is mended under its own name: a run of another method is not gone on with.
    Fails.__name__ = type(PMLE).__name__
    return Fails(gamma=0.5, beta=0.0)


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …")
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes.")


@pytest.mark.parametrize(("error", "asked"), [(CUDA, r"2\.50 GiB"), (CPU, "7 bytes")], ids=["cuda", "cpu"])
def test_out_of_memory_says_what_to_set_and_the_run_goes_on(tmp_path, error, asked):
    """In the second micro-batch of step 3: what was saved there goes on to the very end that it would have had."""
    settings = {"max_steps": 4, "token_budget": 60, "optim": "adamw_torch", "lr_scheduler_type": "linear"}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    steps = len([row for row in (tmp_path / "whole/metrics.jsonl").read_text().splitlines() if '"loss"' in row])
    made = trainer(tmp_path / "broken", failing(9, error), **settings)
    place = tmp_path / "broken" / "checkpoint-"
    with pytest.raises(TrainingError, match=rf"out of memory at step \d.*{asked}.*token_budget to \d+.*{place}"):
        made.train()
    step = made.state.global_step
    assert 0 < step < steps
    again = trainer(tmp_path / "broken", **settings)
    again.train(resume_from_checkpoint=f"{place}{step}")
    assert torch.equal(parameters(again), parameters(whole))
    assert acting.logs(tmp_path / "broken") == acting.logs(tmp_path / "whole"), "the step that failed is logged once"


def test_a_group_that_does_not_fit_alone_says_so(tmp_path):
    """No token budget is named then."""
    made = trainer(tmp_path, failing(0, CUDA), token_budget=1)
    with pytest.raises(TrainingError, match=r"no token_budget helps.*recompute"):
        made.train()


def test_other_errors_pass(tmp_path):
    """They are not about memory."""
    made = trainer(tmp_path, failing(0, RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        made.train()


def test_out_of_memory_outside_a_micro_batch(tmp_path, monkeypatch):
    """In the optimizer, say: nothing is saved, for the weights may be half-way."""
    made = trainer(tmp_path)

    def fail(*args, **kwargs):
        raise CUDA

    monkeypatch.setattr(torch.optim.SGD, "step", fail)
    made.create_optimizer()
    monkeypatch.setattr(made.optimizer, "step", fail)
    with pytest.raises(TrainingError, match="outside a micro-batch"):
        made.train()
    assert not list(tmp_path.glob("checkpoint-*"))


# Against reality ------------------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """What tests/memory_process.py tells. Blocks are given back to the system, so that what was asked for is seen."""
    folder = tmp_path_factory.mktemp("memory")
    here = Path(__file__).parents[1]
    source = str(Path(sys.modules["distalign"].__file__ or "").parents[1])
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    command = [sys.executable, str(here / "memory_process.py"), "1024", "6144", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"folder": folder}


@pytest.mark.slow
@linux
def test_the_resident_set_grows_by_what_was_estimated(process):
    """Peak of two steps of a model of 20 million parameters: at most 10 % too little, twice too much."""
    assert process["tokens"] == 1024
    assert 0.9 * process["grown"] <= process["needed"] <= 2 * process["grown"]


@pytest.mark.slow
@linux
def test_a_real_lack_of_memory(process):
    """With less address space than a micro-batch needs, the process ends with advice, and with the run saved."""
    error = process["error"]
    assert "out of memory at step 1, in a micro-batch of 6144 tokens" in error
    assert "set token_budget to 3072 or less" in error
    assert (process["folder"] / "checkpoint-0" / "model.safetensors").is_file()


# What is free ---------------------------------------------------------------------------------------------------------


def write(root, files):
    """Files of a system that is not this one."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n"}
V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/memory.max": "5000000\n",
    "sys/fs/cgroup/a/memory.current": "2000000\n",
    "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 500000\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/b/memory.current": "1\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu:/x\n4:memory:/host/path\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000\n",
    "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 200000\n",
}
UNLIMITED = {**V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [(MACHINE, 8_192_000), (MACHINE | V2, 3_500_000), (MACHINE | V1, 3_200_000), (MACHINE | UNLIMITED, 8_192_000)],
    ids=["machine", "v2", "v1", "unlimited"],
)
def test_what_is_free_is_the_least_of_all_limits(tmp_path, files, expected):
    """The machine's, and what each control group above leaves, file cache counted as free."""
    assert available(torch.device("cpu"), root=write(tmp_path, files)) == expected


def test_what_is_not_known_is_none(tmp_path):
    """On a system without /proc."""
    assert available(torch.device("cpu"), root=tmp_path) is None
