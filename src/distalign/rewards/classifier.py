"""Rewards by a sequence-classification model with one label: what TRL's RewardTrainer writes, and most reward models.

It reads TEXT, by its own tokenizer and chat template, so it need not know the policy's tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from distalign.models.load import Source, explained, find_model, positions
from distalign.models.verify import load_adapter, load_verified
from distalign.rewards.base import Request, Reward, RewardError, TextResponse, as_text, finite

logger = logging.getLogger("distalign.rewards.classifier")

_CLASSIFIER = "ForSequenceClassification"
# What the families call the head that gives the score.
_HEADS = ("score.", "classifier.", "classification_head.")


@dataclass(frozen=True)
class ClassifierSource:
    """Where a reward classifier is read from, checked: its tokenizer, and the longest text it can read, in tokens."""

    source: Source
    tokenizer: Any
    max_length: int | None

    @property
    def name(self) -> str:
        """As the recipe calls it."""
        return self.source.name

    def require_template(self) -> None:
        """Raise RewardError if it has no chat template, which rows that are chats need."""
        if not self.tokenizer.chat_template:
            raise RewardError(
                f"reward model {self.name}: the rows are chats and its tokenizer has no chat template; add "
                "chat_template to its folder, or give strings"
            )

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel | PeftModel:
        """The weights, from safetensors only, in evaluation mode. Raises ModelError if the score head is missing."""
        path, adapter = self.source.path, self.source.adapter
        with explained(self.name):
            model: Any = load_verified(
                AutoModelForSequenceClassification,
                f"reward model {self.name}",
                path,
                later=() if adapter is None else _HEADS,
                num_labels=1,
                dtype=dtype,
                trust_remote_code=False,
            )
            if adapter is not None:
                model = load_adapter(f"reward model {self.name}", model, adapter)
        return model.requires_grad_(False).eval()


def find_classifier(name: str, *, max_length: int | None = None) -> ClassifierSource:
    """Check a reward classifier without loading its weights: a folder, or a hub id. Raises ModelError, RewardError.

    `max_length` (tokens) must not exceed what the model can read.
    """
    source = find_model(name)
    config, tokenizer = source.config(), source.tokenizer()
    if source.adapter is not None:
        with safe_open(Path(source.adapter) / "adapter_model.safetensors", framework="pt") as file:
            keys = list(file.keys())
        if not any(f".{head}" in key for key in keys for head in _HEADS):
            raise RewardError(f"reward model {name}: the adapter holds no score head; save it with task_type SEQ_CLS")
    else:
        kinds = config.architectures or []
        if kinds and not any(kind.endswith(_CLASSIFIER) for kind in kinds):
            raise RewardError(
                f"reward model {name}: it is a {kinds[0]}; a model of the class {_CLASSIFIER} with one label is needed"
            )
        if config.num_labels != 1:
            raise RewardError(f"reward model {name}: it has {config.num_labels} labels; a reward model has one")
    limit = _positions(name, config)
    if limit is not None and max_length is not None and max_length > limit:
        raise RewardError(f"reward model {name}: max_length is {max_length}, but it has {limit} positions; lower it")
    # A tokenizer without a limit says 10³⁰.
    limits = (size for size in (limit, tokenizer.model_max_length) if size is not None and size < VERY_LARGE_INTEGER)
    return ClassifierSource(source, tokenizer, max_length or min(limits, default=None))


def _positions(name: str, config: PretrainedConfig) -> int | None:
    """Longest text that the classifier can read, in tokens; None if it names no limit. Raises ModelError.

    Encoders like RoBERTa count positions from the one after that of their padding.
    """
    with explained(name), torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    sizes = [positions(config)]
    for place, table in model.named_modules():
        if place.endswith("position_embeddings") and isinstance(padding := getattr(table, "padding_idx", None), int):
            sizes.append(len(table.weight) - padding - 1)  # pyright: ignore[reportArgumentType]
    return min((size for size in sizes if size is not None), default=None)


class ClassifierReward(Reward):
    """Scores of a sequence-classification model with one label.

    A chat is rendered by the model's own template, prompt and answer together, as if the answer had ended; strings are
    joined, with the model's end-of-sequence token after them. A text longer than `max_length` tokens loses its START,
    and a warning says how many did. The model finds the last token of a padded text in its own way, as it was trained.
    """

    def __init__(
        self,
        source: ClassifierSource,
        model: PreTrainedModel | PeftModel,
        policy_tokenizer: PreTrainedTokenizerBase,
        *,
        token_budget: int,
    ) -> None:
        self.source, self.policy_tokenizer, self.token_budget = source, policy_tokenizer, token_budget
        self.model = model.requires_grad_(False).eval()
        self.device = model.device
        config = self.model.config.get_text_config()
        # Where the checkpoint does not say, the tokenizer's: every trainer of such models sets it so.
        if config.pad_token_id is None:
            config.pad_token_id = source.tokenizer.pad_token_id
        self.pad: int | None = config.pad_token_id

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> Float[Tensor, "responses"]:
        """The model's scores, in the order of the responses."""
        read = [self._ids(response) for response in as_text(requests, self.policy_tokenizer)]
        rows, cut = [ids for ids, _ in read], sum(was_cut for _, was_cut in read)
        if cut:
            logger.warning("reward model %s: %d of %d texts are longer than %s tokens and lost their start",
                           self.source.name, cut, len(rows), self.source.max_length)  # fmt: skip
        values = torch.zeros(len(rows))
        for batch in self._batches(rows):
            texts = [torch.tensor(rows[i]) for i in batch]
            ids = pad_sequence(texts, batch_first=True, padding_value=self.pad or 0)
            mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
            logits = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits
            values[torch.tensor(batch)] = logits.squeeze(-1).float().cpu()
        return finite(values, self.source.name)

    def _batches(self, rows: list[list[int]]) -> list[list[int]]:
        """Indices, the longest first: at most `token_budget` padded tokens, and one text each if nothing can pad."""
        batches: list[list[int]] = []
        for index in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
            most = self.token_budget // len(rows[batches[-1][0]]) if batches and self.pad is not None else 0
            if batches and len(batches[-1]) < most:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches

    def _ids(self, response: TextResponse) -> tuple[list[int], bool]:
        """Prompt and response in the model's tokens; without their start where they are too long, and whether so."""
        tokenizer, limit = self.source.tokenizer, self.source.max_length
        special = isinstance(response.prompt, str)  # a template writes its special tokens itself
        text = self._text(response)
        ids = tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)["input_ids"]
        if limit is None or len(ids) <= limit:
            return ids, False
        tokenizer.truncation_side = "left"
        return tokenizer(text, add_special_tokens=special, truncation=True, max_length=limit)["input_ids"], True

    def _text(self, response: TextResponse) -> str:
        tokenizer, prompt, completion = self.source.tokenizer, response.prompt, response.completion
        if isinstance(prompt, str):
            assert isinstance(completion, str)
            text, end = prompt + completion, tokenizer.eos_token
            # Tokenizers of encoders close every text with it themselves.
            closes = tokenizer("x")["input_ids"][-1:] == [tokenizer.eos_token_id]
            return text if end is None or text.endswith(end) or closes else text + end
        self.source.require_template()
        settings = {"tools": response.columns.get("tools"), **(response.columns.get("chat_template_kwargs") or {})}
        return tokenizer.apply_chat_template([*prompt, *completion], tokenize=False, **settings)
