"""Trained rewards in a folder.

reward.json         settings, γ, tokens, and ln π₀ of one response by which a wrong base model is noticed
results.json        held-out results with their standard errors, and the history of the training
README.md           a card
reward.safetensors  init: policy: the head, and what was trained of the trunk
model.safetensors   init: scratch: a standard sequence-classification model (LoRA: an adapter for one)
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from distalign.data import EncodedPair
from distalign.engine import Group, score_in_batches
from distalign.models.load import Source
from distalign.models.policy import Lora, make_policy
from distalign.rewards.base import RewardError
from distalign.rewards.heads import Correction, LastToken
from distalign.rewards.reward_model import TrainedReward
from distalign.stats.metrics import Estimate

# The file by which a folder of ours is known.
MARK = "reward.json"
_TENSORS, _MODEL, _ADAPTER = "reward.safetensors", "model.safetensors", "adapter_model.safetensors"
_SCORE = "base_model.model.score.weight"


class UnreadableReward(RewardError):
    """A folder that holds no whole reward, such as one whose writing was stopped."""


@dataclass(frozen=True)
class Origin:
    """What a trained reward was made of."""

    settings: Any
    gamma: float | None
    source: Any
    tokenizer: Any
    train: list[EncodedPair]
    held: list[EncodedPair]


def save_reward(
    folder: Path,
    reward: TrainedReward,
    results: Mapping[str, Estimate],
    history: list[dict[str, Any]],
    origin: Origin,
) -> None:
    """Write the files of this module's docstring."""
    folder.mkdir(parents=True, exist_ok=True)
    store = _STORES[origin.settings.init]
    store.save(folder, reward, origin)
    pair = origin.held[0]
    about = {
        "init": origin.settings.init,
        "backbone": origin.settings.backbone,
        "gamma": origin.gamma,
        "base_model": origin.source.name,
        "lora": origin.settings.lora.model_dump() if origin.settings.backbone == "lora" else None,
        "vocabulary": _fingerprint(origin.tokenizer),
        "probe": {"prompt": pair.prompt, "response": pair.chosen, "logp": _logp(reward.base, pair.prompt, pair.chosen)},
    }
    _write(folder / MARK, about)
    numbers = {key: value._asdict() for key, value in results.items()}
    _write(folder / "results.json", {"n_train": len(origin.train), "held_out": numbers, "history": history})
    (folder / "README.md").write_text(_card(results, origin), encoding="utf-8")


def load_reward(folder: str | Path, *, base: Any, tokenizer: Any, token_budget: int = 2048) -> TrainedReward:
    """The reward that `Trained.save` wrote, on the device of `base`, with identical scores.

    `base` and `tokenizer` are those of the policy, and must be those it was trained with. Raises RewardError if they
    are not, UnreadableReward if the folder is incomplete.
    """
    folder = Path(folder).expanduser()
    try:
        about = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if about["vocabulary"] != _fingerprint(tokenizer):
            raise RewardError(
                f"reward {folder}: it reads the tokens of {about['base_model']}, which are not the policy's; train a "
                "reward with this policy's model"
            )
        reward = _STORES[about["init"]].load(folder, about, base, tokenizer, token_budget)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RewardError):
            raise
        raise UnreadableReward(f"reward {folder}: it cannot be read ({error}); train it again") from error
    probe = about["probe"]
    found = _logp(base, probe["prompt"], probe["response"])
    # Half precision moves a sequence by a fraction of a nat, another model by many.
    if not abs(found - probe["logp"]) < 0.5 + 0.01 * abs(probe["logp"]):
        raise RewardError(
            f"reward {folder}: ln π₀ of a response was {probe['logp']:.2f} and is {found:.2f} on this model; it "
            f"belongs to {about['base_model']}: load that, or train again"
        )
    return reward


class PolicyStore:
    """init: policy: tensors of our own, for ln π₀ is not part of any class of transformers."""

    @staticmethod
    def save(folder: Path, reward: TrainedReward, origin: Origin) -> None:
        """The head with its scales, and the trained part of the trunk."""
        tensors = {f"head.{name}": value for name, value in reward.head.state_dict().items()}
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in (tensors | reward.trained()).items()},
            folder / _TENSORS,
        )

    @staticmethod
    def load(folder: Path, about: dict[str, Any], base: Any, tokenizer: Any, token_budget: int) -> TrainedReward:
        """A reward of the same parts, with the tensors in them."""
        trunk, tensors = _trunk(about, base, tokenizer), load_file(folder / _TENSORS)
        head = Correction(Correction.width(base.get_input_embeddings().weight.shape[1]))
        head.load_state_dict({name[5:]: value for name, value in tensors.items() if name.startswith("head.")})
        reward = TrainedReward(base, trunk, head, gamma=about["gamma"], token_budget=token_budget)
        with torch.no_grad():
            for name, parameter in reward.trained().items():
                parameter.copy_(tensors[name])
        trunk.requires_grad_(False)
        return reward


