"""Memory: a few tokens tell what a large micro-batch takes; what is said before a run, and when there is none left."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import acting
import pytest
import tiny
import torch
from test_trainer import DPO, PMLE, SOURCE, parameters, trainer
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from distalign.engine import Group, check, score
from distalign.engine import memory as engine_memory
from distalign.engine.available import available, spread
from distalign.engine.memory import Memory, estimate
from distalign.engine.room import Room, expected_shapes
from distalign.methods import METHODS
from distalign.models.policy import Lora, make_policy
from distalign.training.rounds import TrainingError

# Larger than the tests' model, so that what is kept is tensors and not their bookkeeping.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 300, "max_position_embeddings": 512}
SHAPE = (70, (40, 25))


def groups(shape, count):
    """Groups of one shape."""
    prompt, lengths = shape
    return [Group([5 + i] * prompt, [[7 + i] * length for length in lengths]) for i in range(count)]


def kept(model, run):
    """Bytes of the storages that autograd holds after a pass, those of the model left out: counted at the end."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: list = []

    def pack(tensor):
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in seen}
    del result
    return sum(size for address, size in storages.items() if address not in own)


def measured(model, shapes, **settings):
    """An estimate of `score` on these shapes."""
    options = {"token_budget": 4096, "batch": 4, "optimizer": 2.0, **settings}
    return estimate(model, lambda some: score(model, some), shapes, **options)


# What a micro-batch keeps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(
    ("kind", "path", "lora", "settings"),
    [
        ("llama", "shared", None, {}),
        ("llama", "shared", Lora(r=4, dropout=0.1), {}),
        ("llama", "shared", Lora(r=4, layers=1), {}),
        ("llama", "shared", Lora(r=4, target_modules=["lm_head", "q_proj"]), {}),
        ("gpt2", "shared", None, {"n_positions": 512}),
        ("gemma2", "shared", None, {"head_dim": 16, "sliding_window": 32}),
        ("mixtral", "shared", None, {"num_local_experts": 4}),
        ("bloom", "padded", None, {}),
    ],
    ids=["full", "lora", "top-layer", "head-adapter", "gpt2-dropout", "softcap", "experts", "padded"],
)
def test_a_few_tokens_tell_what_a_large_micro_batch_keeps(kind, path, lora, settings, count):
    """Bytes held by autograd for 1 and 5 groups of 135 tokens, counted there, within 2 % of the estimate."""
    model = make_policy(
        tiny.model(kind, **WIDE, **settings), tiny.tokenizer(), SOURCE, lora=lora, reference=False
    ).model
    if lora is None or "lm_head" not in lora.target_modules:
        assert check(model).path == path
    model.train()
    memory = measured(model, [SHAPE])
    real = kept(model, lambda: score(model, groups(SHAPE, count)))
    assert (memory.fixed + memory.per_token * 135 * count) == pytest.approx(real, rel=0.02)


def keep_products(context, operation, *args, **kwargs):
    """Selective checkpointing: matrix products are kept, all else is computed again."""
    save = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("selective", [False, True])
def test_layers_that_are_computed_again_are_counted(selective):
    """Activation checkpointing: the peak of a large backward pass within 10 %, far above what is kept, below all."""
    plain = tiny.model(**{**WIDE, "num_hidden_layers": 6})
    model = tiny.model(**{**WIDE, "num_hidden_layers": 6})
    context = partial(create_selective_checkpoint_contexts, keep_products)
    model.activation_checkpointing_enable({"use_reentrant": False, **({"context_fn": context} if selective else {})})
    memory, whole = measured(model, [SHAPE]), measured(plain, [SHAPE])
    model.train()
    skipped = engine_memory._counted_elsewhere(model, sum(SHAPE[1]))
    with engine_memory._Alive(skipped) as alive:
        score(model, groups(SHAPE, 1)).token_logps.sum().backward()
    assert memory.per_token * 135 == pytest.approx(alive.most, rel=0.1)
    assert memory.per_token > 1.5 * kept(model, lambda: score(model, groups(SHAPE, 1))) / 135
    assert memory.per_token < (0.9 if selective else 0.6) * whole.per_token


