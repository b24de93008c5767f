"""What is loaded is what the files hold: no tensor is made up, every number is finite."""

from __future__ import annotations

import json
import logging

import pytest
import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from distalign.models.load import ModelError, find_model
from distalign.models.verify import check_finite

GONE = "model.layers.1.mlp.up_proj.weight"


def change(folder, change, file="model.safetensors"):
    """The folder's tensors, changed."""
    weights = change(load_file(folder / file))
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / file, metadata={"format": "pt"})
    return str(folder)


def load(folder):
    """Its model, as every command loads it."""
    return find_model(str(folder)).model()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_weights_under_other_names_are_refused(tmp_path, prefix):
    """As torch.compile, DDP and PEFT name them: transformers alone gives random numbers."""
    folder = tiny.save(tmp_path / "model")
    change(folder, lambda weights: {prefix + name: value for name, value in weights.items()})
    with pytest.raises(ModelError, match=rf"lack \d+ of its tensors \(lm_head.*and hold {prefix}lm_head"):
        load(folder)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_a_model_without_its_head_is_refused(tmp_path, kind):
    """A bare backbone, or a classifier."""
    folder = tiny.save(tmp_path / "model", tie_word_embeddings=False)
    kind.from_config(tiny.model(tie_word_embeddings=False).config).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"lack 1 of its tensors \(lm_head.weight\)"):
        load(folder)


def test_a_missing_tensor_is_named(tmp_path):
    """One is enough."""
    folder = tiny.save(tmp_path / "model")
    change(folder, lambda weights: {name: value for name, value in weights.items() if name != GONE})
    with pytest.raises(ModelError, match=f"lack 1 of its tensors .{GONE}"):
        load(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_named(tmp_path, number):
    """In the tensor that holds it."""
    folder = tiny.save(tmp_path / "model")
    change(folder, lambda weights: {**weights, GONE: weights[GONE].index_fill(0, torch.tensor(3), number)})
    with pytest.raises(ModelError, match=f"{GONE} holds NaN or infinite"):
        load(folder)


def test_tied_weights_and_further_heads_load(tmp_path, caplog):
    """A tied head is in no file; what the model has no place for is named."""
    folder = tiny.save(tmp_path / "model", tie_word_embeddings=True)
    change(folder, lambda weights: {**weights, "value_head.weight": torch.zeros(1, 32)})
    with caplog.at_level(logging.WARNING, logger="distalign"):
        load(folder)
    assert "1 tensors of its files are not used: value_head.weight" in caplog.text


def test_layers_that_the_configuration_leaves_out_are_not_dropped(tmp_path):
    """Half a model would train."""
    folder = tiny.save(tmp_path / "model", num_hidden_layers=4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "layer_types": None}))
    with pytest.raises(ModelError, match="hold layers that its config"):
        load(folder)


def test_float8_is_read():
    """torch has no isfinite for it."""
    check_finite("model", {"w": torch.ones(2).to(torch.float8_e4m3fn)})
    with pytest.raises(ModelError, match="w holds NaN"):
        check_finite("model", {"w": torch.tensor([torch.nan]).to(torch.float8_e4m3fn)})


def adapter(folder, config, vocabulary=None):
    """An adapter of that kind on a model beside it."""
    base = tiny.model()
    base.name_or_path = str(tiny.save(folder / "base"))
    if vocabulary:
        base.resize_token_embeddings(vocabulary, mean_resizing=False)
    get_peft_model(base, config).save_pretrained(folder / "adapter", save_embedding_layers=bool(vocabulary))
    return folder / "adapter"


def lora():
    """An adapter that does something."""
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)


def test_an_adapter_with_a_missing_tensor_is_refused(tmp_path):
    """PEFT alone leaves it at its initial numbers."""
    folder = adapter(tmp_path, lora())
    load(folder)
    change(folder, lambda weights: dict(sorted(weights.items())[1:]), "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"lack 1 of its tensors \(.*lora_A"):
        load(folder)
    change(folder, lambda weights: {k: v * torch.inf for k, v in weights.items()}, "adapter_model.safetensors")
    with pytest.raises(ModelError):
        load(folder)


def test_an_adapter_on_resized_embeddings_loads(tmp_path):
    """The model gets the rows that the adapter was trained with."""
    model = load(adapter(tmp_path, lora(), vocabulary=64))
    assert model.get_input_embeddings().num_embeddings == 64


def test_a_learned_prompt_is_refused(tmp_path):
    """It cannot be merged."""
    folder = adapter(tmp_path, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ModelError, match="a learned prompt"):
        load(folder)
