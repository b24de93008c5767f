"""Rewards by a sequence-classification model with one label: what TRL's RewardTrainer writes, and most judges.

The judge reads TEXT, by its own tokenizer and chat template, so it need not know the policy's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from distalign.models.load import Source, find_model
from distalign.rewards.base import Request, RewardError, Spoken, constants, spoken

_CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True)
class JudgeSource:
    """Where a judge is read from, checked: its tokenizer, and the longest text it can read, in tokens."""

    source: Source
    tokenizer: Any
    max_length: int | None

    @property
    def name(self) -> str:
        """As the recipe calls it."""
        return self.source.name

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """The weights, from safetensors only, in evaluation mode. Raises RewardError if the score head is missing."""
        path, adapter = self.source.path, self.source.adapter
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                path,
                num_labels=1,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            if adapter is not None:
                model = PeftModel.from_pretrained(model, adapter)
            elif report["missing_keys"]:
                found = ", ".join(sorted(report["missing_keys"])[:3])
                raise RewardError(f"reward model {self.name}: it has no weights for {found}; train it, or take another")
        except (OSError, RuntimeError, ImportError, KeyError) as error:
            raise _unusable(self.name, error) from error
        return model.requires_grad_(False).eval()


def find_judge(name: str, *, max_length: int | None = None) -> JudgeSource:
    """Check a judge without loading its weights: a folder, or a hub id. Raises RewardError saying what is wrong.

    `max_length` (tokens) must not exceed what the model can read.
    """
    source = find_model(name)
    try:
        labels = {"num_labels": 1} if source.adapter else {}
        config: Any = AutoConfig.from_pretrained(source.path, trust_remote_code=False, **labels)
        folder = (
            source.adapter if source.adapter and (Path(source.adapter) / "tokenizer_config.json").is_file() else None
        )
        tokenizer = AutoTokenizer.from_pretrained(folder or source.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unusable(name, error) from error
    if source.adapter is not None:
        _check_adapter(name, Path(source.adapter))
    else:
        kinds = config.architectures or []
        if kinds and not any(kind.endswith(_CLASSIFIER) for kind in kinds):
            raise RewardError(
                f"reward model {name}: it is a {kinds[0]}; a model of the class {_CLASSIFIER} with one label is needed"
            )
        if config.num_labels != 1:
            raise RewardError(f"reward model {name}: it has {config.num_labels} labels; a reward model has one")
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max_length is not None and max_length > limit:
        raise RewardError(f"reward model {name}: max_length is {max_length}, but it has {limit} positions; lower it")
    return JudgeSource(source, tokenizer, max_length or limit)


def _check_adapter(name: str, folder: Path) -> None:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        keys = list(file.keys())
    if not any(part in key for key in keys for part in (".score.", ".classifier.", ".classification_head.")):
        raise RewardError(f"reward model {name}: the adapter holds no score head; save it with task_type SEQ_CLS")


def _unusable(name: str, error: Exception) -> RewardError:
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return RewardError(f"reward model {name}: it brings code of its own, which is never run for a reward")
    return RewardError(
        f"reward model {name}: cannot be loaded; give a folder made by save_pretrained (safetensors), or a hub id and "
        f"a network. transformers says: {reason[:300]}"
    )


class JudgeReward:
    """Scores of a sequence-classification model with one label.

    A chat is rendered by the judge's template, prompt and answer together, as if the answer had ended; strings are
    joined, with the judge's end-of-sequence token after them. A text longer than `max_length` tokens loses its START,
    and is counted. The model finds the last token of a padded text in its own way, as when it was trained.
    """

    def __init__(
        self, judge: JudgeSource, policy_tokenizer: Any, *, token_budget: int, device: Any, dtype: torch.dtype
    ) -> None:
        self.judge, self.policy_tokenizer, self.token_budget = judge, policy_tokenizer, token_budget
        self.model = judge.load(dtype).to(device)
        self.device = device
        config = self.model.config.get_text_config()
        # Where the checkpoint does not say, the tokenizer's: every trainer of such models sets it so.
        if config.pad_token_id is None:
            config.pad_token_id = judge.tokenizer.pad_token_id
        self.pad = config.pad_token_id
        self.texts = self.cut = 0

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> Float[Tensor, "responses"]:
        """The judge's scores, in the order of the responses."""
        rows = [self._ids(row) for row in spoken(requests, self.policy_tokenizer)]
        values = torch.zeros(len(rows))
        for batch in self._batches(rows):
            width = max(len(rows[i]) for i in batch)
            ids = torch.full((len(batch), width), self.pad or 0)
            mask = torch.zeros_like(ids)
            for place, i in enumerate(batch):
                ids[place, : len(rows[i])] = torch.tensor(rows[i])
                mask[place, : len(rows[i])] = 1
            logits = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits
            values[torch.tensor(batch)] = logits.squeeze(-1).float().cpu()
        return constants(values, self.judge.name)

    def facts(self) -> dict[str, float]:
        """Texts scored, and how many lost their start."""
        return {"texts": float(self.texts), "texts_cut": float(self.cut)}

    def _batches(self, rows: list[list[int]]) -> list[list[int]]:
        """Indices, the longest first: at most `token_budget` padded tokens, and one text each if nothing can pad."""
        batches: list[list[int]] = []
        for index in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
            room = self.token_budget // len(rows[batches[-1][0]]) if batches and self.pad is not None else 0
            if batches and len(batches[-1]) < room:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches

    def _ids(self, row: Spoken) -> list[int]:
        encode = _encoder(self.judge, row)
        ids = encode()
        self.texts += 1
        limit = self.judge.max_length
        if limit is not None and len(ids) > limit:
            self.cut += 1
            ids = encode(limit)
        return ids


def _encoder(judge: JudgeSource, row: Spoken) -> Callable[..., list[int]]:
    """A function of the length limit (none: all of it) that gives the ids of prompt and response."""
    tokenizer = judge.tokenizer
    if isinstance(row.prompt, str):
        assert isinstance(row.completion, str)
        text, special = row.prompt + row.completion, True
        end = tokenizer.eos_token
        text += "" if end is None or text.endswith(end) or _ends_by_itself(tokenizer) else end
    else:
        if not tokenizer.chat_template:
            raise RewardError(
                f"reward model {judge.name}: the rows are chats and its tokenizer has no chat template; add "
                "chat_template to its folder, or give strings"
            )
        settings = {"tools": row.extra.get("tools"), **(row.extra.get("chat_template_kwargs") or {})}
        text = tokenizer.apply_chat_template([*row.prompt, *row.completion], tokenize=False, **settings)
        special = False

    def encode(limit: int | None = None) -> list[int]:
        if limit is None:
            return tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)["input_ids"]
        tokenizer.truncation_side = "left"
        return tokenizer(text, add_special_tokens=special, truncation=True, max_length=limit)["input_ids"]

    return encode


def _ends_by_itself(tokenizer: Any) -> bool:
    """Whether the tokenizer closes every text with its end-of-sequence token, as those of encoders do."""
    return tokenizer("x")["input_ids"][-1:] == [tokenizer.eos_token_id]