class ScratchStore:
    """init: scratch: what AutoModelForSequenceClassification (or PEFT) reads, and gives the same scores."""

    @staticmethod
    def save(folder: Path, reward: TrainedReward, origin: Origin) -> None:
        """A standard folder, tokenizer included. Its padding token is one that no text contains."""
        score = reward.head.weight.detach().cpu()[None]
        tokenizer = copy.deepcopy(origin.tokenizer)
        pad = _padding(tokenizer, [*origin.train, *origin.held])
        if pad is not None:
            tokenizer.pad_token_id = pad
        tokenizer.save_pretrained(folder)
        if origin.settings.backbone == "lora":
            state = {**get_peft_model_state_dict(reward.trunk), _SCORE: score}
            save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, folder / _ADAPTER)
            config = copy.deepcopy(reward.trunk.peft_config["default"])
            config.task_type, config.inference_mode, config.modules_to_save = "SEQ_CLS", True, ["score"]
            config.base_model_name_or_path = origin.source.path
            config.save_pretrained(folder)
            return
        model = classifier(reward.trunk)
        model.config.pad_token_id = pad
        model.score.weight = nn.Parameter(score.to(reward.trunk.dtype))
        model.save_pretrained(folder, max_shard_size="1TB")

    @staticmethod
    def load(folder: Path, about: dict[str, Any], base: Any, tokenizer: Any, token_budget: int) -> TrainedReward:
        """The weights of the standard folder in a trunk that the engine reads."""
        trunk = _trunk(about, base, tokenizer)
        state = load_file(folder / (_ADAPTER if about["backbone"] == "lora" else _MODEL))
        score = state.pop(_SCORE if about["backbone"] == "lora" else "score.weight")
        if about["backbone"] == "lora":
            set_peft_model_state_dict(trunk, state)
        elif about["backbone"] == "full":
            trunk.load_state_dict(state, strict=False)
        trunk.requires_grad_(False)
        head = LastToken(score.shape[1])
        head.weight.data.copy_(score[0])
        return TrainedReward(base, trunk, head, gamma=None, token_budget=token_budget)


_STORES: dict[str, type[PolicyStore] | type[ScratchStore]] = {"policy": PolicyStore, "scratch": ScratchStore}


def classifier(model: Any) -> Any:
    """A sequence-classification model with one label whose trunk IS that of a causal language model.

    Its score head has no memory yet. Raises RewardError if the family has no such class.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            made: Any = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        made = None
    trunk = getattr(model, getattr(made, "base_model_prefix", ""), None)
    if trunk is None or type(getattr(made, made.base_model_prefix)) is not type(trunk) or not hasattr(made, "score"):
        raise RewardError(
            f"reward.train: {config.model_type} has no sequence-classification class with the same trunk; use init: "
            "policy"
        )
    setattr(made, made.base_model_prefix, trunk)
    return made


def check_export(base: Any) -> None:
    """Raise RewardError if `base` cannot become a sequence-classification model."""
    classifier(base)


def _trunk(about: dict[str, Any], base: Any, tokenizer: Any) -> Any:
    """The trunk of a saved reward, as it was before training."""
    if about["backbone"] == "frozen":
        return base
    lora = None if about["lora"] is None else Lora.model_validate(about["lora"])
    source = Source(about["base_model"], "", "the base of a saved reward")
    return make_policy(base, tokenizer, source, lora=lora, reference=False).model.eval()


def _padding(tokenizer: Any, pairs: list[EncodedPair]) -> int | None:
    """A special token that stands in no text: models of this class take the last token that is not padding."""
    used = {token for pair in pairs for ids in (pair.prompt, pair.chosen, pair.rejected) for token in ids}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    candidates = [tokenizer.pad_token_id, *(index for index, token in added.items() if token.special)]
    end = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    return next((index for index in candidates if index is not None and index not in used | end), None)


def _logp(base: Any, prompt: list[int], response: list[int]) -> float:
    return float(score_in_batches(base, [Group(prompt, [response])], token_budget=1).logps[0])


def _fingerprint(tokenizer: Any) -> str:
    """Equal for tokenizers with the same tokens."""
    known = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _card(results: Mapping[str, Estimate], origin: Origin) -> str:
    settings, base = origin.settings, origin.source.name
    formula = "γ ln π₀(a|x) + f(x, a)" if settings.init == "policy" else "f(x, a)"
    rows = [f"| {key} | {v.mean:.4f} ± {v.se:.4f} | {v.n} |" for key, v in results.items()]
    given = {key: value for key, value in settings.model_dump().items() if value is not None}
    given |= {"gamma": origin.gamma, "n_train": len(origin.train)}
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags:",
            "- distalign",
            "- reward-model",
            "---",
            "",
            f"# Reward model on {base}",
            "",
            f"R(x, a) = {formula}, trained on pairwise preferences with distalign by maximum likelihood "
            "(arXiv 2506.01523v2, eq. 9).",
            "",
            "## On held-out pairs",
            "",
            "| | mean ± standard error | pairs |",
            "| --- | --- | --- |",
            *rows,
            "",
            "The same pairs decided when to stop.",
            "",
            "## Settings",
            "",
            *(f"- {key}: {value}" for key, value in given.items()),
            "",
        ]
    )
