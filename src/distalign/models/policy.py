"""A policy: a causal language model being trained, its tokenizer, and the reference that it starts from.

Under LoRA the reference is the policy with its adapter off; under full training it is a frozen copy, made only if
somebody needs it.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from distalign.engine import Group, Reference, score
from distalign.engine.forward import embedding_weight, whole_state
from distalign.errors import DAMAGED
from distalign.models.card import WRITTEN
from distalign.models.load import BASE, WEIGHTS, ModelError, Source
from distalign.models.quantized import NOTE, is_quantized, keep_exact, write_note
from distalign.models.verify import adapts_tied, check_mergeable
from distalign.settings import Count, Positive, Section, Share

logger = logging.getLogger("distalign.models.policy")
AnyModel = TypeVar("AnyModel", bound=nn.Module)

# Names of the files of a whole model.
_WHOLE = rf"config\.json|{WEIGHTS}|model\.safetensors\.index\.json"
_ADAPTER = r"adapter_config\.json|adapter_model\.(safetensors|bin)"
# Of all files that make a folder what it is loaded as; whatever else lies in it is the user's.
MODEL_FILES = (
    rf"{_WHOLE}|{_ADAPTER}|{re.escape(NOTE)}|{re.escape(BASE)}|README\.md|generation_config\.json"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.jinja|additional_chat_templates"
)


class Lora(Section):
    """Low-rank adapters; `layers` adapts the top ones only (null: all)."""

    r: Count = 8
    alpha: Positive = 16
    dropout: Share = 0.0
    layers: Count | None = None
    target_modules: str | list[str] = "all-linear"

    def config(self, model: PreTrainedModel, name: str) -> LoraConfig:
        """As PEFT takes it, for a model of that name. Raises ModelError if `layers` exceeds the model's."""
        targets, linear = self.target_modules, (nn.Linear, Conv1D)
        if self.layers is not None:
            layers, prefix = _top_layers(model, self.layers, name)
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
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.dropout,
            bias="none",
            target_modules=targets,
            # GPT-2's linear maps keep their weight transposed.
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        )


