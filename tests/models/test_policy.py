"""Policies: where models come from, what is shared, what is trained, and what is saved."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from engine_models import GROUPS, build
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig

from distalign.engine import Group, score
from distalign.experiments.merge import merge as merge_run
from distalign.methods import PMLE
from distalign.models.card import WRITTEN, model_card
from distalign.models.load import ModelError, Source, find_model, weights_digest
from distalign.models.policy import Lora, Policy, make_policy, share

PAIRS = [Group(p.prompt, [p.chosen, p.rejected]) for p in tiny.encoded_pairs(4)]
SOURCE = Source("tiny", "tiny", "made here")


def logps(model, groups=PAIRS):
    """Log-probabilities without gradient."""
    with torch.no_grad():
        return score(model.eval(), groups).logps


def move(model):
    """One step of plain gradient descent on the first responses."""
    model.train()
    before = [p.detach().clone() for p in model.parameters()]
    loss = -score(model, PAIRS).logps[::2].mean()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss = -score(model, PAIRS).logps[::2].mean()
        loss.backward()
        optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def make(base=None, *, reference=True, **lora):
    """A LoRA policy on the tiny model; lora=None as `full=True`."""
    full = lora.pop("full", False)
    base = base or tiny.model()
    return make_policy(
        base, tiny.tokenizer(), SOURCE, lora=None if full else Lora(**{"r": 4, **lora}), reference=reference
    )


# Where models come from -----------------------------------------------------------------------------------------------


def test_a_folder_loads_as_it_was_saved(tiny_folder):
    """Weights, tokenizer, template and context length; evaluation mode."""
    source = find_model(str(tiny_folder))
    model = source.model()
    assert not model.training
    assert torch.equal(logps(model), logps(tiny.model()))
    assert source.tokenizer().chat_template == tiny.TEMPLATE
    assert source.max_length() == tiny.CONTEXT
    assert source.model("bfloat16").dtype == torch.bfloat16


def test_an_adapter_folder_loads_with_its_adapter_merged(tiny_folder, tmp_path):
    """What a LoRA run saved is a model to start from: its adapter is part of it, not something to be turned off."""
    policy = make(find_model(str(tiny_folder)).model())
    move(policy.model)
    policy.save(tmp_path, "")
    source = find_model(str(tmp_path))
    assert source.max_length() == tiny.CONTEXT
    model = source.model()
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    torch.testing.assert_close(logps(model), logps(policy.model), rtol=0, atol=1e-4)
    again = make_policy(model, tiny.tokenizer(), source, lora=Lora(r=4), reference=True)
    again.assert_starts_at_reference(PAIRS)
    move(again.model)
    again.save(tmp_path / "again", "")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logps(saved), logps(again.model), rtol=0, atol=1e-4)


def test_an_adapter_whose_base_is_an_adapter_is_refused(tmp_path):
    """Its own folder, or another adapter's: it says which and what to write."""
    for name, base in (("itself", tmp_path / "itself"), ("another", tmp_path / "itself")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"")
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        with pytest.raises(ModelError, match=rf"{name}: the base of this adapter, {base}, is an adapter too; name as"):
            find_model(str(folder))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"base_model_name_or_path": None}, "names no base; put the hub id or folder of the model it was trained on"),
        (
            {"peft_type": "LORA", "base_model_name_or_path": "b", "layer_replication": [[0, 2], [1, 2]]},
            "its adapter has layer_replication",
        ),
    ],
)
def test_an_adapter_that_cannot_be_put_on_its_base_is_refused(tmp_path, config, why):
    """One that names no base, and one of layers that share a weight, into which all adapters would be merged."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=why):
        find_model(str(tmp_path))


@pytest.mark.filterwarnings("ignore:.*a tied layer is part of the adapter")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_tied_embeddings_is_not_merged(tmp_path, target):
    """It loads as PEFT has it; merging it, which would change the other embeddings too, is refused, as is training."""
    base = tiny.save(tmp_path / "base", tie_word_embeddings=True)
    config = LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM")
    trained: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    source = find_model(str(tmp_path / "adapter"))
    model = source.model()
    ids = torch.tensor([PAIRS[0].prompt])
    with torch.no_grad():
        expected = trained.eval()(ids).logits
        assert (expected - find_model(str(base)).model()(ids).logits).abs().max() > 0.1
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logps(model), logps(trained), rtol=0, atol=1e-5)
    why = r"is on the output or input embeddings .*one weight \(tie_word_embeddings\).*keep it as an adapter"
    with pytest.raises(ModelError, match=why):
        merge_run(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ModelError, match=why):
        Policy(trained, tiny.tokenizer(), source).save(tmp_path / "merged", "")
    assert not (tmp_path / "merged").exists()
    for lora in (None, Lora(r=4)):
        with pytest.raises(ModelError, match="nothing can be trained on top of it; start from its base"):
            make_policy(model, tiny.tokenizer(), source, lora=lora, reference=False)


def test_weights_are_hashed_once_and_again_when_they_change(tiny_folder, tmp_path, monkeypatch):
    """A file is read again only where it changed; every file, and which folder it is in, changes the hash."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_folder, base)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    plain, adapted = Source("base", str(base), ""), Source("adapted", str(base), "", adapter=str(adapter))
    opened, digests, real = [], [], Path.open
    monkeypatch.setattr(Path, "open", lambda self, *how, **more: opened.append(self.name) or real(self, *how, **more))

    def read(source):
        opened.clear()
        digests.append(weights_digest(source))
        return sorted(opened)

    assert read(plain) == ["config.json", "generation_config.json", "model.safetensors"]
    assert read(adapted) == ["adapter_config.json", "adapter_model.safetensors"]
    assert read(plain) == read(adapted) == []
    assert digests[:2] == digests[2:]
    (adapter / "adapter_model.safetensors").write_bytes(b"Weights")
    assert read(adapted) == ["adapter_model.safetensors"]
    (base / "config.json").write_text("{ }")
    assert read(adapted) == ["config.json"]
    assert read(replace(adapted, quantization={"load_in_4bit": True})) == []
    shutil.copytree(base, tmp_path / "copy")
    assert len(set(digests)) == 5
    assert weights_digest(replace(adapted, path=str(tmp_path / "copy"))) == digests[-2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", "there is no such folder; give a folder"),
        ("/no/such/folder", "there is no such folder; give a folder"),
        ("nothing.gguf", "there is no such file; give the path of a .gguf file"),
    ],
)
def test_what_is_not_there_is_refused_with_its_name(name, message):
    """Before anything is loaded."""
    with pytest.raises(ModelError, match=rf"model {re.escape(name)}: {message}"):
        find_model(name)


