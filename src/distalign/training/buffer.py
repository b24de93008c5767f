"""What a round of rollouts left behind, so that a run can stop in the middle of it and go on."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distalign.errors import InputError

FILE = "rollout.safetensors"

# Tensors of the buffer are stored as "tensor.<name>", beside the ids.
_PREFIX = "tensor."


@dataclass
class Buffer:
    """The prompts of one round, their sampled responses, and numbers for every response.

    round: number of the round, which with the run's seed decides what is sampled. position: units of work (minibatches
    over all inner epochs) already done in it. indices: row of every prompt in its data set. tensors: a row a response,
    prompt by prompt: rewards, behavior_token_logps, reference_token_logps, advantages (nats). Raises ValueError if
    their lengths do not agree.
    """

    round: int
    position: int
    indices: list[int]
    prompts: list[list[int]]
    responses: list[list[list[int]]]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = {len(self.indices), len(self.prompts), len(self.responses)}
        if len(counts) > 1:
            raise ValueError(
                f"buffer: {len(self.indices)} indices, {len(self.prompts)} prompts and responses to "
                f"{len(self.responses)}; give one each a prompt"
            )
        for name, tensor in self.tensors.items():
            self._check_rows(name, tensor)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def starts(self) -> list[int]:
        """Row of the first response to every prompt, and the number of all responses."""
        return [0, *accumulate(len(group) for group in self.responses)]

    def rows(self, i: int) -> slice:
        """Rows of `tensors` that belong to prompt number `i` of the buffer."""
        starts = self.starts
        return slice(starts[i], starts[i + 1])

    def find(self, index: int) -> int:
        """Number in the buffer of the prompt that is row `index` of its data set; the first, if it is there twice.

        Raises KeyError if it is not there.
        """
        try:
            return self.indices.index(index)
        except ValueError:
            raise KeyError(f"prompt {index} is not in the buffer of round {self.round}") from None

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor with a row a response. Raises ValueError for another number of rows."""
        self._check_rows(name, tensor)
        self.tensors[name] = tensor

    def _check_rows(self, name: str, tensor: Tensor) -> None:
        if tensor.ndim == 0 or len(tensor) != self.starts[-1]:
            raise ValueError(f"buffer: {name} is {list(tensor.shape)}; it needs a row for each of {self.starts[-1]}")

    def save(self, folder: Path) -> Path:
        """Write `rollout.safetensors` into `folder`: the whole of it or nothing. Returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        flat = [response for group in self.responses for response in group]
        content = {
            "indices": torch.tensor(self.indices, dtype=torch.int64),
            "counts": torch.tensor([len(group) for group in self.responses], dtype=torch.int64),
            **_pack("prompts", self.prompts),
            **_pack("responses", flat),
            **{_PREFIX + k: v.detach().to("cpu", copy=True).contiguous() for k, v in self.tensors.items()},
        }
        about = {"round": self.round, "position": self.position, "checksum": _checksum(content)}
        path, scratch = folder / FILE, folder / f".{FILE}.{os.getpid()}"
        try:
            save_file(content, scratch, metadata={"buffer": json.dumps(about)})
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, folder: Path) -> Buffer:
        """What `save` wrote, exactly as it was, on the CPU. Raises InputError for a missing or damaged file."""
        path = folder / FILE
        try:
            with safe_open(path, framework="pt") as file:
                content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                about = json.loads((file.metadata() or {})["buffer"])
            if about["checksum"] != _checksum(content):
                raise ValueError("its checksum is wrong")
            flat = iter(_unpack("responses", content))
            return cls(
                round=about["round"],
                position=about["position"],
                indices=content["indices"].tolist(),
                prompts=_unpack("prompts", content),
                responses=[[next(flat) for _ in range(count)] for count in content["counts"].tolist()],
                tensors={k.removeprefix(_PREFIX): v for k, v in content.items() if k.startswith(_PREFIX)},
            )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{path}: the responses of a round cannot be read ({type(error).__name__}: {reason}); resume from an "
                "earlier checkpoint, or remove the file to sample the round again"
            ) from error


def _pack(name: str, sequences: Sequence[list[int]]) -> dict[str, Tensor]:
    """Sequences of ids as one tensor and their lengths."""
    return {
        f"{name}.ids": torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64),
        f"{name}.lengths": torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64),
    }


def _unpack(name: str, content: dict[str, Tensor]) -> list[list[int]]:
    return [part.tolist() for part in content[f"{name}.ids"].split(content[f"{name}.lengths"].tolist())]


def _checksum(content: dict[str, Tensor]) -> int:
    """CRC-32 of names, types, shapes and bytes: safetensors itself notices a short file, not a changed one."""
    crc = 0
    for name in sorted(content):
        tensor = content[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc
