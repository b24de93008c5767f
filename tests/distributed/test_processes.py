"""Several processes on a CPU: what they log, sample and learn is what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from distalign.engine import Group
from distalign.errors import InputError
from distalign.training.processes import Processes, refuse_several_processes
from distalign.training.prompts import Batch, PromptGroup

WORK = Path(__file__).parent / "work.py"
SIX = ("pmle", "pd", "rkl", "dpo", "rebel", "rlhf")
CELLS = [
    f"{method}/{wrapper}/{weights}" for wrapper in ("ddp", "fsdp") for method in SIX for weights in ("full", "lora")
]
# Other sources of pairs and estimators, whose work is dealt too.
OTHERS = [f"{method}/ddp/full" for method in ("pd-reference", "pd-data+policy", "rkl-split", "rkl-gae", "rkl-stale")]
THREE = [*(f"{method}/ddp/lora" for method in SIX), "rkl/fsdp/full", "rkl-stale/ddp/full"]


def work(folder: Path, processes: int, cells: list[str], **environment: str) -> int:
    """Run the cells in so many processes; the exit code."""
    folder.mkdir(exist_ok=True)
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *launch, str(WORK), str(folder), *cells]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=400)
    if done.returncode and not environment:
        raise AssertionError(done.stderr[-6000:])
    return done.returncode


def result(folder: Path, cell: str):
    """Weights, log lines and samples of a cell."""
    return torch.load(folder / f"{cell.replace('/', '-')}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of one, two and three processes."""
    folder = tmp_path_factory.mktemp("processes")
    work(folder / "1", 1, [*CELLS, *OTHERS])
    work(folder / "2", 2, [*CELLS, *OTHERS])
    if find_spec("deepspeed") is not None:
        zero = [f"{method}/zero2/{weights}" for method in SIX for weights in ("full", "lora")]
        work(folder / "1", 1, zero)
        work(folder / "2", 2, zero)
    work(folder / "3", 3, THREE)
    return folder


def check_equal(one, several, tolerance=1e-5):
    """Weights relative to the largest, each number of the log; samples to the letter."""
    assert one["samples"] == several["samples"]
    size = max(float(weight.abs().max()) for weight in one["weights"].values())
    for name, weight in one["weights"].items():
        assert float((weight - several["weights"][name]).abs().max()) <= tolerance * size, name
    for row, other in zip(one["logs"], several["logs"], strict=True):
        assert other == pytest.approx(row, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("cell", [*CELLS, *OTHERS])
def test_two_processes_do_what_one_does(runs, cell):
    """Three steps, the last with two prompts: log lines, samples, weights."""
    check_equal(result(runs / "1", cell), result(runs / "2", cell))


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install deepspeed")
@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("method", SIX)
def test_two_processes_of_deepspeed_do_what_one_does(runs, method, weights):
    """ZeRO-2."""
    cell = f"{method}/zero2/{weights}"
    check_equal(result(runs / "1", cell), result(runs / "2", cell), 1e-4)


@pytest.mark.parametrize("cell", THREE)
def test_a_process_without_a_prompt_waits_for_nobody(runs, cell):
    """The last step of three processes has two prompts."""
    check_equal(result(runs / "1", cell), result(runs / "3", cell))


def test_a_run_whose_process_was_killed_goes_on_to_the_same_end(tmp_path, runs):
    """kill -9 of one of two in the second step: torchrun ends the other; what comes of going on is equal to the bit."""
    cell = "rkl/ddp/lora"
    assert work(tmp_path, 2, [cell], KILL="1") != 0
    assert not (tmp_path / "rkl-ddp-lora.pt").exists()
    assert work(tmp_path, 2, [cell], RESUME="1") == 0
    undisturbed, resumed = result(runs / "2", cell), result(tmp_path, cell)
    assert resumed["samples"] == undisturbed["samples"]
    assert resumed["logs"] == undisturbed["logs"]
    assert all(torch.equal(weight, resumed["weights"][name]) for name, weight in undisturbed["weights"].items())


def test_a_run_goes_on_in_another_number_of_processes(tmp_path, runs):
    """Of two processes one was killed; one process goes on with the batch of both."""
    cell = "rkl/ddp/lora"
    assert work(tmp_path, 2, [cell], KILL="1") != 0
    work(tmp_path, 1, [cell], RESUME="1")
    check_equal(result(runs / "2", cell), result(tmp_path, cell))


@pytest.mark.parametrize("file", sorted(Path("examples/accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_the_configurations(file):
    """Each names its wrapper, and 8 processes."""
    config = load_config_from_file(str(file))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}
    assert (config.distributed_type, config.num_processes) == (kinds[file.stem], 8)


# How work is dealt ----------------------------------------------------------------------------------------------------


def test_work_is_dealt_by_its_size():
    """Every place once, each share in order, and no share more than the largest item above another."""
    sizes = [9, 1, 4, 4, 2, 7, 3, 3]
    shares = Processes(0, 3).deal(sizes)
    assert sorted(place for share in shares for place in share) == list(range(8))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(sizes[place] for place in share) for share in shares]
    assert max(loads) - min(loads) <= 2
    assert Processes(0, 3).deal([5]) == [[0], [], []]


@pytest.mark.parametrize("prompts", [1, 2, 5, 9])
def test_every_process_makes_as_many_passes(prompts):
    """Weights of all passes add up to 1, whatever the number of processes; who has less to do fills with weight 0."""
    groups = [Group([1] * (1 + place % 3), [[2] * (1 + place), [3]]) for place in range(prompts)]
    batch = Batch([PromptGroup(group) for group in groups], prompts)
    for count in (1, 2, 3):
        passes = [batch.micro_batches(8, Processes(rank, count)) for rank in range(count)]
        assert len(set(map(len, passes))) == 1
        assert sum(micro.weight for each in passes for micro in each) == pytest.approx(1)
        dealt = sorted(place for each in passes for micro in each if micro.weight for place in micro.indices)
        assert dealt == list(range(prompts))


def test_what_runs_in_one_process_says_so(monkeypatch):
    """Comparisons and evaluations in several would write over each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"2 processes were started.*a comparison runs in one"):
        refuse_several_processes("a comparison")
