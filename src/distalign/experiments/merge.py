"""One model of a base and the adapter that a run has trained, as others load it: full weights, none in 4 bits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import GenerationConfig, PreTrainedModel, TrainingArguments

from distalign.data import Prompt, Tokenizer, encode_prompt, end_token_id
from distalign.engine import Group, score_in_batches
from distalign.errors import DAMAGED, InputError
from distalign.experiments.train import MERGED
from distalign.models.load import Source, find_model
from distalign.models.policy import MODEL_FILES, trained_temperature
from distalign.models.verify import check_mergeable, load_adapter
from distalign.rollout.sample import sample
from distalign.settings import dump_yaml
from distalign.stats.intervals import Estimate, mean_and_se
from distalign.training.run_folder import check_no_links, locked, whole_folder

# Its section of a card.
_MERGED = "## Merged"

# What the merged model and the one in 4 bits are compared on: prompts, and tokens of a response to each.
PROMPTS, TOKENS = 16, 16

# Instead of how the adapter is loaded.
_USE = """## Use
`AutoModelForCausalLM.from_pretrained` reads this folder; `generation_config.json` says how to sample it."""


@dataclass(frozen=True)
class Merged:
    """Where the merged model is, its dtype, and of a base that was in 4 bits KL(4-bit ‖ merged), in nats.

    The KL is summed over the first `TOKENS` tokens of a response to each of `PROMPTS` prompts; None if it was not
    measured.
    """

    folder: Path
    dtype: str
    kl: Estimate | None


def merge(
    run: str | Path,
    out: str | Path | None = None,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    check: bool = True,
) -> Merged:
    """Merge the adapter of a run into its base, and write the model, its tokenizer, sampling settings and card.

    `run` is a run's folder or an adapter's, `out` by default the folder `merged` in it. `dtype` is the weights', by
    default that of the base's files. An adapter that was trained on 4-bit weights is merged into those, written out,
    which keeps what was trained; with `check` the result is compared with it. Raises InputError, at once where another
    process trains in the run's folder, or merges into the same one.
    """
    source = find_adapter(run)
    place = Path(os.path.expanduser(run)) / MERGED if out is None else Path(os.path.expanduser(out))
    # Where the place is in no run's folder, models beside it may be written meanwhile.
    lock = ".lock" if (place.parent / "recipe.yaml").is_file() else f".{place.name}.lock"
    with locked(place.parent, lock):
        _check_place(place, [Path(run), Path(source.path), Path(str(source.adapter))], overwrite=overwrite)
        return _merge_into(place, source, dtype=dtype, check=check)


def _check_place(place: Path, needed: Sequence[Path], *, overwrite: bool) -> None:
    """Raise InputError for a place that is taken, or that may not be replaced."""
    if place.exists() and not overwrite:
        raise InputError(f"{place}: is there already; give another folder with --out, or --overwrite to replace it")
    if place.exists() and not _replaceable(place, needed):
        raise InputError(
            f"{place}: --overwrite replaces a model that distalign merge made, and this is something else, or holds "
            "the adapter or its base; give another folder with --out"
        )
    check_no_links(place, place.parent)


def _merge_into(place: Path, source: Source, *, dtype: str, check: bool) -> Merged:
    """Merge the adapter and write the model into `place`."""
    device = TrainingArguments(output_dir="unused").device
    label = f"model {source.name}"
    if source.quantization is not None:
        source.compare_base()
        # The 4-bit weights as numbers of the dtype, and the adapter merged into them.
        base: Any = replace(source, adapter=None).model(dtype, device)
        adapted = load_adapter(label, base.dequantize(), str(source.adapter))
        check_mergeable(label, adapted)
        model = adapted.merge_and_unload().eval()
    else:
        model = source.model(dtype, device)
        # Where it could not be merged, the adapter is still in the layers.
        check_mergeable(label, model)
    name, tokenizer = str(model.dtype).removeprefix("torch."), source.tokenizer()
    kl = _divergence(source, tokenizer, model, name) if source.quantization is not None and check else None
    assert source.adapter is not None
    if (Path(source.adapter) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.adapter)
    merged = Merged(place, name, kl)
    with whole_folder(place, ours=MODEL_FILES) as scratch:
        model.save_pretrained(scratch, safe_serialization=True)
        tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(_card(source, merged), encoding="utf-8")
    return merged


def find_adapter(run: str | Path) -> Source:
    """The adapter in a run's folder, or in the folder itself, on its base. Raises InputError if there is none."""
    folder = Path(os.path.expanduser(run))
    for place in (folder, folder / "model"):
        if (place / "adapter_config.json").is_file():
            source = find_model(str(place))
            if source.holds_4bit():
                raise InputError(
                    f"{run}: its base {source.path} is in 4 bits in its files, and an adapter is not merged into "
                    "those; name the base's full weights as base_model_name_or_path in its adapter_config.json"
                )
            return source
        if (place / "config.json").is_file():
            raise InputError(f"{run}: holds a whole model; only an adapter is merged")
    raise InputError(f"{run}: holds no adapter; give a run's folder (runs/NAME/train/METHOD), or an adapter's")


