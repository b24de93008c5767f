"""Who samples the responses: this process, transformers' continuous batching, or a server. One small interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from distalign.engine.forward import device_of, evaluating
from distalign.engine.selfcheck import check
from distalign.errors import InputError
from distalign.rollout.sample import Drawing, sample

Progress = Callable[[int, int], Any]


@runtime_checkable
class Backend(Protocol):
    """Samples `n` responses to every prompt, as token ids: result[prompt][response].

    A response ends with `end_id`, or has `max_new_tokens` tokens and no end, as in `sample`. The model's weights, mode
    and attention and the global random state are afterwards what they were. `progress(done, total)` counts prompts.
    """

    def generate(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        *,
        n: int,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        end_id: int,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[list[int]]]:
        """Raises InputError for settings that this backend cannot honour."""
        ...


@dataclass(frozen=True)
class TransformersBackend:
    """`sample`, on any device; at most `rows` responses are decoded at once."""

    rows: int = 64

    def generate(self, model: Any, prompts: Sequence[list[int]], **settings: Any) -> list[list[list[int]]]:
        """`sample` with these settings."""
        return sample(model, prompts, rows=self.rows, **settings)


@dataclass(frozen=True)
class ContinuousBackend:
    """transformers' continuous batching, made for GPUs with flash attention; on a CPU half as fast as `sample`.

    At most `rows` responses are decoded at once, and the paged cache is made for that many. The tokens that a request
    gets depend on which others ran beside it, so the same seed need not give the same responses.
    """

    rows: int = 64

    def generate(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        *,
        n: int,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        end_id: int,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[list[int]]]:
        """Raises InputError for `min_new_tokens` above 0, an unsuitable model, and requests that failed."""
        Drawing(max_new_tokens, min_new_tokens, temperature, top_p, end_id)
        _refuse_minimum(min_new_tokens)
        if not prompts:
            return []
        inner = _paged(model)
        greedy = temperature == 0
        copies = 1 if greedy else n
        drawn = {} if greedy else {"temperature": temperature, "top_p": top_p, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=not greedy,
            eos_token_id=end_id,
            pad_token_id=end_id,
            num_return_sequences=copies,
            **drawn,
        )
        device, attention = device_of(inner), inner.config._attn_implementation
        with evaluating(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                outputs = inner.generate_batch(
                    list(prompts),
                    generation_config=config,
                    continuous_batching_config=self._memory(prompts, max_new_tokens, seed),
                    warmup=device.type == "cuda",
                )
            except (ValueError, NotImplementedError) as error:
                raise InputError(_cannot(inner, " ".join(str(error).split()))) from error
            finally:
                if inner.config._attn_implementation != attention:
                    inner.set_attn_implementation(attention)
        responses = _complete(list(outputs.values()), len(prompts) * copies, inner)
        if progress is not None:
            progress(len(prompts), len(prompts))
        groups = [responses[start : start + copies] for start in range(0, len(responses), copies)]
        return [[list(own) for own in group * (n // copies)] for group in groups]

    def _memory(self, prompts: Sequence[list[int]], max_new_tokens: int, seed: int) -> ContinuousBatchingConfig:
        """A cache for `rows` responses of full length. Left alone, it takes most of the memory that is free."""
        longest = max(len(prompt) for prompt in prompts)
        config = ContinuousBatchingConfig(seed=seed, max_requests_per_batch=self.rows)
        pages = math.ceil((longest + max_new_tokens) / config.page_size) + 1
        config.num_blocks, config.max_batch_tokens = self.rows * pages, max(self.rows, longest, config.page_size)
        return config


def _paged(model: Any) -> Any:
    """The model whose `generate_batch` runs; adapters are inside it. Raises InputError if its attention is its own.

    Such a model (bloom, gptj, mpt) would run without its past, and say nothing.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(inner, "generate_batch") or check(model, kernels=False).path != "shared":
        raise InputError(_cannot(inner, "its layers do not use transformers' attention interface alone"))
    return inner


def _cannot(model: Any, reason: str) -> str:
    return (
        f"rollout.backend continuous cannot sample from {type(model).__name__} ({reason}); take rollout.backend: "
        "transformers"
    )


def _complete(outputs: list[Any], wanted: int, model: Any) -> list[list[int]]:
    """Tokens of every request. generate_batch logs what fails and goes on; here nothing may be missing."""
    errors = [output.error for output in outputs if output.error is not None]
    if errors or len(outputs) != wanted:
        lost = wanted - len(outputs) + len(errors)
        reason = errors[0] if errors else "the generation thread ended"
        raise InputError(_cannot(model, f"{lost} of {wanted} responses are lost: {reason}"))
    return [output.generated_tokens for output in outputs]


@dataclass(frozen=True)
class VllmBackend:
    """A vLLM server at `url`. The place for it is here, the code is not yet: `generate` refuses."""

    url: str | None

    def generate(self, model: Any, prompts: Sequence[list[int]], **settings: Any) -> list[list[list[int]]]:
        """Raises InputError: not in this version."""
        raise InputError(_NO_VLLM)


_NO_VLLM = "rollout.backend vllm is not in this version; take transformers (any device) or continuous (one GPU)"


def check_backend(settings: Any) -> None:
    """Refuse what the backend of a recipe's `rollout` section cannot do, before a model is loaded (InputError)."""
    if settings.backend == "vllm":
        raise InputError(_NO_VLLM)
    if settings.url is not None:
        raise InputError(
            f"rollout.url is {settings.url} but the backend is {settings.backend}, which asks no server; "
            "leave rollout.url out"
        )
    if settings.backend == "continuous":
        _refuse_minimum(settings.min_new_tokens)
    elif settings.backend != "transformers":
        raise InputError(f"rollout.backend is {settings.backend!r}; take transformers or continuous")


def make_backend(settings: Any) -> Backend:
    """The backend of a recipe's `rollout` section (its backend and rows). Raises InputError as `check_backend` does."""
    check_backend(settings)
    kinds = {"transformers": TransformersBackend, "continuous": ContinuousBackend}
    return kinds[settings.backend](rows=settings.rows)


def _refuse_minimum(min_new_tokens: int) -> None:
    if min_new_tokens > 0:
        raise InputError(
            f"rollout.min_new_tokens is {min_new_tokens}: continuous batching cannot hold back the end token; set it "
            "to 0, or take rollout.backend: transformers"
        )
