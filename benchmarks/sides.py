"""The two sides of a comparison, each a real training run in a process of its own that takes one step when told.

`start(job)` gives a `Side`; `Side.step()` lets it take one optimizer step and returns what it measured of it. All sides
of a comparison see the same token ids, the same reference log-probabilities and the same weights.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, MODELS, WORKLOADS, Machine, Workload, body_size, useful_operations
from safetensors.torch import save_file
from transformers import TrainerCallback

from distalign.data import EncodedPair, EncodedPrompt
from distalign.engine import Group, check, micro_batches, score, score_in_batches
from distalign.engine.forward import encode
from distalign.engine.lm_head import score_rows
from distalign.engine.memory import set_recompute
from distalign.engine.packing import frame
from distalign.methods import DPO, PD, RKL, RLHF, Method
from distalign.models.load import Source
from distalign.models.policy import Policy
from distalign.rewards import Request, Reward
from distalign.training.config import AlignmentConfig
from distalign.training.trainer import AlignmentTrainer

GAMMA = 0.1

# A process that has no other's memory.
START: BaseContext = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Job:
    """One side: which code trains which model on what, for how many steps."""

    side: str
    model: str
    workload: str
    prompts: int
    steps: int
    token_budget: int
    recompute: str
    reference: tuple[tuple[float, ...], ...] = ()
    threads: int = 1
    gradients: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    trl_batch: int = 1
    wall: bool = False
    processes: int = 1

    def load(self) -> Any:
        """The model, where it is trained."""
        return MODELS[self.model]().to(self.device, DTYPES[self.dtype])

    @property
    def shape(self) -> Workload:
        """Lengths of the prompts and responses; rounds have those of group8."""
        return WORKLOADS["group8" if self.workload == "rounds" else self.workload]

    def groups(self, model: Any) -> list[Group]:
        """The token ids that all sides train on."""
        return self.shape.groups(self.prompts, model.config.vocab_size)


class Turns(TrainerCallback):
    """Takes each optimizer step only when told to, and reports its seconds and its memory."""

    def __init__(self, pipe: Connection, job: Job, model: Any, facts: dict[str, float]) -> None:
        self.pipe, self.job, self.model, self.facts = pipe, job, model, facts
        self.machine, self.inside = Machine(job.device, wall=job.wall), 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the word; then the step begins."""
        self.pipe.recv()
        self.inside = 0.0
        self.machine.forget_peak()
        self.before, _ = self.machine.memory()
        self.started = self.machine.seconds()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Forward and backward are through."""
        self.backward = self.machine.seconds() - self.started
        _, self.peak = self.machine.memory()
        if self.job.gradients is not None:
            gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
            save_file({name: grad.contiguous() for name, grad in gradients.items()}, self.job.gradients)
            self.job = replace(self.job, gradients=None)
        self.stepping = self.machine.seconds()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer has stepped: report."""
        whole = self.backward + self.machine.seconds() - self.stepping
        report = {"seconds": self.backward, "step": whole, "growth": self.peak - self.before, "peak": self.peak}
        if self.inside:
            report["outside"] = 1 - self.inside / whole
        self.pipe.send(report | self.facts)


def reference_logps(
    model: str, workload: str, prompts: int, device: str = "cpu", dtype: str = "float32"
) -> tuple[tuple[float, ...], ...]:
    """Log-probabilities of every pair under the start of all sides, which is their reference: computed once, before."""
    start = MODELS[model]().to(device, DTYPES[dtype])
    groups = WORKLOADS[workload].groups(prompts, start.config.vocab_size)
    logps = score_in_batches(start, groups, token_budget=2048).logps
    return tuple(tuple(pair) for pair in logps.view(len(groups), -1).tolist())


def _arguments(job: Job, folder: str, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": job.device == "cpu",
        "bf16": False,
        "max_steps": job.steps,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }


