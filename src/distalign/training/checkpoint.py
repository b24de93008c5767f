"""What a checkpoint holds besides transformers' files, and how one is known to be whole and of this run.

manifest.json                   the step, what run it is of, a SHA-256 of every file: written last
distalign.json                  health, numbers for the next log line, the size of a micro-batch
rollout.*                       the round of drawn responses that the run is in: ids in .json, numbers in .safetensors
reference_rollout.*             what the reference drew before the first step, likewise
reference.safetensors           the reference's log-probabilities of the pairs seen: scored again, beside other pairs,
                                they would round differently
value_head.safetensors          of a critic
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from distalign.data import EncodedPair
from distalign.errors import DAMAGED, InputError
from distalign.rewards.base import column_rewards
from distalign.training.rounds import Round, Row
from distalign.training.run_folder import remove, sync, whole_folder, write_text

logger = logging.getLogger("distalign.training.checkpoint")

MANIFEST, STATE, ROUND, DRAWN_ONCE, VALUES, REFERENCE = (
    "manifest.json",
    "distalign.json",
    "rollout",
    "reference_rollout",
    "value_head.safetensors",
    "reference.safetensors",
)
# A checkpoint is written in this folder of the run's.
SAVING = ".saving"
# Where those wait that are later than the one that a run goes on from.
LATER = ".later"
# Where those of an earlier run wait until yet another run begins.
EARLIER = ".earlier"

# Settings of an adapter that may be others where a run goes on.
_NOT_THE_ADAPTER = {
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    *("inference_mode", "init_lora_weights", "runtime_config"),
}
# Settings of a model's configuration that do not change what it computes.
_NOT_COMPUTED = r"_.*|.*_token_id|transformers_version|architectures|use_cache|(torch_)?dtype|id2label|label2id"


# Whole, and of this run -----------------------------------------------------------------------------------------------


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, whole or not, by their step."""
    return sorted((path for path in folder.glob("*") if re.fullmatch(r"checkpoint-\d+", path.name)), key=step_of)


@contextmanager
def saving(folder: Path, step: int, run: Mapping[str, str]) -> Iterator[Path]:
    """Where to write the checkpoint of a step; at the end it gets its manifest and its name, whole or not at all.

    Raises InputError where the disk does not take it; the checkpoints that there are stay.
    """
    with whole_folder(folder / f"checkpoint-{step}", folder / SAVING / f"checkpoint-{step}") as scratch:
        yield scratch
        files = {str(path.relative_to(scratch)): _digest(path) for path in scratch.rglob("*") if path.is_file()}
        write_text(scratch / MANIFEST, json.dumps({"step": step, "run": run, "files": files}, indent=1))
        for log in ("metrics.jsonl", "samples.jsonl"):
            if (folder / log).is_file():
                sync(folder / log)


