"""Several processes on a CPU: what they log, sample and learn is what one process does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.commands.config.config_args import load_config_from_file
from filelock import FileLock
from vllm_server import Server

from distalign.engine import Group
from distalign.errors import InputError
from distalign.training.processes import Processes, refuse_several_processes
from distalign.training.prompts import Batch, PromptGroup

WORK = Path(__file__).parent / "work.py"
SIX = ("pmle", "pd", "rkl", "dpo", "rebel", "rlhf")
# `make test-all` trains every cell; `make test` every method by DDP, two by FSDP2, full or LoRA in turns.
EVERY = os.environ.get("EVERY_CELL") == "1"
TWO = {
    wrapper: [
        f"{method}/{wrapper}/{kind}"
        for number, method in enumerate(SIX)
        for place, kind in enumerate(("full", "lora"))
        if EVERY or (place == (number + (wrapper == "fsdp")) % 2 and (wrapper != "fsdp" or method in ("pmle", "rkl")))
    ]
    for wrapper in ("ddp", "fsdp", "zero2", "zero3")
}
# Other sources of pairs and estimators, whose work is dealt too.
OTHERS = [f"{method}/ddp/full" for method in ("pd-data+policy", "rkl-gae", "rkl-stale", "pd-reference", "rkl-split")]
OTHERS = OTHERS if EVERY else OTHERS[:3]
THREE = [*(TWO["ddp"] + TWO["fsdp"] if EVERY else ["pd/ddp/lora"]), "rkl-stale/ddp/full"]
# Adapters first: a server that has had whole weights of a run takes no other run's adapters.
SERVED = ["pd/ddp/lora", "pd/fsdp/lora", "rkl/ddp/full", "rkl/fsdp/full"][:: 1 if EVERY else 3]


def work(folder: Path, processes: int, cells: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the cells in so many processes, as users start them."""
    folder.mkdir(exist_ok=True)
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    return ended([*launch, str(WORK), str(folder), *cells], **environment)


def forked(*runs: tuple[Path, int, list[str], dict[str, str]], **environment: str) -> subprocess.CompletedProcess[str]:
    """The same run after run, by processes that one forks: what all import is imported once."""
    told = [(processes, [str(folder), *cells], own) for folder, processes, cells, own in runs]
    for folder, *_ in runs:
        folder.mkdir(exist_ok=True)
    return ended([str(WORK)], FORK=json.dumps(told), **environment)


def ended(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """What came of it: only where something is done to it may it fail."""
    command = [sys.executable, *command]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=400)
    if done.returncode and not {"KILL", "NAN"} & environment.keys():
        raise AssertionError(done.stderr[-6000:])
    return done


def result(folder: Path, cell: str):
    """Weights, log lines and samples of a cell."""
    return torch.load(folder / f"{cell.replace('/', '-')}.pt")


def check_equal(one, several, tolerance=1e-5):
    """Weights relative to the largest, each number of the log; samples to the letter."""
    assert one["samples"] == several["samples"]
    size = max(float(weight.abs().max()) for weight in one["weights"].values())
    for kind in ("weights", "saved"):
        assert one[kind].keys() == several[kind].keys()
        for name, weight in one[kind].items():
            assert float((weight - several[kind][name]).abs().max()) <= tolerance * size, name
    for row, other in zip(one["logs"], several["logs"], strict=True):
        assert other == pytest.approx(row, rel=tolerance, abs=tolerance)


def single(cell: str) -> str:
    """The same cell without a wrapper: what one process trains."""
    method, _, weights = cell.split("/")
    return f"{method}/none/{weights}"


@pytest.fixture(scope="session")
def made(tmp_path_factory, worker_id) -> dict[int, Path]:
    """The folders of what one, two and three processes make of their cells, made once for all workers of a test run."""
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent
    two = [*TWO["ddp"], *OTHERS, *TWO["fsdp"]]
    cells = {1: sorted({single(cell) for cell in (*two, *THREE)}), 2: two, 3: THREE}
    folders = {processes: base / f"processes-{processes}" for processes in cells}
    with FileLock(base / "processes.lock"):
        if not (base / "processes.done").exists():
            forked(*((folders[processes], processes, cells[processes], {}) for processes in cells))
            (base / "processes.done").touch()
    return folders


def check_cells(one: Path, several: Path, cells: list[str], tolerance=1e-5):
    """Each cell of several processes beside that of one; the message names the cell that differs."""
    for cell in cells:
        try:
            check_equal(result(one, single(cell)), result(several, cell), tolerance)
        except AssertionError as error:
            raise AssertionError(f"{cell} in {several}: {error}") from None


def test_two_processes_do_what_one_does(made):
    """By DDP and FSDP2, three steps, the last with two prompts: log lines, samples, weights."""
    check_cells(made[1], made[2], [*TWO["ddp"], *OTHERS, *TWO["fsdp"]])


def test_a_process_without_a_prompt_waits_for_nobody(made):
    """The last step of three processes has two prompts."""
    check_cells(made[1], made[3], THREE)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install deepspeed")
@pytest.mark.parametrize(
    ("wrapper", "processes"),
    [("zero2", 2), ("zero3", 2), *([("zero2", 3), ("zero3", 3)] if EVERY else [])],
)
def test_processes_of_deepspeed_do_what_one_does(made, tmp_path, wrapper, processes):
    """Six methods."""
    work(tmp_path / "several", processes, TWO[wrapper])
    check_cells(made[1], tmp_path / "several", TWO[wrapper], 1e-4)


@pytest.mark.slow
def test_a_server_draws_for_all_processes(tmp_path):
    """The first asks it, with the weights of all: what is drawn and learned is what one process has."""
    model = tiny.save(tmp_path / "model")
    with Server(model) as first, Server(model) as second:
        servers = {1: first, 2: second}
        forked(
            *((tmp_path / str(n), n, SERVED, {"SERVER": server.url}) for n, server in servers.items()), MODEL=str(model)
        )
        for server in servers.values():
            assert server.asked["/collective_rpc"] == 3 * sum("full" in cell for cell in SERVED)
    for cell in SERVED:
        check_equal(result(tmp_path / "1", cell), result(tmp_path / "2", cell))


@pytest.mark.slow
def test_a_run_whose_process_was_killed_goes_on_to_the_same_end(made, tmp_path):
    """kill -9 of one of two in the second step: torchrun ends the other; two processes end equal to the bit."""
    cell, killed, alone = "rkl/ddp/full", tmp_path / "killed", tmp_path / "alone"
    assert work(killed, 2, [cell], KILL="1").returncode != 0
    assert not (killed / "rkl-ddp-full.pt").exists()
    shutil.copytree(killed, alone)
    work(killed, 2, [cell], RESUME="1")
    undisturbed, resumed = result(made[2], cell), result(killed, cell)
    assert resumed["samples"] == undisturbed["samples"]
    assert resumed["logs"] == undisturbed["logs"]
    assert all(torch.equal(weight, resumed["weights"][name]) for name, weight in undisturbed["weights"].items())
    # One process goes on with the batch of both.
    work(alone, 1, [cell], RESUME="1")
    check_equal(undisturbed, result(alone, cell))


def test_what_one_process_finds_ends_all_with_its_message(tmp_path):
    """A loss that is no number in one of two; none is left to say that its peer has gone."""
    done = forked((tmp_path, 2, ["rkl/ddp/lora"], {}), NAN="1")
    assert done.returncode != 0
    assert done.stderr.count("the loss is nan at step 1") >= 2
    assert "closed by peer" not in done.stderr


@pytest.mark.parametrize("file", sorted(Path("examples/accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_the_configurations(file):
    """Each names its wrapper, and 8 processes."""
    config = load_config_from_file(str(file))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
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
