"""What each of several processes does: three steps of a method; the first writes what came of them.

    torch.distributed.run --nproc_per_node 2 tests/distributed/work.py FOLDER CELL [CELL …]

A cell is METHOD/WRAPPER/WEIGHTS, as rkl/ddp/lora; FOLDER/CELL.pt holds the losses and the weights.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
from acting import METHODS, metrics, prompts, trainer

from distalign.methods import DPO
from distalign.models.policy import Lora
from distalign.training.sharding import gathered, shard

METHODS = {**METHODS, "dpo": DPO(1.0)}
# Of one step, in all processes together; the last step of an epoch of 14 has two.
STEP, ROWS, STEPS = 6, 14, 3


def run(folder: Path, cell: str, processes: int):
    """Train as the cell says; the trainer."""
    name, wrapper, weights, *_ = cell.split("/")
    method = METHODS[name]
    labelled = "labelled" in method.needs.pairs
    made = trainer(
        folder / cell,
        method,
        rows=tiny.encoded_pairs(ROWS) if labelled else prompts(ROWS),
        lora=Lora(r=4) if weights == "lora" else None,
        per_device_train_batch_size=STEP // processes,
        max_steps=STEPS,
        token_budget=64,
        learning_rate=0.1,
        optim="sgd",
        minibatches=1 if name != "rkl-gae" else 2,
        prepare=shard if wrapper == "fsdp" and processes > 1 else None,
    )
    if wrapper == "fsdp" and processes > 1:
        # accelerate shards on no CPU: what it would wrap is sharded already.
        made.accelerator.prepare_model = lambda model, **_: model
    made.train()
    return made


def main() -> None:
    """Every cell in turn, in processes that meet once."""
    folder, cells = Path(sys.argv[1]), sys.argv[2:]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for cell in cells:
        made = run(folder, cell, processes)
        with gathered(made.policy.model):
            named = made.policy.model.named_parameters()
            weights = {name: weight.detach().clone() for name, weight in named if weight.requires_grad}
        if made.processes.first:
            rows = [
                {k: v for k, v in row.items() if "time" not in k and "second" not in k}
                for row in metrics(folder / cell)
            ]
            torch.save({"weights": weights, "logs": rows}, folder / f"{cell.replace('/', '-')}.pt")


if __name__ == "__main__":
    main()