@pytest.mark.parametrize("name", ["everyday", "smollm2-135m-instruct"])
def test_a_folder_with_a_short_name_is_not_passed_over(tmp_path, monkeypatch, name):
    """Which of both is meant is asked; a folder that holds no model is none."""
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / name)
    with pytest.raises(ModelError, match=f"model {name}: is a short name .* and a folder here; write ./{name} for the"):
        find_model(name)
    assert find_model(f"./{name}").path == str(tmp_path / name)


@pytest.mark.parametrize("name", ["nobody-here/nothing-there", "nothing-there"])
def test_a_hub_id_that_cannot_be_had_is_refused(name):
    """Transformers' own words come last, in one line."""
    for load in (find_model(name).tokenizer, find_model(name).config, find_model(name).model):
        with pytest.raises(ModelError, match=f"model {name}: cannot be loaded; give a folder") as error:
            load()
        assert "\n" not in str(error.value)


def test_a_folder_without_a_model_is_refused(tmp_path):
    """It says what is missing."""
    with pytest.raises(ModelError, match=r"holds no config.json; give a folder made by save_pretrained"):
        find_model(str(tmp_path))


def test_pickled_weights_are_refused(tiny_folder, tmp_path):
    """Safetensors only: pytorch_model.bin could run code."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    torch.save(tiny.model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot be loaded.*safetensors"):
        find_model(str(folder)).model()


def test_code_in_a_model_folder_is_not_run(tiny_folder, tmp_path):
    """An auto_map needs trust_remote_code, and without it nothing is asked and nothing runs."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('code was run')")
    for load in (find_model(str(folder)).config, find_model(str(folder)).model):
        with pytest.raises(ModelError, match="with trust_remote_code: true, if you trust it"):
            load()


@pytest.mark.parametrize("damage", [b"not a model", b""])
def test_damaged_weights_are_refused(tiny_folder, tmp_path, damage):
    """A file cut off by a full disk is an error with the model's name, not a traceback."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").write_bytes(damage)
    with pytest.raises(ModelError, match="cannot be loaded"):
        find_model(str(folder)).model()


def test_weights_of_another_shape_are_refused(tiny_folder, tmp_path):
    """A config.json that is not of these weights."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        find_model(str(folder)).model()


# Sharing, adapters, reference -----------------------------------------------------------------------------------------