def train_ours(pipe: Connection, job: Job, folder: str) -> None:
    """Our trainer with DPO, whose γ is TRL's beta."""
    model = job.load()
    groups = job.groups(model)
    rows = [EncodedPair(g.prompt, *g.responses, None, f"row {i}") for i, g in enumerate(groups)]
    reference = {
        row.key: torch.tensor(logps, device=job.device) for row, logps in zip(rows, job.reference, strict=True)
    }
    set_recompute(model, job.recompute)
    policy = Policy(model, None, Source(job.model, "", ""), reference=lambda: nullcontext(model))
    arguments = _arguments(job, folder, per_device_train_batch_size=job.prompts // job.processes)
    trainer = AlignmentTrainer(
        policy,
        DPO(gamma=GAMMA),
        AlignmentConfig(**arguments, token_budget=job.token_budget, end_token_id=0, health=None),
        rows,
        reference_cache=reference,
    )
    turns = Turns(pipe, job, model, {"operations": useful_operations(model.config, groups, body_size(model))})
    trainer.add_callback(turns)
    for owner, name in ((trainer, "score"), (trainer.accelerator, "backward")):
        setattr(owner, name, _timed(getattr(owner, name), turns))
    trainer.train()


class _Lengths(Reward):
    """A reward that costs nothing: how many different tokens a response has."""

    def __call__(self, requests: Sequence[Request]) -> torch.Tensor:
        return torch.tensor([float(len(set(own))) for request in requests for own in request.responses])


ROUNDS: dict[str, Method] = {"rkl": RKL(gamma=GAMMA, beta=0.0), "rlhf": RLHF(beta=0.0), "pd": PD(gamma=GAMMA, beta=0.0)}


def train_rounds(pipe: Connection, job: Job, folder: str) -> None:
    """Our trainer with RKL or what the side names: 8 responses to each TL;DR-like prompt in every step."""
    model = job.load()
    workload = job.shape
    rows = [EncodedPrompt(group.prompt) for group in job.groups(model)]
    tokens = workload.response[1]
    settings = {
        "num_generations": workload.responses,
        "max_completion_length": tokens,
        "min_new_tokens": tokens,
        "num_completions_to_print": 0,
        "end_token_id": 1,
        "token_budget": job.token_budget,
        "health": None,
    }
    policy = Policy(model, _tokenizer(model), Source(job.model, "", ""), reference=lambda: nullcontext(model))
    trainer = AlignmentTrainer(
        policy,
        ROUNDS.get(job.side, ROUNDS["rkl"]),
        AlignmentConfig(
            **_arguments(job, folder, per_device_train_batch_size=job.prompts // job.processes), **settings
        ),
        rows,
        reward_funcs=_Lengths(),
    )
    turns = Turns(pipe, job, model, {})
    trainer.add_callback(turns)
    timed = ((trainer.rollout, "sample"), (trainer.rollout, "scores"), (trainer, "score"))
    for owner, name in (*timed, (trainer.accelerator, "backward")):
        setattr(owner, name, _timed(getattr(owner, name), turns))
    trainer.train()


def _tune_head(job: Job) -> None:
    """Let TRL's head see response positions only, as it does by itself where Triton is."""
    import trl.trainer.utils

    if job.device == "cpu":
        if not hasattr(trl.trainer.utils, "_use_triton"):
            raise RuntimeError("this TRL has no trl.trainer.utils._use_triton: its head cannot be tuned; take TRL 1.16")
        trl.trainer.utils._use_triton = lambda device: True  # pyright: ignore


def train_rloo(pipe: Connection, job: Job, folder: str) -> None:
    """TRL's RLOOTrainer on the same rounds, without a KL term: as RLHF at β = 0.

    "rloo": `trl_batch` responses a micro-batch, no activation checkpointing, the responses of a step drawn at once.
    """
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    _tune_head(job)
    model = job.load()
    workload = job.shape
    prompts = [group.prompt for group in job.groups(model)]
    tokens, responses = workload.response[1], job.prompts * workload.responses
    batches, left = divmod(responses, job.trl_batch)
    if left:
        raise ValueError(f"{responses} responses a step are not a multiple of {job.trl_batch} a micro-batch")
    config = RLOOConfig(
        **_arguments(job, folder, per_device_train_batch_size=job.trl_batch, gradient_accumulation_steps=batches),
        num_generations=workload.responses,
        max_completion_length=tokens,
        generation_kwargs={"min_new_tokens": tokens, "eos_token_id": 1},
        gradient_checkpointing=False,
        beta=0.0,
        shuffle_dataset=False,
    )

    def lengths(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(len(set(own))) for own in completion_ids]

    # One word for each token: a prompt's text stands for its ids.
    rows = Dataset.from_list([{"prompt": " ".join(f"t{token}" for token in prompt)} for prompt in prompts])
    words = _tokenizer(model, words=model.config.vocab_size)
    trainer = RLOOTrainer(model, lengths, args=config, train_dataset=rows, processing_class=words)
    trainer.add_callback(Turns(pipe, job, model, {}))
    trainer.train()


def _timed(function: Any, turns: Turns) -> Any:
    if turns.job.device != "cpu":
        # To wait for the GPU before and after every call would slow down what is measured.
        return function

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = turns.machine.seconds()
        result = function(*args, **kwargs)
        turns.inside += turns.machine.seconds() - start
        return result

    return timed


def train_trl(pipe: Connection, job: Job, folder: str) -> None:
    """TRL's DPOTrainer as shipped ("trl_defaults"), or as a GPU user would set it ("trl_best").

    trl_best: `trl_batch` pairs a micro-batch, no activation checkpointing, and the head on response positions only,
    which TRL does by itself where Triton is.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Prepared(DPOTrainer):
        """Takes ids and reference log-probabilities as they are."""

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
            return dataset

    model = job.load()
    groups = job.groups(model)
    rows = [
        {
            "prompt_ids": g.prompt,
            "chosen_ids": g.responses[0],
            "rejected_ids": g.responses[1],
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }
        for g, (chosen, rejected) in zip(groups, job.reference, strict=True)
    ]
    settings: dict[str, Any] = {"per_device_train_batch_size": job.prompts}
    if job.side == "trl_best":
        batches, left = divmod(job.prompts, job.trl_batch)
        if left:
            raise ValueError(f"{job.prompts} pairs a step are not a multiple of {job.trl_batch} a micro-batch")
        settings = {"per_device_train_batch_size": job.trl_batch, "gradient_accumulation_steps": batches}
        settings["gradient_checkpointing"] = False
    if job.side == "trl_best":
        _tune_head(job)
    arguments = DPOConfig(beta=GAMMA, precompute_ref_log_probs=True, **_arguments(job, folder, **settings))
    trainer = Prepared(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer(model))
    trainer.add_callback(Turns(pipe, job, model, {}))
    trainer.train()


def _tokenizer(model: Any, words: int = 0) -> Any:
    """A tokenizer with special tokens, all that is asked of it where everything is ids already, and so many words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    known = {"<pad>": 0, "<eos>": 1, **{f"t{token}": token for token in range(2, words)}}
    core = Tokenizer(WordLevel(known, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def train_groups(pipe: Connection, job: Job, folder: str) -> None:
    """Forward and backward over groups of responses: prompts shared ("ours"), or every response on its own, unpadded.

    The loss weights the log-probabilities by fixed numbers, as a policy gradient does.
    """
    model = job.load().train()
    groups = job.groups(model)
    check(model)
    if job.side == "ours":
        set_recompute(model, job.recompute)
    turns = Turns(pipe, job, model, {"operations": useful_operations(model.config, groups, body_size(model))})
    weights = [torch.linspace(-1, 1, len(g.responses), dtype=torch.float64, device=job.device) for g in groups]
    for _ in range(job.steps):
        model.zero_grad()
        turns.on_step_begin()
        if job.side == "ours":
            for batch in micro_batches(groups, job.token_budget):
                logps = score(model, [groups[i] for i in batch]).logps
                (logps.double() * torch.cat([weights[i] for i in batch])).sum().backward()
        else:
            for group, own in zip(groups, weights, strict=True):
                for response, weight in zip(group.responses, own, strict=True):
                    alone = [Group(group.prompt, [response])]
                    rows = encode(model, alone, "padded", 1.0)
                    logps = score_rows(rows, frame(alone, torch.device(job.device)).targets).logps
                    (logps.double().sum() * weight).backward()
        turns.on_pre_optimizer_step()
        turns.on_step_end()


def _work(pipe: Connection, job: Job) -> None:
    torch.set_num_threads(job.threads)
    own = {"group8": train_groups, "rounds": train_rloo if job.side == "rloo" else train_rounds}
    train = own.get(job.workload, train_ours if job.side == "ours" else train_trl)
    with tempfile.TemporaryDirectory() as folder:
        train(pipe, job, folder)


class Side:
    """A process that trains, one step at a time."""

    def __init__(self, job: Job) -> None:
        self.pipe, theirs = START.Pipe()
        self.process = START.Process(target=_work, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()

    def step(self) -> dict[str, float]:
        """Let it take one step. Raises EOFError if the process has died: its traceback is on the terminal."""
        self.pipe.send("go")
        return self.pipe.recv()

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.process.terminate()
        self.process.join()


def gradient_error(first: Path, second: Path) -> float:
    """Largest ‖difference‖ / ‖gradient‖ over the parameter tensors of two gradient files."""
    from safetensors.torch import load_file

    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).norm() / b[name].double().norm()) for name in b)
