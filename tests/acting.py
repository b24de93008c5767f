"""A trainer of methods that draw their own responses, on the tiny model."""

from __future__ import annotations

import json
import os

import tiny
import torch

from distalign.data import EncodedPrompt, Prompt
from distalign.errors import InputError
from distalign.methods import PD, PMLE, REBEL, RKL, RLHF
from distalign.models.load import Source
from distalign.models.policy import make_policy
from distalign.rewards import Reward
from distalign.training.config import AlignmentConfig
from distalign.training.trainer import AlignmentTrainer

METHODS = {
    "pmle": PMLE(0.5, 0.3),
    "pd": PD(0.5, 0.3),
    "pd-reference": PD(0.5, 0.3, pairs="reference"),
    "pd-data+reference": PD(0.5, 0.0, pairs="data+reference"),
    "pd-data+policy": PD(0.5, 0.3, pairs="data+policy"),
    "pd-reward": PD(0.5, 0.3, kl_in="reward"),
    "rkl": RKL(0.5, 0.3),
    "rkl-split": RKL(0.5, 0.3, estimator="split"),
    "rkl-gae": RKL(0.5, 0.3, estimator="ppo"),
    "rebel": REBEL(1.0, 0.3),
    "rlhf": RLHF(0.3),
}
SOURCE = Source("tiny", "tiny", "made here")


class Warmth(Reward):
    """Rewards warm words: a nat for each id from 7 to 9, and half a one for an end."""

    def __call__(self, requests):
        """A reward a response."""
        texts = [own for request in requests for own in request.responses]
        return torch.tensor([sum(7 <= t <= 9 for t in own) + 0.5 * (own[-1] == tiny.END) for own in texts])


def prompts(n=8):
    """Prompts of unequal length."""
    return [EncodedPrompt(pair.prompt, row=Prompt(f"tell me {i}")) for i, pair in enumerate(tiny.encoded_pairs(n))]


def trainer(
    folder,
    method,
    *,
    reward=None,
    rows=None,
    lora=None,
    health=None,
    callbacks=None,
    kind="llama",
    prepare=None,
    reference_cache=None,
    **settings,
):
    """A trainer on the tiny model. `settings` are AlignmentConfig's; `prepare` may do something to the model."""
    arguments = {
        "token_budget": 4096,
        "num_generations": 4,
        "max_completion_length": 5,
        "num_completions_to_print": 1,
        "health": None if health is None else health.model_dump(),
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "save_total_limit": None,
        "report_to": "none",
        "use_cpu": True,
        "max_grad_norm": 0.0,
        **settings,
    }
    labelled = "labelled" in method.needs.pairs
    args = AlignmentConfig(output_dir=str(folder), **arguments)
    torch.manual_seed(0)
    policy = make_policy(tiny.model(kind), tiny.tokenizer(), SOURCE, lora=lora, reference=True)
    if prepare is not None:
        prepare(policy.model)
    return AlignmentTrainer(
        policy,
        method,
        args,
        (tiny.encoded_pairs(8) if labelled else prompts()) if rows is None else rows,
        reward_funcs=(reward or Warmth()) if method.needs.reward else None,
        callbacks=callbacks,
        reference_cache=reference_cache,
    )


def parameters(made):
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


def metrics(folder):
    """Lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logs(folder):
    """Lines of metrics.jsonl without what was measured with a clock, and samples.jsonl."""
    clock = ("time", "per_second", "runtime")
    rows = [{key: value for key, value in row.items() if not key.endswith(clock)} for row in metrics(folder)]
    samples = folder / "samples.jsonl"
    return rows, samples.read_text() if samples.is_file() else ""


def exit_code_elsewhere(work):
    """The exit code of another process that works, and ends with 2 after an InputError as the command line does."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except InputError:
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
