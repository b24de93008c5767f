"""The benchmarks against TRL run, compare the same work, and write what they show. The processes are real."""

from __future__ import annotations

import json
import sys

import common
import cost
import memory
import overhead
import pytest
import sides
import small_job
import throughput
import torch
from engine_models import build

pytest.importorskip("trl")

ROW = {"model", "workload", "against", "time_ratio", "low", "high", "memory_ratio", "max_gradient_error"}


def test_useful_operations_are_those_of_one_pass():
    """They are what torch counts for a forward and backward pass with eager attention, but for its masked half."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build(dtype=torch.float32, vocab_size=1001, attn_implementation="eager").train()
    (group,) = common.Workload((20, 30), (10, 20), responses=1).groups(1, 1001)
    ids, rows = torch.tensor([group.prompt + group.responses[0][:-1]]), len(group.responses[0])
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False, logits_to_keep=rows).logits.sum().backward()
    norms = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    config, body = model.config, common.body_size(model) - norms
    found = common.useful_operations(config, [group], body)
    width = config.num_attention_heads * config.head_dim
    masked = 12 * config.num_hidden_layers * width * ids.shape[1] * (ids.shape[1] - 1) // 2
    assert counter.get_total_flops() == pytest.approx(found + masked, rel=0.01)


def test_ids_are_the_same_for_all_sides():
    """A workload is a function of its seed, with lengths in its bounds."""
    groups = common.WORKLOADS["tldr"].groups(3, 32_000)
    assert groups == common.WORKLOADS["tldr"].groups(3, 32_000)
    assert groups != common.WORKLOADS["tldr"].groups(3, 32_000, seed=1)
    assert all(350 <= len(g.prompt) <= 460 and all(30 <= len(r) <= 53 for r in g.responses) for g in groups)


@pytest.fixture
def small(monkeypatch):
    """Models and workloads of all names are small ones."""
    for benchmark in (throughput, overhead):
        monkeypatch.setattr(benchmark, "Job", small_job.SmallJob)
    monkeypatch.setattr(sides, "START", small_job.FORKED)
    monkeypatch.setitem(sides.MODELS, "small-32k", small_job.model)
    for name, workload in small_job.SHORT.items():
        monkeypatch.setitem(sides.WORKLOADS, name, workload)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident set is read from /proc")
@pytest.mark.slow
def test_throughput_writes_what_it_measures(tmp_path, small):
    """A row for the other side, two pairs a micro-batch on TRL's; gradients agree; the ratio lies within its spread."""
    path = tmp_path / "throughput.json"
    work = ["--models", "small-32k", "--workloads", "tldr,group8", "--rounds", "1", "--prompts", "2"]
    sides = ["--settings", "lean", "--against", "trl_best", "--trl-batch", "2"]
    throughput.main([*work, *sides, "--json", str(path)])
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert (row["workload"], row["setting"], row["against"], row["trl_batch"]) == ("tldr", "lean", "trl_best", 2)
    assert row.keys() >= ROW
    assert row["low"] <= row["time_ratio"] <= row["high"]
    assert 0 < row["max_gradient_error"] < 1e-4
    assert row["memory_ratio"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident set is read from /proc")
def test_throughput_takes_other_weights_and_larger_micro_batches(tmp_path, small):
    """In bfloat16 gradients of prompts that are shared and of separate rows agree to its rounding."""
    path = tmp_path / "throughput.json"
    work = ["--models", "small-32k", "--workloads", "group8", "--rounds", "1", "--prompts", "4", "--dtype", "bfloat16"]
    sides = ["--settings", "fast", "--token-budget", "1100", "--against", "separate_rows"]
    throughput.main([*work, *sides, "--json", str(path)])
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert (row["device"], row["dtype"], row["token_budget"]) == ("cpu", "bfloat16", 1100)
    assert (row["workload"], row["setting"], row["against"]) == ("group8", "fast", "separate_rows")
    assert 1e-4 < row["max_gradient_error"] < 0.05


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident set is read from /proc")
def test_a_machine_has_a_clock_a_memory_and_a_roof():
    """On a CPU: seconds of this process, memory of it, and the rate that the clock gives."""
    machine = common.Machine("cpu")
    before = machine.seconds()
    assert machine.roof() > 1e8
    assert machine.seconds() - before > 0
    now, peak = machine.memory()
    assert 10 < now <= peak
    assert "gpu" not in common.facts()


def test_the_clock_of_several_threads_is_on_the_wall(monkeypatch):
    """CPU seconds add up over threads, so that more of them would never be faster."""
    monkeypatch.setattr(common.time, "perf_counter", lambda: 7.0)
    monkeypatch.setattr(common.time, "process_time", lambda: 3.0)
    assert (common.Machine().seconds(), common.Machine().unit) == (3.0, "CPU s")
    assert (common.Machine(wall=True).seconds(), common.Machine(wall=True).unit) == (7.0, "s")


def test_the_clock_of_a_gpu_waits_for_it(monkeypatch):
    """Time is read on the wall when all is done; memory is what torch has allocated there, in MB."""
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("forgot"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3e6)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5e6)
    monkeypatch.setattr(common.time, "perf_counter", lambda: done.append("read") or 1.0)
    machine = common.Machine("cuda")
    assert machine.seconds() == 1.0
    machine.forget_peak()
    assert machine.memory() == (3, 5)
    assert done == ["waited", "read", "forgot"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident set is read from /proc")
def test_memory_writes_what_it_measures(tmp_path, capsys, monkeypatch):
    """A row for each side; what is computed again need not be kept."""
    monkeypatch.setitem(memory.PROMPTS, "small-32k", 4)
    path = tmp_path / "memory.json"
    chosen = ["ours, 512 tokens, full", "ours, 2048 tokens"]
    options = ["--models", "small-32k", "--workloads", "tldr", "--repeats", "1", "--sides", ";".join(chosen)]
    memory.main([*options, "--json", str(path)])
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [row["side"] for row in rows] == chosen
    assert rows[1]["growth_mb"] > 1.5 * rows[0]["growth_mb"]
    assert "growth" in capsys.readouterr().out


def test_a_side_that_dies_is_noticed(small):
    """The parent does not wait for ever, and invents no number."""
    side = sides.Side(sides.Job("ours", "no-such-model", "tldr", 1, 1, 512, "none"))
    with pytest.raises((EOFError, BrokenPipeError, ConnectionResetError)):
        side.step()
    side.stop()


def test_unknown_names_are_refused(capsys):
    """A typing error ends the command at once, with the names there are."""
    with pytest.raises(SystemExit):
        throughput.main(["--models", "gpt5"])
    assert "smollm2-135m, small-32k" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        throughput.main(["--device", "tpu"])


def test_cost_counts_tokens_and_measures(monkeypatch, tmp_path, capsys):
    """Tokens are those of the formula; the prediction lies below the ratio of tokens, as the head is never shared."""
    settings = {"dtype": torch.float32, "vocab_size": 1001, "max_position_embeddings": 128}
    monkeypatch.setattr(cost, "MODELS", {"tiny": lambda: build(**settings)})
    monkeypatch.setattr(cost, "SHAPES", {"short": (40, 10)})
    (row,) = cost.main(
        ["--models", "tiny", "--shapes", "short", "--responses", "4", "--json", str(tmp_path / "c.json")]
    )
    assert (row["tokens_shared"], row["tokens_separate"]) == (40 + 4 * 9, 4 * 49)
    assert 1 < row["predicted"] < row["token_ratio"]
    assert row["low"] <= row["measured"] <= row["high"]
    assert "196 → 76" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident set is read from /proc")
def test_overhead_is_a_share_of_the_step(monkeypatch, small):
    """Pairs and rounds both: something is spent outside forward, backward and generation, but not most of a step."""
    monkeypatch.setitem(overhead.PROMPTS, "small-32k", 2)
    rows = overhead.main(["--models", "small-32k", "--steps", "1"])
    assert [row["work"] for row in rows] == ["pairs", "rounds"]
    assert all(0 < row["outside_fraction"] < 1 for row in rows)