def _replaceable(place: Path, needed: Sequence[Path]) -> bool:
    """Whether a folder holds a merged model alone, and nothing of what it is made of."""
    inner = {path for one in needed for path in (one.resolve(), *one.resolve().parents)}
    card = place / "README.md"
    made = card.is_file() and _MERGED in card.read_text(encoding="utf-8", errors="replace")
    return made and place.resolve() not in inner


def _divergence(source: Source, tokenizer: Tokenizer, merged: PreTrainedModel, dtype: str) -> Estimate:
    """KL(4-bit ‖ merged) over the first tokens of responses that the model in 4 bits draws.

    Both are at the temperature of training.
    """
    trained = source.model(dtype, merged.device)
    chat = bool(tokenizer.chat_template)
    lines = files("distalign").joinpath("models/everyday_prompts.txt").read_text(encoding="utf-8").splitlines()
    rows = [Prompt([{"role": "user", "content": line}] if chat else line) for line in lines[:PROMPTS]]
    prompts = [encode_prompt(tokenizer, row) for row in rows]
    temperature = trained_temperature(str(source.adapter)) or 1.0
    settings = {"max_new_tokens": TOKENS, "temperature": temperature, "seed": 0}
    responses = sample(trained, prompts, end_id=end_token_id(tokenizer, conversational=chat), **settings)
    groups = [Group(prompt, drawn) for prompt, drawn in zip(prompts, responses, strict=True)]
    scores = score_in_batches(trained, groups, token_budget=1024, reference=merged, temperature=temperature)
    assert scores.step_kl is not None
    return mean_and_se(scores.step_kl.double().sum(-1))


def _card(source: Source, merged: Merged) -> str:
    """The adapter's card, which says what was done to it; a short one where it has none."""
    data: dict[str, Any]
    try:
        card: Any = ModelCard.load(Path(str(source.adapter)) / "README.md")
        data, text = card.data.to_dict(), card.text
    except DAMAGED:
        data, text = {"tags": ["distalign"]}, f"# {source.path}, with an adapter"
    data["library_name"] = "transformers"
    note = f"{_MERGED}\nThe adapter is merged into {source.path}, in {merged.dtype}."
    if source.quantization is not None:
        note += " It was trained on 4-bit weights, and these are those, written out."
        note += f" {agreement(merged)}." if merged.kl is not None else ""
    usage = text.find("## Use")
    end = text.find("\n## ", usage + 1)
    if usage >= 0 and source.quantization is not None:
        # How to load the adapter is no longer how to load this.
        text = f"{text[:usage]}{_USE}\n{text[end:] if end >= 0 else ''}"
    return f"---\n{dump_yaml(data)}---\n{text.rstrip()}\n\n{note}\n"


def agreement(merged: Merged) -> str:
    """How far the merged model is from the one in 4 bits, in words."""
    assert merged.kl is not None
    return (
        f"KL(4-bit ‖ merged) is {merged.kl.mean:.3g} ± {merged.kl.se:.2g} nats over the first {TOKENS} tokens of a "
        f"response ({merged.kl.n} prompts)"
    )