def test_nothing_is_left_behind():
    """Modes of single modules, the random state, parameters and gradients are those of before."""
    model = tiny.model("gpt2", **WIDE, n_positions=512)
    model.activation_checkpointing_enable()
    model.transformer.h[0].train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = {name: p.clone() for name, p in model.named_parameters()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    measured(model, [SHAPE])
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    first, *others = model.parameters()
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in others)


# What a run needs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optim", "tolerance"), [("adamw_torch", 0.01), ("adamw_torch_fused", 0.01), ("sgd", 0), ("adagrad", 0.01)]
)
@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
def test_weights_gradients_and_optimizer_are_what_there_is(tmp_path, optim, tolerance, lora):
    """Counted on the model and the optimizer after a step."""
    made = trainer(tmp_path, DPO, lora=lora, optim=optim)
    made.train()
    memory = made.room.memory
    copies = 1 if lora else 2
    base = 4 * sum(p.numel() for n, p in made.model.named_parameters() if "lora" not in n)
    trained = 4 * sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    extra = trained if lora else 0
    assert memory.weights == pytest.approx(copies * base + extra, abs=100)
    assert memory.gradients == trained
    states = made.optimizer.optimizer.state.values()
    real = sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor) and v.numel() > 1)
    assert memory.optimizer == pytest.approx(real, rel=tolerance)


def test_models_of_a_reward_count(tmp_path):
    """Those that a reward holds, also inside a sum, and each once."""
    from distalign.rewards import ExactReward, WeightedSum

    target = tiny.model()
    reward = WeightedSum([(str(i), 1.0, ExactReward(target, gamma=1.0, token_budget=99)) for i in range(2)])
    with_reward = acting.trainer(tmp_path / "a", METHODS["rkl"](0.5, 0.3), reward=reward)
    without = acting.trainer(tmp_path / "b", METHODS["rkl"](0.5, 0.3))
    for made in (with_reward, without):
        made.train()
    more = with_reward.room.memory.weights - without.room.memory.weights
    assert more == pytest.approx(4 * sum(p.numel() for p in target.parameters()), abs=100)


def test_groups_that_will_come():
    """Pairs as they are; responses as long as they may be; both sets where pairs and fresh samples are asked for."""
    made = acting.trainer(Path("unused"), METHODS["pd"](0.5, 0.3), samples=3, max_new_tokens=7, stale="resample")
    prompts = made.rows
    assert expected_shapes(prompts[:1], made.method.needs, made.rollout) == [(len(prompts[0].prompt), (7,) * 6)]
    pairs = tiny.encoded_pairs(2)
    lengths = [(len(p.prompt), (len(p.chosen), len(p.rejected))) for p in pairs]
    assert expected_shapes(pairs, PMLE.needs, made.rollout) == lengths
    beside = expected_shapes(pairs, METHODS["pmle"](0.5, 0.3).needs, made.rollout)
    assert beside == [(prompt, (*pair, 7, 7, 7)) for prompt, pair in lengths]


def test_the_largest_micro_batch_is_what_the_data_give():
    """The budget, or a whole batch if that is less, or the longest group if that is more."""
    model, shapes = tiny.model(), [(10, (3, 2)), (20, (8, 2)), (5, (1, 1))]
    assert measured(model, shapes, token_budget=40, batch=8).tokens == 40
    assert measured(model, shapes, token_budget=400, batch=2).tokens == 45
    assert measured(model, shapes, token_budget=4, batch=2).tokens == 30
    with pytest.raises(ValueError, match="no shapes"):
        measured(model, [])


def some_memory(**settings):
    """1 GB of weights, 0.3 of gradients and optimizer, 1 MB a token."""
    options = {"gradients": 10**8, "optimizer": 2 * 10**8, "head": 0, "kept": 0.0, "fixed": 0.0, "per_token": 1e6}
    options |= {"weights": 10**9, "tokens": 4096, "longest": 300, "vocabulary": 1000, "device": torch.device("cpu")}
    return Memory(**{**options, **settings})