def test_shared_models_have_one_memory_and_modules_of_their_own():
    """No tensor is copied, and an adapter on one leaves the outputs of the other as they were."""
    base = tiny.model(tie_word_embeddings=True)
    before = logps(base)
    other = share(base)
    for a, b in zip(base.parameters(), other.parameters(), strict=True):
        assert a is b
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert not {id(m) for m in base.modules()} & {id(m) for m in other.modules()}
    adapted = get_peft_model(
        other, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
    )
    assert not torch.equal(logps(adapted), before)
    assert torch.equal(logps(base), before)


@pytest.mark.parametrize("lora", [{}, {"layers": 1}, {"full": True}, {"dropout": 0.5}])
def test_a_policy_starts_at_its_base_and_leaves_it_there(lora):
    """Equal at step 0; after steps the policy moved, its reference and the base did not."""
    base = tiny.model()
    before = logps(base)
    policy = make(base, **lora)
    torch.testing.assert_close(logps(policy.model), before, rtol=0, atol=1e-5)
    policy.assert_starts_at_reference(PAIRS)
    move(policy.model)
    with torch.no_grad():
        scores = score(policy.model.eval(), PAIRS, reference=policy.reference)
    torch.testing.assert_close(scores.reference_logps, before, rtol=0, atol=1e-5)
    assert torch.equal(logps(base), before)
    assert float((scores.logps - before).abs().max()) > 0.01
    with pytest.raises(ModelError, match="before any step the policy is not its reference"):
        policy.assert_starts_at_reference(PAIRS)


def test_the_check_of_the_start_leaves_the_modes():
    """A policy in training mode stays in it."""
    policy = make()
    policy.model.train()
    policy.assert_starts_at_reference(PAIRS)
    assert policy.model.training


def test_an_adapter_that_does_not_start_at_zero_is_refused():
    """Its reference, the base without it, is another model."""
    policy = make()
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    with pytest.raises(ModelError, match="an adapter must start at zero"):
        policy.assert_starts_at_reference(PAIRS)


def test_without_a_reference_none_is_kept():
    """And there is nothing to check."""
    for full in (False, True):
        policy = make(reference=False, full=full)
        assert policy.reference is None
        policy.assert_starts_at_reference(PAIRS)


@pytest.mark.parametrize("targets", ["all-linear", None])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "phi3", "opt"])
def test_lora_layers_adapts_exactly_the_top_layers(family, targets):
    """Of three layers the top two are adapted, every linear map in them (or those named), and nothing else."""
    base = build(family, torch.float32)
    names = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}.get(family, ["q_proj"])
    policy = make_policy(
        base, tiny.tokenizer(), SOURCE, lora=Lora(r=2, layers=2, target_modules=targets or names), reference=True
    )
    adapted = {name for name, module in policy.model.named_modules() if hasattr(module, "lora_A")}
    found = {int(re.search(r"\.(?:layers|h)\.(\d+)\.", name)[1]) for name in adapted}
    assert found == {1, 2}
    if targets is None:
        assert {name.split(".")[-1] for name in adapted} == set(names)
        assert len(adapted) == 2
    else:
        everywhere = make_policy(base, tiny.tokenizer(), SOURCE, lora=Lora(r=2), reference=False)
        whole = {name for name, module in everywhere.model.named_modules() if hasattr(module, "lora_A")}
        assert adapted == {name for name in whole if re.search(r"\.(?:layers|h)\.[12]\.", name)}
    torch.testing.assert_close(logps(policy.model, GROUPS), logps(base, GROUPS), rtol=0, atol=1e-5)


def test_experts_and_routers_of_lower_layers_are_not_adapted():
    """PEFT adapts them as parameters, beside the modules."""
    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    policy = make_policy(model, tiny.tokenizer(), SOURCE, lora=Lora(r=2, layers=1), reference=False)
    trained = [name for name, weight in policy.model.named_parameters() if weight.requires_grad]
    assert {int(re.search(r"layers\.(\d+)\.", name)[1]) for name in trained} == {2}


def test_more_layers_than_there_are_is_refused():
    """It says how many there are."""
    with pytest.raises(ModelError, match=r"lora.layers is 9 but the model has 2 layers; lower it"):
        make(layers=9)


@pytest.mark.parametrize("layers", [None, 1])
def test_modules_that_the_model_has_not_are_refused(layers):
    """It says which were asked for."""
    with pytest.raises(ModelError, match=r"lora.target_modules.*nothing_here"):
        make(layers=layers, target_modules=["nothing_here"])


# Saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lora", "merge"), [({}, False), ({"layers": 1}, True), ({"full": True}, False)])
def test_what_was_saved_is_what_was_trained(tiny_folder, tmp_path, lora, merge):
    """AutoModelForCausalLM reads the folder and gives the same log-probabilities; the policy goes on unchanged."""
    policy = make(find_model(str(tiny_folder)).model(), **lora)
    move(policy.model)
    expected = logps(policy.model)
    if merge:
        policy.source = replace(policy.source, adapter="another, merged already")
    policy.save(tmp_path / "out", "# card\n")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logps(loaded), expected, rtol=0, atol=1e-4)
    assert torch.equal(logps(policy.model), expected)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert ("adapter_config.json" in files) == (not merge and "full" not in lora)
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    assert {"tokenizer.json", "README.md"} <= files
    assert (tmp_path / "out" / "README.md").read_text() == "# card\n"


def test_a_folder_holds_one_kind_of_model(tiny_folder, tmp_path):
    """What an earlier run saved there, the other kind or on 4-bit weights, is gone; the base's folder is refused."""
    base = find_model(str(tiny_folder)).model()
    for kind in ({}, {"full": True}, {}):
        policy = make(base, **kind)
        move(policy.model)
        if (tmp_path / "adapter_config.json").is_file():
            (tmp_path / "quantization.json").write_text('{"load_in_4bit": true}')
        policy.save(tmp_path, WRITTEN)
        assert not (tmp_path / "quantization.json").exists()
        expected = logps(policy.model)
        torch.testing.assert_close(logps(find_model(str(tmp_path)).model()), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(logps(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, rtol=0, atol=1e-4)
    policy.source = Source("base", str(tmp_path), "")
    with pytest.raises(ModelError, match="holds the base of the adapter that is to be saved; give another folder"):
        policy.save(tmp_path, "")


def test_files_that_no_run_wrote_stay(tiny_folder, tmp_path):
    """The weights of a folder without distalign's card are the user's; other files are no weights of a model's."""
    policy = make(find_model(str(tiny_folder)).model())
    (tmp_path / "model_other.safetensors").write_text("mine")
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(ModelError, match=r"holds config\.json, which would be removed, .* give another folder"):
        policy.save(tmp_path, "")
    (tmp_path / "README.md").write_text(WRITTEN)
    policy.save(tmp_path, WRITTEN)
    assert (tmp_path / "model_other.safetensors").read_text() == "mine"
    assert not (tmp_path / "config.json").exists()


def test_a_base_that_changed_under_its_adapter_is_warned_of(tmp_path, caplog):
    """Wherever the adapter is loaded; not where the base is what it was."""
    place = tmp_path / "base"
    source = find_model(str(tiny.save(place)))
    make_policy(source.model(), source.tokenizer(), source, lora=Lora(r=4), reference=False).save(tmp_path / "a", "")
    adapter = find_model(str(tmp_path / "a"))
    adapter.model()
    assert "has changed since" not in caplog.text
    other = tiny.model()
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    other.save_pretrained(place)
    adapter.model()
    assert f"its base {place} has changed since the adapter was saved" in caplog.text


def test_the_card_tells_what_was_done_and_has_metadata_that_the_hub_reads(tmp_path, monkeypatch):
    """A YAML block at the start; a folder is no hub id, even when its path looks like one."""

    def card(base, **more):
        return model_card(
            base_model=base,
            name="pmle",
            method=PMLE(gamma=0.25, beta=0.0),
            data={"train": 7},
            training={"learning_rate": 3e-4},
            results={"eval_loss": 0.5},
            **more,
        )

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    metadata, body = card("owner/name").removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(metadata) == {
        "library_name": "transformers",
        "base_model": "owner/name",
        "tags": ["distalign", "preference-learning", "pmle"],
    }
    assert "gamma: 0.25" in body
    assert "learning_rate: 0.0003" in body
    assert "eval_loss: 0.5" in body
    assert "2506.01523" in body
    assert "base_model" not in card("runs/model")
    metadata = card("m", tags="warm", dataset_name=["a/b", "c"]).removeprefix("---\n").split("\n---\n")[0]
    assert yaml.safe_load(metadata)["datasets"] == ["a/b", "c"]
    assert yaml.safe_load(metadata)["tags"][-1] == "warm"


def test_a_peft_model_given_by_hand_is_a_policy():
    """`Policy` takes any PEFT model; copying it copies nothing that is shared by mistake."""
    model = get_peft_model(tiny.model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    policy = Policy(model, tiny.tokenizer(), SOURCE)
    assert isinstance(copy.deepcopy(policy.model), PeftModel)
    policy.assert_starts_at_reference(PAIRS)
