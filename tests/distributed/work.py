"""What each of several processes does: three steps of a method; the first writes what came of them.

    torch.distributed.run --nproc_per_node 2 tests/distributed/work.py FOLDER CELL [CELL …]
    FORK='[[2, [FOLDER, CELL, …], {}], …]' tests/distributed/work.py

A cell is METHOD/WRAPPER/WEIGHTS, as rkl/ddp/lora or, in one process, rkl/none/lora; FOLDER/METHOD-WRAPPER-WEIGHTS.pt
holds its log lines and weights.
With KILL=1 the last process is killed in its second step, with NAN=1 it finds a loss that is no number; with RESUME=1 a
run goes on. With SERVER=URL a vLLM server of the model in the folder MODEL draws.

Most of a short run is imports: with FORK they are made once, and then so many processes forked, run after run, each
with its environment, and told who they are as torch.distributed.run tells it.
"""

from __future__ import annotations

import faulthandler
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import acting
import tiny
import torch
from acting import METHODS, logs, prompts, trainer
from safetensors.torch import load_file
from transformers import TrainerCallback

from distalign.methods import DPO, RKL
from distalign.models.load import Source
from distalign.models.policy import Lora
from distalign.training.guard import Guard
from distalign.training.passes import shard

METHODS = {**METHODS, "dpo": DPO(1.0), "rkl-stale": RKL(0.5, 0.3)}
# Prompts of one step, in all processes together; the last step of an epoch of 14 has two, so that a third has none.
STEP, ROWS, STEPS = 6, 14, 3


# As trainer() above: no clipping, an optimizer that is not DeepSpeed's.
ZERO = {
    f"zero{stage}": {
        # So small a model would be kept whole otherwise.
        "zero_optimization": {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
    }
    for stage in (2, 3)
}


class Kill(TrainerCallback):
    """Ends a process as the system does that has no memory left."""

    def on_step_begin(self, args, state, control, **_):
        """In the second step."""
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, cell: str, processes: int):
    """Train as the cell says; the trainer."""
    name, wrapper, weights = cell.split("/")
    method, sharded = METHODS[name], wrapper == "fsdp" and processes > 1
    made = trainer(
        folder / cell,
        method,
        rows=tiny.encoded_pairs(ROWS) if "labelled" in method.needs.pairs else prompts(ROWS),
        lora=Lora(r=4) if weights == "lora" else None,
        prepare=shard if sharded else None,
        per_device_train_batch_size=STEP // processes,
        max_steps=2 * STEPS if name == "rkl-stale" else STEPS,
        num_iterations=2 if name == "rkl-stale" else 1,
        token_budget=64,
        learning_rate=1e-3 if name == "rkl-stale" else 0.1,
        optim="sgd",
        minibatches=2 if name == "rkl-gae" else 1,
        deepspeed=ZERO.get(wrapper) if processes > 1 else None,
        **({"save_strategy": "steps", "save_steps": 1} if {"KILL", "RESUME"} & set(os.environ) else {}),
        **({"use_vllm": True, "vllm_server_base_url": os.environ["SERVER"]} if "SERVER" in os.environ else {}),
    )
    if sharded:
        # accelerate shards on no CPU: what it would wrap is sharded already.
        made.accelerator.prepare_model = lambda model, **_: model
    if "KILL" in os.environ and made.processes.rank == processes - 1:
        made.add_callback(Kill())
    if "NAN" in os.environ and made.processes.rank == processes - 1:
        made.guard.check_loss = lambda *_: Guard("rkl").check_loss(torch.tensor(math.nan), *_[1:])
    made.train(resume_from_checkpoint="RESUME" in os.environ)
    return made


def main(folder: Path, *cells: str) -> None:
    """Every cell in turn, in processes that meet once."""
    if "MODEL" in os.environ:
        acting.SOURCE = Source("tiny", os.environ["MODEL"], "a folder")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for cell in cells:
        made = run(folder, cell, processes)
        made.save_policy(folder / cell / "model")
        with made.whole_weights():
            named = made.policy.model.named_parameters()
            weights = {name: weight.detach().clone() for name, weight in named if weight.requires_grad}
        if made.processes.first:
            rows, samples = logs(folder / cell)
            saved = load_file(next((folder / cell / "model").glob("*.safetensors")))
            content = {"weights": weights, "saved": saved, "logs": rows, "samples": samples}
            torch.save(content, folder / f"{cell.replace('/', '-')}.pt")


def member(environment: dict[str, str], arguments: list[str]) -> None:
    """One of several forked processes; if it waits for ever, it says where and ends."""
    faulthandler.dump_traceback_later(350, exit=True)
    os.environ |= environment
    main(Path(arguments[0]), *arguments[1:])


def fork(count: int, arguments: list[str], environment: dict[str, str]) -> bool:
    """Run `main` in so many processes; whether all ended well."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with socket.socket() as held:
        # While it is held no other program is given the port; the first process may listen on it all the same.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
        members = []
        for rank in map(str, range(count)):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            told = {**environment, **(meet | place if count > 1 else {})}
            members.append(context.Process(target=member, args=(told, arguments)))
            members[-1].start()
        for one in members:
            one.join()
    return not any(one.exitcode for one in members)


if __name__ == "__main__":
    if "FORK" in os.environ:
        sys.exit(not all(fork(*each) for each in json.loads(os.environ["FORK"])))
    main(Path(sys.argv[1]), *sys.argv[2:])