@dataclass
class Policy:
    """The model being trained (`model`), its tokenizer, and the model that it starts from (`reference`).

    `reference` is what `engine.score` takes: a context that turns the adapter off, a frozen copy, or None if the policy
    was made without one. `value_head` is there while a method that declares `values` trains it. `new_adapter` is False
    for an adapter that was given: the policy may start away from its reference then.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    source: Source
    reference: Reference | None = None
    value_head: nn.Linear | None = None
    new_adapter: bool = True

    def as_reference(self) -> AbstractContextManager[nn.Module]:
        """The reference as a model, while the context lasts; an adapter that is switched off is one."""
        assert self.reference is not None
        return nullcontext(self.reference) if isinstance(self.reference, nn.Module) else self.reference()

    def disable_dropout(self) -> None:
        """Set every dropout to 0: what is trained is then the very distribution that responses are drawn from."""
        largest = 0.0
        for module in self.model.modules():
            for name in ("p",) if isinstance(module, nn.Dropout) else ("attention_dropout", "dropout", "dropout_p"):
                rate = getattr(module, name, None)
                if isinstance(rate, float) and rate > 0:
                    largest = max(largest, rate)
                    setattr(module, name, 0.0)
        if largest:
            logger.info("dropout %g is off: responses are drawn without, and so the policy is trained without", largest)

    def add_value_head(self) -> None:
        """Attach a value function on the hidden states, 0 everywhere at first, to be trained with the model."""
        size = self.model.config.get_text_config().hidden_size
        weight = embedding_weight(self.model)
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
        """Check that KL(π ‖ π₀) is 0 on `groups` before training. Raises ModelError if it is not.

        An adapter that was given may be trained already: then the distance is only logged.
        """
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
        if not math.isfinite(max(gap, kl)):
            raise ModelError(
                f"model {self.source.name}: before any step its log-probabilities are not finite; its weights hold NaN "
                "or infinite numbers, or overflow in this dtype: take another checkpoint, or dtype: float32"
            )
        if not max(gap, kl) < 1e-2:
            if not self.new_adapter:
                logger.warning("the adapter is trained already: the policy starts %.3g nats from its reference, which "
                               "is the model with the adapter off", kl)  # fmt: skip
                return
            advice = (
                "an adapter must start at zero: load the model without the trained adapter, or merge it first"
                if isinstance(self.model, PeftModel)
                else "another trainer has trained the model since: load it anew, or make this trainer after"
            )
            raise ModelError(
                f"model {self.source.name}: before any step the policy is not its reference (largest KL {kl:.3g} nats, "
                f"largest log-probability gap {gap:.3g}); {advice}"
            )

    def save(self, folder: Path, card: str, *, sampling: GenerationConfig | None = None) -> None:
        """Write `model` in transformers' format (the adapter alone under LoRA), tokenizer and card.

        `sampling` says how to draw from it, in place of what its base said (`whole_distribution`).
        Files of the other kind (an adapter, a whole model) that an earlier run left in the folder are removed; raises
        ModelError where its card does not say that a run wrote them. An adapter on a model that another adapter was
        merged into is merged too, for its base is in no folder; into tied embeddings it is not: raises ModelError.
        """
        model: Any = self.model
        merge = self.source.adapter is not None and isinstance(self.model, PeftModel)
        if merge:
            check_mergeable(f"model {self.source.name}", self.model)
        adapter = isinstance(self.model, PeftModel) and not merge
        if adapter and folder.resolve() == Path(self.source.path).resolve():
            raise ModelError(f"{folder}: holds the base of the adapter that is to be saved; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        # An earlier run's, of the other kind: loading would take them.
        other = _WHOLE if adapter else _ADAPTER
        names = rf"{other}|{re.escape(NOTE)}|{re.escape(BASE)}"
        replaced, readme = [old for old in folder.iterdir() if re.fullmatch(names, old.name)], folder / "README.md"
        if replaced and not (readme.is_file() and WRITTEN in readme.read_text(encoding="utf-8", errors="replace")):
            raise ModelError(
                f"{folder}: holds {', '.join(sorted(old.name for old in replaced))}, which would be removed, and no "
                "README.md of distalign's says that a run wrote them; give another folder, or move them"
            )
        for old in replaced:
            old.unlink()
        if merge:
            model = copy.deepcopy(model).merge_and_unload()
        own = model.generation_config
        model.generation_config = sampling or own
        # The policy that is saved has no value head.
        state = {name: value for name, value in whole_state(model).items() if not name.startswith("value_head.")}
        model.save_pretrained(folder, state_dict=state, safe_serialization=True)
        model.generation_config = own
        if adapter:
            write_note(model, folder)
            self.source.write_base(folder)
        self.tokenizer.save_pretrained(folder)
        if sampling is not None:
            # Beside an adapter PEFT writes none.
            sampling.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


def whole_distribution(temperature: float, ends: Iterable[int]) -> GenerationConfig:
    """To draw from softmax(logits / temperature), and stop at any of `ends`.

    A base's own settings (top_k 50, top_p 0.9, a penalty) would truncate the distribution that was trained.
    """
    # Padded with the end, as transformers does where nothing is said.
    stops = list(ends)
    return GenerationConfig(
        do_sample=True, temperature=temperature, top_p=1.0, top_k=0, eos_token_id=stops, pad_token_id=stops[0]
    )


def trained_temperature(folder: str) -> float | None:
    """The temperature at which a saved policy was trained, if `whole_distribution` is in its folder."""
    if not (Path(folder) / "generation_config.json").is_file():
        return None
    try:
        found = GenerationConfig.from_pretrained(folder)
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model {folder}: its generation_config.json cannot be read ({reason}); mend or remove it"
        ) from None
    whole = found.do_sample and found.top_k == 0 and found.top_p == 1.0
    return found.temperature if whole and isinstance(found.temperature, int | float) else None


def make_policy(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    *,
    lora: Lora | PeftConfig | None = None,
    reference: bool,
) -> Policy:
    """A policy that starts at `base`, which stays as it is.

    With `lora` the policy shares every weight with `base` and adds its own adapter.
    Without it all weights are copied and trained. Raises ModelError for an adapter that does not fit the model, and for
    quantised weights without one. On a model with an adapter of its own that could not be merged nothing is trained.
    """
    keep_exact(f"model {source.name}", base)
    check_startable(base, source)
    if lora is None:
        if is_quantized(base):
            raise ModelError(f"model {source.name}: quantised weights cannot be trained; train an adapter (lora)")
        model = copy.deepcopy(base)
        model.requires_grad_(True)
        return Policy(model, tokenizer, source, base.requires_grad_(False) if reference else None)
    model = share(base)
    config = lora.config(model, source.name) if isinstance(lora, Lora) else copy.copy(lora)
    config.task_type = config.task_type or "CAUSAL_LM"
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(
            f"model {source.name}: lora.target_modules is {getattr(config, 'target_modules', None)!r}; {error}"
        ) from None
    if source.adapter is not None:
        # It would be merged where it is saved.
        check_mergeable(f"model {source.name}", adapted)
    return Policy(adapted, tokenizer, source, adapter_off(adapted) if reference else None)


def check_startable(base: PreTrainedModel, source: Source) -> None:
    """Raise ModelError for a model that has an adapter on its tied embeddings: what is trained could not be saved."""
    if adapts_tied(base):
        raise ModelError(
            f"model {source.name}: its adapter is on tied embeddings (lm_head, embed_tokens) and is not merged, so "
            "nothing can be trained on top of it; start from its base, or from an adapter without them"
        )


def adapter_off(model: PeftModel) -> Callable[[], AbstractContextManager[nn.Module]]:
    """The reference of a policy with an adapter: the same model, with the adapter off while the context lasts."""

    @contextmanager
    def off() -> Iterator[nn.Module]:
        with model.disable_adapter():
            yield model

    return off


def share(model: AnyModel) -> AnyModel:
    """A second model of the same weights: modules of its own, no memory of its own."""
    # The scales of 4-bit weights are neither parameters nor buffers.
    states = [state for module in model.modules() if (state := getattr(module, "quant_state", None)) is not None]
    return copy.deepcopy(model, {id(part): part for part in (*model.parameters(), *model.buffers(), *states)})


def _top_layers(model: PreTrainedModel, top: int, name: str) -> tuple[list[tuple[int, nn.Module]], str]:
    """The last `top` layers of the decoder with their numbers, and the name of the list that they are in."""
    count = model.config.get_text_config().num_hidden_layers
    if top > count:
        raise ModelError(f"model {name}: lora.layers is {top} but the model has {count} layers; lower it")
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(enumerate(module))[-top:], prefix
    raise ModelError(f"model {name}: its layers are in no list that could be found; leave lora.layers out")
