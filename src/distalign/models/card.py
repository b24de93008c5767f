"""The model card that is saved beside the weights: method, settings, data, results, citation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from distalign.methods import Method
from distalign.settings import masked

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")  # with peft installed, where it is an adapter
tokenizer = AutoTokenizer.from_pretrained("{place}")
```"""

# Of an adapter that was trained on 4-bit weights.
USE_4BIT = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

# An adapter on weights in 4 bits, as it was trained: with peft and bitsandbytes installed.
weights = BitsAndBytesConfig({arguments})
model = AutoModelForCausalLM.from_pretrained("{place}", quantization_config=weights)
tokenizer = AutoTokenizer.from_pretrained("{place}")
```

On the base's own weights the adapter gives another distribution: `distalign merge` makes one model of both, and says
how far from this one it is."""

SAMPLING = """\
Its distribution is softmax(logits / {temperature:g}), all of it: temperature {temperature:g}, top_p 1, top_k 0, as
`generation_config.json` says. Other sampling settings draw from another distribution."""

# By this line of its card a folder is known to be distalign's.
WRITTEN = "Trained on pairwise preferences with distalign."

CITATION = """@article{yun2025alignment,
  title   = {Alignment as Distribution Learning: Your Preference Model is Explicitly a Language Model},
  author  = {Yun and Kim and Park and Kim and Ryu and Cho and Jun},
  journal = {arXiv preprint arXiv:2506.01523},
  year    = {2025}
}"""


def model_card(
    *,
    base_model: str,
    name: str,
    method: Method,
    data: Mapping[str, Any],
    training: Mapping[str, Any],
    results: Mapping[str, Any],
    model_name: str | None = None,
    dataset_name: str | Sequence[str] | None = None,
    tags: str | Sequence[str] = (),
    adapter: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
) -> str:
    """Markdown with the hub's metadata block. `results` are the last numbers measured on held-out pairs.

    `model_name` is the title, `dataset_name` and `tags` go into the metadata, `adapter` are the settings of a trained
    adapter, `quantization` those of the 4-bit weights below it.
    """
    on_hub = base_model.count("/") == 1 and base_model[0] not in "./~" and not Path(base_model).exists()
    hub_id = f"base_model: {base_model}\n" if on_hub else ""
    names, more = ([value] if isinstance(value, str) else value for value in (dataset_name or (), tags))
    datasets = "\n".join(["datasets:", *(f"- {name}" for name in names), ""]) if names else ""
    listed = "\n".join(f"- {tag}" for tag in ("distalign", "preference-learning", name, *more))
    library = "peft" if adapter else "transformers"
    place = model_name or "path/to/this/folder"
    weights = {} if quantization is None else {"base_weights": f"4 bits ({quantization['bnb_4bit_quant_type']})"}
    arguments = ", ".join(f"{key}={value!r}" for key, value in (quantization or {}).items())
    use = USE.format(place=place) if quantization is None else USE_4BIT.format(place=place, arguments=arguments)
    lines = [
        f"---\nlibrary_name: {library}\n{hub_id}{datasets}tags:\n{listed}\n---",
        f"# {model_name or f'{base_model}, trained with {name.upper()}'}",
        f"{WRITTEN} Method: {name} ({method.source}).",
        f"## Use\n{use}\n\n{SAMPLING.format(temperature=temperature)}",
        "## Method settings\n" + _bullets(masked(asdict(method))),
        "## Training settings\n" + _bullets(masked({**training, **(adapter or {}), **weights})),
        "## Data\n" + _bullets(masked(data)),
        "## On held-out pairs\n" + (_bullets(results) or "Not measured."),
        f"## Citation\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(lines) + "\n"


def add_licence(card: Path, base: str) -> None:
    """Give a card the licence that the base model's own card names: its folder's, or on the hub. Nothing without."""
    try:
        named = ModelCard.load(str(Path(base) / "README.md") if Path(base).is_dir() else base).data
    except (OSError, ValueError):
        return
    if named.get("license"):
        made = ModelCard.load(card)
        made.data["license"] = named["license"]
        made.save(card)


def _bullets(values: Mapping[str, Any]) -> str:
    return "\n".join(
        f"- {key}: {value:.4g}" if isinstance(value, float) else f"- {key}: {value}" for key, value in values.items()
    )