def prune(folder: Path, keep: set[Path], limit: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, but none of `keep`."""
    others = [path for path in checkpoints(folder) if path not in keep]
    for path in others[: max(0, len(others) + len(keep) - limit) if limit else 0]:
        remove(path)


def set_aside(folder: Path) -> None:
    """Move the checkpoints that are there where they do not count as this run's."""
    if old := checkpoints(folder):
        remove(folder / EARLIER)
        (folder / EARLIER).mkdir()
        for checkpoint in old:
            os.replace(checkpoint, folder / EARLIER / checkpoint.name)
        names = ", ".join(checkpoint.name for checkpoint in old)
        logger.warning(
            "%s: %s of an earlier run wait in %s until another run begins: to go on with that one, move them back",
            folder, names, EARLIER,
        )  # fmt: skip


def newest_complete(folder: Path) -> Path | None:
    """The complete checkpoint with the largest step; says which are passed over, and why."""
    for scratch in checkpoints(folder / SAVING):
        # Killed between the end of its writing and its renaming.
        if defect(scratch) is None:
            remove(folder / scratch.name)
            os.replace(scratch, folder / scratch.name)
    for checkpoint in reversed(checkpoints(folder)):
        reason = defect(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("%s is passed over: %s", checkpoint, reason)
    return None


def defect(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if it is whole."""
    try:
        manifest = _manifest(checkpoint)
        if checkpoint.name != (name := f"checkpoint-{manifest['step']}"):
            return f"it is of step {manifest['step']}, and its folder is not named {name}"
        if not isinstance(manifest["run"], dict):
            return f"{MANIFEST} cannot be read (its run is no object)"
        for name, digest in manifest["files"].items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if _digest(checkpoint / name) != digest:
                return f"{name} is not what was saved (its checksum differs)"
    except FileNotFoundError:
        if not checkpoint.is_dir():
            return "there is no such checkpoint"
        return f"it has no {MANIFEST}, so it was not written to its end"
    except DAMAGED as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def check_belongs(checkpoint: Path, run: Mapping[str, str]) -> None:
    """Raise InputError if a complete checkpoint is of a run with another method, other data or another model."""
    saved = _manifest(checkpoint)["run"]
    for name in dict.fromkeys((*run, *saved)):
        before, now = saved.get(name, "none"), run.get(name, "none")
        if before != now:
            both = "" if 64 in (len(before), len(now)) else f": it had {before}, this run has {now}"
            raise InputError(
                f"{checkpoint}: is of a run with another {name}{both}; give the same, or train anew in another folder"
            )


def _manifest(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def lasting(value: object) -> str:
    """The text of a value, the same in every process: not where an object lies in memory, nor the order of a set."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{key}: {lasting(part)}' for key, part in value.items()))}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(lasting, value)))}}}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(lasting, value))})"
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def rows_digest(rows: Sequence[Row]) -> str:
    """Hash of what is learned from: ids, probabilities and other columns, which a reward may read, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        ids = [row.prompt, row.chosen, row.rejected] if isinstance(row, EncodedPair) else [row.prompt]
        probability = row.probability if isinstance(row, EncodedPair) else None
        others = lasting(row.row.extra) if row.row is not None else ""
        digest.update(f"{list(map(len, ids))} {probability} {column_rewards(row.row)} {others}".encode())
        digest.update(array("q", [token for part in ids for token in part]).tobytes())
    return digest.hexdigest()


def held_out_digest(sets: Mapping[str, Sequence[Row]] | Sequence[Row] | None) -> str:
    """Hash of the held-out pairs, or of each set of them; "none" without."""
    named = sets if isinstance(sets, Mapping) else {"": sets or []}
    digests = [f"{name} {rows_digest(rows)}" for name, rows in named.items() if rows]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest() if digests else "none"


def model_digest(model: nn.Module) -> str:
    """Hash of the configuration, and of numbers from all over every weight that an adapter does not train.

    Another model has others there.
    """
    adapted = isinstance(model, PeftModel)
    config = getattr(model, "config", None)
    settings = config.to_diff_dict() if isinstance(config, PretrainedConfig) else {}
    digest = hashlib.sha256(lasting(_computing(settings)).encode())
    for name, weight in model.named_parameters():
        if not (adapted and weight.requires_grad):
            digest.update(f"{name} {list(weight.shape)}".encode())
            numbers = weight.detach().flatten()
            digest.update(numbers[:: max(1, len(numbers) // 256)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _computing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a configuration's settings, and of its parts', on which it depends what the model computes."""
    kept = {name: value for name, value in settings.items() if not re.fullmatch(_NOT_COMPUTED, name)}
    return {name: _computing(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def adapter_settings(model: nn.Module) -> dict[str, str]:
    """What is set of the adapter that is trained, by "adapter NAME": not how it began, nor where its base is."""
    if not isinstance(model, PeftModel):
        return {}
    settings = model.peft_config[str(model.active_adapter)].to_dict()
    return {
        # A set has another order in each process.
        f"adapter {name}": str(sorted(value) if isinstance(value, set) else getattr(value, "value", value))
        for name, value in settings.items()
        if value and name not in _NOT_THE_ADAPTER
    }


# Its parts ------------------------------------------------------------------------------------------------------------


def save_state(state: Mapping[str, Any], folder: Path) -> None:
    """Write the numbers that a run needs to go on."""
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` wrote."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def save_reference(rows: Sequence[EncodedPair], logps: Mapping[tuple, Tensor], folder: Path) -> None:
    """Write the log-probabilities of those training pairs that have them, by `EncodedPair.key`, in nats."""
    scored = {_fingerprint(key): logps[key] for row in rows if (key := row.key) in logps}
    if scored:
        tensors = {"pairs": torch.tensor(list(scored)), "logps": torch.stack(list(scored.values())).cpu()}
        save_file(tensors, folder / REFERENCE)


def load_reference(rows: Sequence[EncodedPair], folder: Path, device: torch.device) -> dict[tuple, Tensor]:
    """What `save_reference` wrote of these pairs, wherever they stand now."""
    path = folder / REFERENCE
    if not path.is_file():
        return {}
    tensors = load_file(path, device=str(device))
    saved = dict(zip(tensors["pairs"].tolist(), tensors["logps"], strict=True))
    return {key: saved[mark] for row in rows if (mark := _fingerprint(key := row.key)) in saved}


def _fingerprint(key: tuple[tuple[int, ...], ...]) -> int:
    """64 bits of the token ids of a pair, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big", signed=True)


def save_round(drawn: Round, folder: Path, name: str = ROUND) -> None:
    """Write a round into a checkpoint's folder: its ids as JSON, its tensors beside."""
    ids = {field.name: getattr(drawn, field.name) for field in fields(drawn) if field.name != "tensors"}
    (folder / f"{name}.json").write_text(json.dumps(ids), encoding="utf-8")
    tensors = {name: rows.detach().to("cpu", copy=True).contiguous() for name, rows in drawn.tensors.items()}
    save_file(tensors, folder / f"{name}.safetensors")


def load_round(folder: Path, name: str = ROUND) -> Round:
    """What `save_round` wrote, exactly as it was, on the CPU."""
    ids = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return Round(**ids, tensors=load_file(folder / f"{name}.safetensors"))
