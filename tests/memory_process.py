"""A process of its own that trains a model of 20 million parameters and tells what it took: `FIT LIMIT FOLDER`.

With micro-batches of FIT tokens: bytes that the resident set grew by at its peak, and what was estimated. Then with
micro-batches of LIMIT, which need more address space than there is: the error.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from pathlib import Path

import tiny
import torch

from distalign.data import EncodedPair
from distalign.engine import check
from distalign.methods import PMLE
from distalign.models.load import Source
from distalign.models.policy import make_policy
from distalign.training.config import AlignmentConfig
from distalign.training.rollout_settings import TrainingError
from distalign.training.trainer import AlignmentTrainer

SIZES = {"vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}


def status(name: str) -> int:
    """A number of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def prepared(budget: int, folder: str) -> AlignmentTrainer:
    """Two steps of two micro-batches: in the last, gradients and the optimizer's state are there."""
    torch.set_num_threads(1)
    base = tiny.model(**SIZES, max_position_embeddings=512)
    policy = make_policy(base, tiny.tokenizer(), Source("run", "run", "made here"), lora=None, reference=False)
    del base
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        return torch.randint(5, 32_000, (n,), generator=generator).tolist()

    batch = 2 * budget // 128
    pairs = [EncodedPair(draw(64), draw(32), draw(32), None, "pair") for _ in range(2 * batch)]
    settings = {"per_device_train_batch_size": batch, "max_steps": 2, "save_strategy": "no", "report_to": "none"}
    args = AlignmentConfig(output_dir=folder, use_cpu=True, token_budget=budget, **settings)
    trainer = AlignmentTrainer(policy, PMLE(0.5, 0.0), args, pairs)
    check(policy.model)
    gc.collect()
    return trainer


def fit(trainer: AlignmentTrainer) -> dict:
    """What it takes where there is enough."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    trainer.train()
    memory = trainer.memory
    assert memory is not None
    return {"grown": status("VmHWM") - before, "needed": memory.needed(memory.tokens), "tokens": memory.tokens}


def limit(trainer: AlignmentTrainer) -> dict:
    """What it says where there is not."""
    most = status("VmSize") + 400_000_000
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        trainer.train()
    except TrainingError as error:
        return {"error": str(error)}
    return {"error": None}


if __name__ == "__main__":
    told = fit(prepared(int(sys.argv[1]), sys.argv[3]))
    print(json.dumps(told | limit(prepared(int(sys.argv[2]), sys.argv[3]))))