@pytest.mark.parametrize("free", [700 * 10**6, 3 * 10**9, 40 * 10**9])
def test_the_largest_budget_fits_and_no_larger_one(free):
    """To two digits."""
    memory = some_memory()
    largest = memory.largest_budget(free)
    assert memory.needs(largest) <= free < memory.needs(round(largest * 1.1) + 1)


def test_kept_tiles_count_beside_the_gradient_off_the_cpu():
    """An accelerator allocates the head's gradient while all kept tiles are there; a CPU writes it as they go."""
    for device, more in (("cpu", 0), ("cuda", 3 * 10**7)):
        without, kept = (some_memory(head=4 * 10**7, kept=k, device=torch.device(device)) for k in (0.0, 3e4))
        assert kept.tiles(1000) - without.tiles(1000) == more


def test_no_budget_helps_where_a_group_does_not_fit():
    """0 for that, None where what is free is not known."""
    assert [some_memory().largest_budget(free) for free in (500 * 10**6, None)] == [0, None]


# What is said ---------------------------------------------------------------------------------------------------------


def test_the_line_before_the_first_step(tmp_path, caplog):
    """Once a run, with its parts; no warning where there is room."""
    made = trainer(tmp_path, PMLE, max_steps=2)
    with caplog.at_level(logging.INFO, "distalign.training.trainer"):
        made.train()
    told = [
        r.getMessage() for r in caplog.records if r.name == "distalign.training.trainer" and "memory" in r.getMessage()
    ]
    assert len(told) == 1
    assert told[0].startswith("memory: weights 0.00 GB, gradients 0.00, optimizer 0.00, micro-batch of ")
    assert "the largest token_budget that fits is" in told[0]


@pytest.mark.parametrize(
    ("free", "message"),
    [(3 * 10**9, "set token_budget to 2600 or less"), (10**8, "no token_budget helps.*has 300 tokens"), (10**10, None)],
)
def test_too_little_room_is_warned_of(caplog, free, message):
    """With the number to set; never refused."""
    with caplog.at_level(logging.INFO, "distalign.training.trainer"):
        Room("train x", some_memory(), free).tell()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
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
    again = trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=f"{place}{step}")
    assert torch.equal(parameters(again), parameters(whole))


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
    monkeypatch.setattr("distalign.engine.room._optimizer_state", lambda *_: None)
    with pytest.raises(TrainingError, match="outside a micro-batch"):
        made.train()
    assert not list(tmp_path.glob("checkpoint-*"))


# Against reality ------------------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")


def process(budget, what, folder):
    """What tests/memory_process.py tells. Blocks are given back to the system, so that what was asked for is seen."""
    here = Path(__file__).parents[1]
    source = str(Path(sys.modules["distalign"].__file__ or "").parents[1])
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    command = [sys.executable, str(here / "memory_process.py"), str(budget), what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@linux
def test_the_resident_set_grows_by_what_was_estimated(tmp_path):
    """Peak of two steps of a model of 20 million parameters, at two budgets and between them, within 15 %."""
    small, large = process(256, "fit", tmp_path / "small"), process(1024, "fit", tmp_path / "large")
    assert large["tokens"] == 4 * small["tokens"]
    more = {key: large[key] - small[key] for key in ("grown", "needs")}
    for found in (small, large, more):
        assert found["needs"] == pytest.approx(found["grown"], rel=0.15)


@linux
def test_a_real_lack_of_memory(tmp_path):
    """With less address space than a micro-batch needs, the process ends with advice, and with the run saved."""
    error = process(6144, "limit", tmp_path)["error"]
    assert "out of memory at step 1, in a micro-batch of 6144 tokens" in error
    assert "set token_budget to 3072 or less" in error
    assert (tmp_path / "checkpoint-0" / "model.safetensors").is_file()


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


def test_gaps_of_the_heap_are_left_out_where_it_is_tuned(monkeypatch):
    """One environment variable takes large blocks out of glibc's heap."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert spread(torch.device("cpu")) == 1.0
    assert spread(torch.device("cuda")) == 1.0
