"""Responses drawn by a `vllm serve` that runs beside the training, with the weights of the policy as they are.

    before each round    the weights go to the server, if they have changed       `VLLMServer.sync`
    the round            one request for each prompt, n responses to each         `VLLMServer.generate`
    after it             how far the server's numbers are from the engine's       `rescored`

Weights go through a folder that the server reads under the same path: adapters are loaded as adapters, whole models by
`reload_weights`. vLLM inside the training process is not supported. Tried with vLLM 0.32.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shlex
import shutil
import time
import uuid
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from distalign.engine.forward import embedding_weight, text_config, whole_state
from distalign.errors import InputError
from distalign.rollout.sample import end_ids

logger = logging.getLogger("distalign.rollout")
Answer = TypeVar("Answer", bound=BaseModel)

# Requests that the server has at once: it batches them itself, and none waits longer than for these.
IN_FLIGHT = 64
# How often a round is drawn again because the server was started anew meanwhile.
DRAWS = 3
# Mismatch in nats per token beyond which the server does not have the policy's weights; bfloat16 has about 0.002.
FAR = 0.5
# What vLLM takes as --max-lora-rank.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class ServerError(InputError):
    """The server is not there, cannot be used, or gave what cannot be used: says what was found and what to do."""


class _Gone(ServerError):
    """The server does not know what it is to draw from: it was started anew."""


class _Logprobs(BaseModel):
    token_logprobs: list[float]


class _Choice(BaseModel):
    index: int
    token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _Completion(BaseModel):
    choices: list[_Choice]


class _Card(BaseModel):
    id: str
    root: str | None = None
    parent: str | None = None


class _Cards(BaseModel):
    data: list[_Card]


class _Device(BaseModel):
    device: str | None = None


class _Config(BaseModel):
    device_config: _Device


class _Info(BaseModel):
    vllm_config: _Config


class _Weights(BaseModel):
    weight_version: str


@dataclass
class VLLMServer:
    """A running `vllm serve`. `check` says before anything is loaded whether it can be used.

    base_url: such as http://127.0.0.1:8000. timeout: seconds to wait for an answer, and for a server that was lost.
    model: what the server must have been started with, a folder or hub id; `names` are others that it may have.
    folder: where weights are handed over; the server reads it under the same path. rank: of the adapter that is
    trained, None if all weights are. dtype: of the weights, for the command that messages name.
    """

    base_url: str
    timeout: float
    model: str
    folder: Path
    rank: int | None = None
    dtype: str = "float32"
    names: Collection[str] = ()

    def __post_init__(self) -> None:
        self.base_url = self.base_url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        wait = httpx.Timeout(self.timeout, connect=min(10.0, self.timeout))
        # Nothing stays open between requests, so nothing has to be closed.
        limits = httpx.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=0)
        self._http = httpx.Client(base_url=self.base_url, headers=headers, timeout=wait, limits=limits)
        self._run = uuid.uuid4().hex[:8]
        # The server's own model, and what requests name.
        self._base = self._served = self.model
        # The version of this run's weights that the server has, in a tuple.
        self._has: tuple[int | None] | None = None
        # When a lost server was last spoken of: many requests wait for it at once.
        self._told = -math.inf

    @property
    def place(self) -> str:
        """The URL without name and password."""
        return str(httpx.URL(self.base_url).copy_with(userinfo=b""))

    @property
    def command(self) -> str:
        """The command that starts a server of this model for this run."""
        url, switch, more = httpx.URL(self.base_url), "VLLM_SERVER_DEV_MODE=1", ""
        if self.rank is not None:
            switch = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            more = f" --enable-lora --max-lora-rank {next((r for r in RANKS if r >= self.rank), RANKS[-1])}"
        return (
            f"{switch} vllm serve {shlex.quote(self.model)} --host {url.host} --port {url.port or 80} "
            f"--dtype {self.dtype} --generation-config vllm --logprobs-mode processed_logprobs{more}"
        )

    # Before a run -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ServerError unless a server is there, of this model, that takes weights and says what it draws with."""
        if self._ask("GET", "/health", once=True).status_code != 200:
            raise self._error("it is not healthy; start it")
        cards = [card for card in self._read(_Cards, self._ask("GET", "/v1/models")).data if card.parent is None]
        known = {self.model, *self.names, os.path.realpath(self.model)}
        served = next((card for card in cards if known & {card.id, card.root or "", _real(card.root)}), None)
        if served is None:
            raise self._error(
                f"it serves {', '.join(card.root or card.id for card in cards) or 'nothing'}, and the run trains "
                f"{self.model}; start it"
            )
        self._base = self._served = served.id
        weights = self._ask("GET", "/weight_info")
        if self.rank is None and weights.status_code != 200:
            raise self._error("it takes no weights; start it")
        if self.rank is not None and weights.status_code == 200:
            version = self._read(_Weights, weights).weight_version
            if version != "default":
                raise self._error(f"its weights are those of another run ({version}); start it anew")
        if self.rank is not None and self._ask("POST", "/v1/load_lora_adapter", {}).status_code in (404, 405):
            raise self._error("it takes no adapters; start it")
        self._check_logprobs()

    def _check_logprobs(self) -> None:
        """Of the single most likely token, the distribution that is drawn from has probability 1."""
        body = {"model": self._base, "prompt": [1], "max_tokens": 1, "temperature": 1.0, "top_k": 1}
        choices = self._completion({**body, "logprobs": 0, "return_token_ids": True}).choices
        if not choices or not choices[0].logprobs.token_logprobs:
            raise self._error("it gives no log-probabilities; start it")
        if choices[0].logprobs.token_logprobs[0] < -1e-3:
            raise self._error("its log-probabilities are not of the distribution that it draws from; start it")

    # Weights ----------------------------------------------------------------------------------------------------------

    def sync(self, model: nn.Module, version: int | None) -> None:
        """Have the server draw from `model`, whose weights are `version` of this run; nothing is sent if they are.

        None is the version of the reference: under LoRA the server's own model. Raises ServerError.
        """
        if self._has == (version,):
            return
        self._has, name = None, self._name(version)
        if self.rank is None:
            self._reload(model, name)
        elif version is None:
            self._served = self._base
        else:
            self._load_adapter(model, name)
        self._has = (version,)

    def _load_adapter(self, model: nn.Module, name: str) -> None:
        place, old = self._write(model, name, whole_state(model), save_embedding_layers=False), self._served
        body = {"lora_name": name, "lora_path": str(place), "load_inplace": True}
        answer = self._ask("POST", "/v1/load_lora_adapter", body)
        if answer.status_code != 200:
            shutil.rmtree(place, ignore_errors=True)
            raise self._error(
                f"it does not load the adapter of rank {self.rank} in {place} ({_said(answer)}); it must see that "
                "folder under the same path, and be started"
            )
        self._served = name
        if old not in (self._base, name):
            # A server that was started anew has none to forget.
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": old})
            shutil.rmtree(self.folder / old, ignore_errors=True)

    def _reload(self, model: nn.Module, name: str) -> None:
        self._check_head(model)
        # A value function is a part of the model while it is trained, and none of the server's.
        state = {key: value for key, value in whole_state(model).items() if not key.startswith("value_head.")}
        place = self._write(model, name, state)
        try:
            for path, body in (
                ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(place)}}),
                ("/reset_prefix_cache", {}),
                ("/update_weight_version", {"new_version": name}),
            ):
                answer = self._ask("POST", path, body)
                if answer.status_code != 200:
                    raise self._error(
                        f"it does not load the weights in {place} ({path}: {_said(answer)}); it must see that folder "
                        "under the same path, and be started"
                    )
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _check_head(self, model: nn.Module) -> None:
        """Raise ServerError where vLLM 0.32 would go on with the old head: its CPU build keeps a packed copy of it."""
        if not getattr(text_config(model), "tie_word_embeddings", False):
            return
        info = self._ask("GET", "/server_info?config_format=json")
        if info.status_code == 200 and self._read(_Info, info).vllm_config.device_config.device == "cpu":
            raise ServerError(
                f"vLLM server {self.place}: on a CPU it does not update a head that is tied to the embeddings; "
                "train LoRA, or a model with a head of its own (tie_word_embeddings false), or serve on a GPU"
            )

    def _write(self, model: nn.Module, name: str, state: dict[str, Tensor], **how: object) -> Path:
        place = (self.folder / name).resolve()
        try:
            place.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(place, state_dict=state, **how)  # pyright: ignore[reportCallIssue]
        except OSError as error:
            raise ServerError(f"{place}: the weights cannot be written ({error}); make room there") from None
        return place

    def _still_serves(self, version: int | None) -> bool:
        """Whether whole weights are those that were sent: not if the server was started anew, or has another run's."""
        if self.rank is not None:
            return True
        return self._read(_Weights, self._ask("GET", "/weight_info")).weight_version == self._name(version)

    def _name(self, version: int | None) -> str:
        return f"distalign-{self._run}-{'reference' if version is None else version}"

    # Responses --------------------------------------------------------------------------------------------------------

    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[list[int]],
        *,
        version: int | None,
        n: int,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        end_id: int,
        seed: int,
    ) -> tuple[list[list[list[int]]], Float[Tensor, "responses longest"]]:
        """`n` responses to every prompt, as `sample` gives them, and the log-probabilities of their tokens, in nats.

        `version` is that of the model's weights, as `sync` takes it. A log-probability that the server did not name is
        NaN. The same seed gives the same responses, as far as the server's numbers do not depend on what it computes
        at once. Raises ServerError.
        """
        ends, vocabulary = end_ids(model, end_id), len(embedding_weight(model))
        body = {
            "n": n,
            "max_tokens": max_new_tokens,
            "min_tokens": min_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "stop_token_ids": list(ends),
            # A response ends by our tokens, and the end is one of it.
            "ignore_eos": True,
            "include_stop_str_in_output": True,
            "logprobs": 0,
            "return_token_ids": True,
            # What a model's generation_config or the server's command may set otherwise.
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        bodies = [{**body, "prompt": prompt, "seed": _seed(seed, place)} for place, prompt in enumerate(prompts)]
        for _ in range(DRAWS):
            self.sync(model, version)
            try:
                completions = self._draw(bodies)
                if self._still_serves(version):
                    break
            except _Gone:
                pass
            logger.warning("vLLM server %s: it was started anew, or has another run's weights: the responses are drawn "
                           "again", self.place)  # fmt: skip
            self._has = None
        else:
            raise self._error(f"its weights were lost {DRAWS} times in drawing a round; give it to one run alone")
        drawn = [self._responses(one, n, max_new_tokens, ends, vocabulary) for one in completions]
        flat = [logps for group in drawn for _, logps in group]
        rows = torch.zeros(len(flat), max(map(len, flat), default=0))
        for row, logps in zip(rows, flat, strict=True):
            row[: len(logps)] = torch.tensor(logps)
        return [[response for response, _ in group] for group in drawn], rows

    def _draw(self, bodies: Sequence[dict[str, object]]) -> list[_Completion]:
        with ThreadPoolExecutor(max(1, min(len(bodies), IN_FLIGHT))) as pool:
            futures = [pool.submit(self._completion, {"model": self._served, **body}) for body in bodies]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def _completion(self, body: dict[str, object]) -> _Completion:
        answer = self._ask("POST", "/v1/completions", body, again=(500,))
        if answer.status_code == 404:
            raise _Gone(str(self._error(f"it does not draw ({_said(answer)}); start it")))
        if answer.status_code != 200:
            raise self._error(f"it refuses to draw ({_said(answer)}); mend that, or start it")
        return self._read(_Completion, answer)

    def _responses(
        self, completion: _Completion, n: int, max_new_tokens: int, ends: Sequence[int], vocabulary: int
    ) -> list[tuple[list[int], list[float]]]:
        """The responses to one prompt with their log-probabilities. Raises ServerError for what cannot be responses."""
        choices = sorted(completion.choices, key=lambda choice: choice.index)
        if [choice.index for choice in choices] != list(range(n)):
            raise self._error(f"it gave {len(choices)} responses where {n} were asked for; start another version")
        found = []
        for choice in choices:
            ids, logps = choice.token_ids, choice.logprobs.token_logprobs
            if choice.finish_reason == "stop" and (not ids or ids[-1] not in ends):
                # Some versions drop the token that ends a response.
                ids = [*ids, choice.stop_reason if choice.stop_reason in ends else ends[0]]  # pyright: ignore
                logps = [*logps, math.nan] if len(logps) < len(ids) else logps
            if len(ids) != len(logps) or not all(map(math.isfinite, logps[: len(choice.token_ids)])):
                raise self._error(
                    f"it gave {len(logps)} log-probabilities for {len(ids)} tokens, or some that are no numbers; if "
                    "the policy has not diverged, start another version"
                )
            wrong = [token for token in ids if not 0 <= token < vocabulary]
            if wrong:
                raise self._error(f"it gave token {wrong[0]}, and the model has {vocabulary}; start it")
            whole = bool(ids) and (ids[-1] in ends or len(ids) == max_new_tokens)
            if not whole or len(ids) > max_new_tokens or any(token in ends for token in ids[:-1]):
                raise self._error(
                    f"it gave a response of {len(ids)} tokens that ends with {ids[-1] if ids else 'nothing'} "
                    f"(finish_reason {choice.finish_reason}), where {max_new_tokens} tokens or an end were asked for; "
                    "give it a larger --max-model-len, or start it"
                )
            found.append((ids, logps))
        return found

    # Requests ---------------------------------------------------------------------------------------------------------

    def _ask(
        self, kind: str, path: str, body: object = None, *, once: bool = False, again: Collection[int] = ()
    ) -> httpx.Response:
        """One request; while the server is lost, again and again for `timeout` seconds, unless `once`."""
        wait, until = 1.0, time.monotonic() + self.timeout
        while True:
            try:
                answer = self._http.request(kind, path, json=body)
                if answer.status_code not in (429, 502, 503, 504, *again):
                    return answer
                reason = f"HTTP {answer.status_code}: {_said(answer)}"
            except httpx.HTTPError as error:
                reason = f"{type(error).__name__} {error}".strip()
            except httpx.InvalidURL as error:
                raise ServerError(f"vllm_server_base_url is {self.base_url}: {error}; write http://host:port") from None
            if once or time.monotonic() + wait > until:
                waited = "" if once else f" for {self.timeout:g} s (vllm_server_timeout)"
                raise self._error(f"it does not answer{waited} ({reason}); start it")
            if time.monotonic() - self._told > 10:
                self._told = time.monotonic()
                logger.warning("vLLM server %s: %s; it is asked again", self.place, reason)
            time.sleep(wait)
            wait = min(2 * wait, 30.0)

    def _read(self, kind: type[Answer], answer: httpx.Response) -> Answer:
        try:
            return kind.model_validate_json(answer.content)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"])) or "the answer"
            raise self._error(
                f"its answer is not as vLLM's ({place}: {problem['msg']}; HTTP {answer.status_code}); start vLLM 0.32 "
                "or later"
            ) from None

    def _error(self, found: str) -> ServerError:
        return ServerError(f"vLLM server {self.place}: {found}: {self.command}")


def _real(path: str | None) -> str:
    return os.path.realpath(path) if path and os.path.exists(path) else ""


def _said(answer: httpx.Response) -> str:
    return " ".join(answer.text.split())[:300] or f"HTTP {answer.status_code}"


def _seed(seed: int, place: int) -> int:
    """A prompt's seed: far from every other's, for the server adds a response's number to it."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {place}".encode(), digest_size=7).digest(), "big")


# What the server's numbers are worth ----------------------------------------------------------------------------------


def rescored(
    server: Float[Tensor, "responses drawn"],
    engine: Float[Tensor, "responses steps"],
    mask: Bool[Tensor, "responses steps"],
    *,
    clip_max: float | None,
) -> tuple[Float[Tensor, "responses steps"], float]:
    """(behavior log-probabilities, mismatch) of responses that a server drew with weights that the engine scores.

        mismatch    mean over tokens of r − 1 − ln r,  r = π(y_t|s_t) / μ(y_t|s_t)        nats per token
        behavior    b_t = ln π_t − (c_t − c_{t−1}),  c_t = min(Σ_{u≤t} ln r_u, ln clip_max)    nats

    μ is the server, π the engine, both with the same weights. The mismatch estimates KL(μ ‖ π): unbiased, and never
    below zero. With `behavior` for π_t, `importance_weights` of a later policy are exp(Σ ln π_later/π) · exp(c_t): the
    weight of what came since, times that of the server, which is truncated (None: it is not). Where the server named
    no log-probability the engine's stands.
    """
    server = torch.nn.functional.pad(server.to(engine), (0, engine.shape[1] - server.shape[1]))
    server = server.where(server.isfinite(), engine)
    ratio = torch.where(mask, engine - server, 0.0).double()
    mismatch = float(((ratio.exp() - 1 - ratio).sum() / mask.sum()).nan_to_num(math.inf))
    kept = ratio.cumsum(-1)
    if clip_max is not None:
        kept = kept.clamp(max=math.log(clip_max))
    steps = kept.diff(dim=-1, prepend=torch.zeros_like(kept[:, :1]))
    return (engine.double() - steps).to(engine), mismatch


def check_mismatch(mismatch: float) -> None:
    """Raise ServerError for a mismatch, in nats per token, that rounding cannot explain."""
    if mismatch > FAR:
        raise ServerError(
            f"the vLLM server's log-probabilities are {mismatch:.3g} nats per token from the policy's: it does not "
            "draw with the weights that it was given; does it serve this model, in this dtype or bfloat16, to one run?"
        )
