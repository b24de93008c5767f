"""What a checkpoint holds besides transformers' files: the round, the value head, the health monitor, counters,
the size of a micro-batch, the responses that the reference drew.

And the reference's log-probabilities of the pairs seen: scored again beside other pairs they would round differently.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distalign.data import EncodedPair
from distalign.errors import InputError
from distalign.training.rounds import RolloutWorker, Round

ROUND, DRAWN_ONCE, MONITOR, VALUES, COUNTERS, REFERENCE, BUDGET = (
    "rollout.safetensors",
    "reference_rollout.safetensors",
    "health.json",
    "value_head.safetensors",
    "reward_counts.json",
    "reference.safetensors",
    "token_budget.json",
)

# Tensors of the round are stored as "tensor.<name>", beside the ids.
_PREFIX = "tensor."


def save_worker(worker: RolloutWorker, folder: Path, step: int) -> None:
    """Write what a run needs to go on after `step` optimizer steps into a checkpoint's folder."""
    drawn = worker.position_at(step)
    if drawn is not None:
        save_round(drawn, folder)
    if worker.policy.value_head is not None:
        save_file(worker.policy.value_head.state_dict(), folder / VALUES)
    if worker.monitor is not None:
        _write(folder / MONITOR, worker.monitor.state_dict())
    _write(folder / COUNTERS, worker.reward_counters())


def load_worker(worker: RolloutWorker, folder: Path, step: int) -> None:
    """Go on from what `save_worker` wrote. Raises InputError for a damaged round or JSON file."""
    drawn = load_round(folder) if (folder / ROUND).is_file() else None
    counters = _read(folder / COUNTERS) if (folder / COUNTERS).is_file() else {}
    worker.resume(drawn, counters, step)
    if worker.policy.value_head is not None:
        worker.policy.value_head.load_state_dict(load_file(folder / VALUES))
    if worker.monitor is not None and (folder / MONITOR).is_file():
        worker.monitor.load_state_dict(_read(folder / MONITOR))


def save_reference(rows: Sequence[EncodedPair], logps: Mapping[tuple, Tensor], folder: Path) -> None:
    """Write the log-probabilities of those training pairs that have them, by `EncodedPair.key`, in nats."""
    scored = {_fingerprint(key): logps[key] for row in rows if (key := row.key) in logps}
    if scored:
        tensors = {"pairs": torch.tensor(list(scored)), "logps": torch.stack(list(scored.values())).cpu()}
        save_file(tensors, folder / REFERENCE)


def load_reference(rows: Sequence[EncodedPair], folder: Path, device: torch.device) -> dict[tuple, Tensor]:
    """What `save_reference` wrote of these pairs, wherever they stand now. Raises InputError for a damaged file."""
    path = folder / REFERENCE
    if not path.is_file():
        return {}
    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it to score the reference again") from error
    saved = dict(zip(tensors["pairs"].tolist(), tensors["logps"], strict=True))
    return {key: saved[mark] for row in rows if (mark := _fingerprint(key := row.key)) in saved}


def save_token_budget(budget: int, folder: Path) -> None:
    """Write how many tokens a micro-batch has, which a run that goes on keeps."""
    _write(folder / BUDGET, {"token_budget": budget})


def load_token_budget(folder: Path) -> int | None:
    """What `save_token_budget` wrote; None if it did not. Raises InputError for a damaged file."""
    path = folder / BUDGET
    return _read(path)["token_budget"] if path.is_file() else None


def _fingerprint(key: tuple[tuple[int, ...], ...]) -> int:
    """64 bits of the token ids of a pair, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big", signed=True)


def _write(path: Path, state: dict) -> None:
    path.write_text(json.dumps(state), encoding="utf-8")


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: cannot be read ({error}); resume from an earlier checkpoint") from error


def save_round(drawn: Round, folder: Path, name: str = ROUND) -> Path:
    """Write `rollout.safetensors` into `folder`: the whole of it or nothing. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = [response for group in drawn.responses for response in group]
    content = {
        "indices": torch.tensor(drawn.indices, dtype=torch.int64),
        "counts": torch.tensor([len(group) for group in drawn.responses], dtype=torch.int64),
        **_pack("prompts", drawn.prompts),
        **_pack("responses", flat),
        **{_PREFIX + k: v.detach().to("cpu", copy=True).contiguous() for k, v in drawn.tensors.items()},
    }
    about = {"round": drawn.number, "position": drawn.position, "checksum": _checksum(content)}
    path, scratch = folder / name, folder / f".{name}.{os.getpid()}"
    try:
        save_file(content, scratch, metadata={"buffer": json.dumps(about)})
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def load_round(folder: Path, name: str = ROUND) -> Round:
    """What `save_round` wrote, exactly as it was, on the CPU. Raises InputError for a missing or damaged file."""
    path = folder / name
    try:
        with safe_open(path, framework="pt") as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads((file.metadata() or {})["buffer"])
        if about["checksum"] != _checksum(content):
            raise ValueError("its checksum is wrong")
        flat = iter(_unpack("responses", content))
        return Round(
            number=about["round"],
            position=about["position"],
            indices=content["indices"].tolist(),
            prompts=_unpack("prompts", content),
            responses=[[next(flat) for _ in range(count)] for count in content["counts"].tolist()],
            tensors={k.removeprefix(_PREFIX): v for k, v in content.items() if k.startswith(_PREFIX)},
        )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        again = ", or remove the file to sample the round again" if name == ROUND else ""
        raise InputError(
            f"{path}: the responses of a round cannot be read ({type(error).__name__}: {reason}); resume from an "
            f"earlier checkpoint{again}"
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
