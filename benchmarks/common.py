"""What the benchmarks share: the models, the token ids of each workload, the machine, and what a pass must cost."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distalign.engine import Group
from distalign.models.load import find_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _llama(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> Any:
    """A Llama with random weights, its embeddings also its head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=True,
        **more,
    )
    return LlamaForCausalLM(config)


def small_model() -> Any:
    """11 million parameters, 72 % of them its vocabulary's."""
    return _llama(32_000, 256, 688, 4, 4, max_position_embeddings=1024)


def llama_1b() -> Any:
    """The shape of Llama-3.2-1B: for a GPU."""
    return _llama(128_256, 2048, 8192, 16, 32, num_key_value_heads=8, max_position_embeddings=8192)


MODELS: dict[str, Callable[[], Any]] = {
    "smollm2-135m": lambda: find_model("smollm2-135m-instruct").model(),
    "small-32k": small_model,
    "llama-1b": llama_1b,
}

# What a CPU measures, if nothing else is named.
ON_CPU = ["smollm2-135m", "small-32k"]

# Prompts of one step: what a few minutes on one core allow, or on a GPU.
PROMPTS = {"smollm2-135m": 4, "small-32k": 8, "llama-1b": 16}


@dataclass(frozen=True)
class Workload:
    """Prompts with responses of random ids; lengths in tokens are drawn uniformly between the two bounds."""

    prompt: tuple[int, int]
    response: tuple[int, int]
    responses: int = 2

    def groups(self, count: int, vocabulary: int, seed: int = 0) -> list[Group]:
        """`count` prompts with their responses. The ids above 100 hold no special tokens in either model."""
        source = random.Random(seed)

        def ids(bounds: tuple[int, int]) -> list[int]:
            return [source.randrange(100, vocabulary) for _ in range(source.randint(*bounds))]

        return [Group(ids(self.prompt), [ids(self.response) for _ in range(self.responses)]) for _ in range(count)]


WORKLOADS = {
    "tldr": Workload((350, 460), (30, 53)),
    "chat": Workload((50, 300), (100, 400)),
    "group8": Workload((350, 460), (30, 53), responses=8),
}


def useful_operations(config: Any, groups: Sequence[Group], body: int) -> float:
    """Floating-point operations of one forward and backward pass with each prompt once; nothing recomputed.

    6 a parameter of the body and token, 6 a weight of the head and response token, 12 a pair of attending tokens and
    attention channel. `body` is the number of parameters in the layers.
    """
    attention_width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    tokens = attending = responses = 0
    for group in groups:
        prompt, inputs = len(group.prompt), [len(response) - 1 for response in group.responses]
        tokens += prompt + sum(inputs)
        attending += prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in inputs)
        responses += sum(n + 1 for n in inputs)
    head = config.vocab_size * config.hidden_size
    return 6 * body * tokens + 6 * head * responses + 12 * config.num_hidden_layers * attention_width * attending


def body_size(model: Any) -> int:
    """Parameters of the decoder layers: all but the embeddings and the head."""
    vocabulary = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return sum(p.numel() for p in model.parameters() if id(p) not in vocabulary)


@dataclass(frozen=True)
class Machine:
    """Where a side computes, "cpu" or "cuda", and what it is measured by there.

    On a CPU: CPU seconds of this process, which other programs hardly lengthen, or with `wall` seconds on the wall,
    which several threads shorten; and its resident memory (Linux). On a GPU: seconds on the wall, read when the GPU has
    done all that it was given, and what torch has allocated there.
    """

    device: str = "cpu"
    wall: bool = False

    @property
    def unit(self) -> str:
        """What `seconds` counts."""
        return "CPU s" if self.device == "cpu" and not self.wall else "s"

    def seconds(self) -> float:
        """The clock."""
        if self.device == "cpu":
            return time.perf_counter() if self.wall else time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def memory(self) -> tuple[float, float]:
        """Memory in MB: now, and the peak since it was last forgotten."""
        if self.device != "cpu":
            return torch.cuda.memory_allocated() / 1e6, torch.cuda.max_memory_allocated() / 1e6
        found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        now, peak = (int(found[name].split()[0]) / 1000 for name in ("VmRSS", "VmHWM"))
        return now, peak

    def forget_peak(self) -> None:
        """Let the peak of `memory` start anew from what is there now."""
        if self.device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.cuda.reset_peak_memory_stats()

    def roof(self, dtype: str = "float32") -> float:
        """Floating-point operations a second of a large matrix product in this process, now.

        On a CPU the product is as large as takes it a tenth of a second: without kernels for a type, much smaller.
        """
        size, largest, repeats = (256, 2048, 3) if self.device == "cpu" else (8192, 8192, 20)
        while True:
            a, b = (torch.randn(size, size, device=self.device, dtype=DTYPES[dtype]) for _ in range(2))
            start = self.seconds()
            torch.mm(a, b)
            if size == largest or self.seconds() - start > 0.1:
                break
            size *= 2
        start = self.seconds()
        for _ in range(repeats):
            torch.mm(a, b)
        return repeats * 2 * size**3 / (self.seconds() - start)


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of theirs / ours over the rounds."""
    each = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"time_ratio": statistics.median(each), "low": min(each), "high": max(each)}


def facts(device: str = "cpu") -> dict[str, Any]:
    """The machine and the versions of what was measured."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        named = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        processor = named[0] if named else processor
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "trl", "distalign"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    gpu = {} if device == "cpu" else {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {
        "processor": processor,
        **gpu,
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
