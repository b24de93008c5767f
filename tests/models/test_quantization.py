"""4-bit weights below an adapter: trained, saved, read again, gone on with, merged; refused where they cannot be."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
import yaml
from acting import exit_code_elsewhere
from peft import LoraConfig, get_peft_model
from refusal import refused as is_refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from distalign import cli
from distalign.engine import Group, check, score
from distalign.evaluation.setup import load_evaluation, load_setup
from distalign.experiments.merge import _divergence, find_adapter, merge
from distalign.experiments.recipe import load_recipe
from distalign.experiments.train import train
from distalign.methods import PMLE, RKL
from distalign.models.load import ModelError, find_model, weights_digest
from distalign.models.policy import Lora, make_policy
from distalign.models.quantized import NOTE, is_quantized, read_note
from distalign.rewards import RewardError, RewardTraining, load_reward
from distalign.settings import RecipeError
from distalign.training.config import AlignmentConfig
from distalign.training.rollout_settings import TrainingError
from distalign.training.run_folder import locked
from distalign.training.trainer import AlignmentTrainer

installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed; `make install` installs it",
)
PAIRS = tiny.encoded_pairs(12)
GROUPS = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in PAIRS]
LAYER = "model.layers.1.mlp.up_proj.weight"


def adapter() -> LoraConfig:
    """A new one each time: PEFT writes the base's name into it."""
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def four_bit() -> BitsAndBytesConfig:
    """As TRL's users write it."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose layers are wider than a block of 64 weights."""
    return tiny.save(tmp_path_factory.mktemp("model") / "model", hidden_size=64, intermediate_size=128)


def settings(folder, place, **more):
    """A recipe of 3 steps on that model, in 4 bits."""
    raw = yaml.safe_load(tiny.recipe_text(place, model=str(folder), lora={"r": 4, "alpha": 8}, early_stopping=False))
    raw["methods"] = {"pmle": {"gamma": 0.5, "beta": 0.0}, "rkl": {"gamma": 0.5, "beta": 0.1}}
    raw["training"] |= {"max_steps": 3, "learning_rate": 0.02}
    return {**raw, "reward": {"train": True}, "quantization": "4bit", **more}


def logps(model, groups=GROUPS):
    """ln π of the responses, in nats."""
    with torch.no_grad():
        return score(model.eval(), groups).logps


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """A run of PMLE and one of RKL with a trained reward: (folder of the run, the policy's log-probabilities)."""
    place, kept = tmp_path_factory.mktemp("runs"), {}
    if importlib.util.find_spec("bitsandbytes") is None:
        return kept
    real = AlignmentTrainer.save_policy
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pmle", "rkl"):
            found = []
            patch.setattr(
                AlignmentTrainer,
                "save_policy",
                lambda self, *args, found=found: (found.append(logps(self.policy.model)), real(self, *args)),
            )
            result = train(load_recipe(settings(folder, place)), name)
            kept[name] = result.folder, found[-1]
    return kept


# Trained, saved, read again -------------------------------------------------------------------------------------------


@installed
@pytest.mark.parametrize("name", ["pmle", "rkl"])
def test_the_reloaded_adapter_is_the_trained_one(runs, folder, name):
    """Its folder is enough: the base in 4 bits again, the adapter on top, to 1e-4; it has moved by more."""
    place, trained = runs[name]
    source = find_model(str(place / "model"))
    model = source.model()
    assert is_quantized(model)
    assert any("lora_A" in key for key, _ in model.named_parameters())
    torch.testing.assert_close(logps(model), trained, atol=1e-4, rtol=0)
    assert (logps(find_model(str(folder)).in_4bit().model()) - trained).abs().max() > 1e-2


@installed
def test_the_folder_says_what_its_base_was(runs):
    """The adapter alone, its note, and a card by which others load it; a checkpoint too has the note."""
    place, trained = runs["pmle"]
    files = {path.name for path in (place / "model").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", NOTE, "README.md"} <= files
    assert not files & {"model.safetensors", "config.json"}
    (checkpoint,) = place.glob("checkpoint-*")
    assert read_note(checkpoint) == read_note(place / "model")
    card = (place / "model" / "README.md").read_text(encoding="utf-8")
    assert "- base_weights: 4 bits (nf4)" in card
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(block.replace("path/to/this/folder", str(place / "model")), names)
    # On some CPUs plain transformers multiplies in bfloat16.
    assert (logps(names["model"]) - trained).abs().max() < 0.5


@installed
def test_evaluations_read_it_as_it_was_trained(runs, folder, tmp_path, caplog):
    """The reference as it is, with a warning, or in 4 bits; the keys of kept answers differ."""
    place, trained = runs["pmle"]
    tiny.write_pairs(tmp_path / "pairs.jsonl", 8)
    raw = {"name": "x", "model": str(folder), "pairs": str(tmp_path / "pairs.jsonl"), "max_new_tokens": 4}
    for quantization in (None, "4bit"):
        caplog.clear()
        evaluation = load_evaluation({**raw, "quantization": quantization}, policies=[f"p={place / 'model'}"])
        setup = load_setup(evaluation)
        assert ("distances between them count the rounding" in caplog.text) == (quantization is None)
        assert is_quantized(setup.base) == (quantization is not None)
        torch.testing.assert_close(logps(setup.policy("p")), trained, atol=1e-4, rtol=0)
    plain = find_model(str(folder))
    assert weights_digest(plain) != weights_digest(plain.in_4bit())


@pytest.mark.slow
@installed
def test_a_run_goes_on_as_if_it_had_not_stopped(folder, tmp_path, monkeypatch):
    """Lost after a checkpoint: --resume gives the adapter of the run that was never stopped."""
    real = AlignmentTrainer.training_step

    def failing(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise RuntimeError("lost")
        return real(self, *args, **kwargs)

    training = {**settings(folder, tmp_path)["training"], "save_strategy": "steps", "save_steps": 1}
    recipes = [
        load_recipe(settings(folder, tmp_path, name=name, training=training), method="rkl") for name in ("cut", "whole")
    ]
    whole = train(recipes[1])
    monkeypatch.setattr(AlignmentTrainer, "training_step", failing)
    with pytest.raises(RuntimeError, match="lost"):
        train(recipes[0])
    monkeypatch.setattr(AlignmentTrainer, "training_step", real)
    again = train(recipes[0], resume=True)
    one, other = (load_file(result.model / "adapter_model.safetensors") for result in (whole, again))
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(Exception, match="the run to go on with had quantization 4bit, the recipe has None"):
        train(recipes[0].model_copy(update={"quantization": None}), resume=True)


# The engine -----------------------------------------------------------------------------------------------------------


@installed
def test_values_and_gradients_are_those_of_the_weights_written_out(folder):
    """Before and after passes without gradient, which on some CPUs would change both for good."""
    source = find_model(str(folder)).in_4bit()
    policies = []
    for base in (source.model(), source.model().dequantize()):
        torch.manual_seed(0)
        policies.append(make_policy(base, tiny.tokenizer(), source, lora=Lora(r=4), reference=True))
    with torch.no_grad():
        for policy in policies:
            for name, weight in policy.model.named_parameters():
                if "lora_B" in name:
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    assert check(policies[0].model).path == "shared"
    for _ in range(2):
        found = []
        for policy in policies:
            scores = score(policy.model.train(), GROUPS, reference=policy.reference, entropy=True)
            policy.model.zero_grad()
            (scores.logps.mean() + scores.step_kl.mean() + scores.step_entropy.mean()).backward()
            gradients = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
            found.append((scores.logps.detach(), scores.reference_logps, torch.cat(gradients)))
            logps(policy.model)
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@installed
def test_numbers_that_are_not_finite_are_found_in_4_bits(folder, tmp_path):
    """They are in the scales of their blocks."""
    shutil.copytree(folder, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights[LAYER][3, 5] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"the tensor {LAYER} holds NaN or infinite numbers"):
        find_model(str(tmp_path / "model")).in_4bit().model()


# In Python ------------------------------------------------------------------------------------------------------------


def trainer(model, place, method=None, **more):
    """Three steps on pairs as ids."""
    more = {"peft_config": adapter(), "processing_class": tiny.tokenizer(), **more}
    args = {"max_steps": 3, "use_cpu": True, "token_budget": 512, "learning_rate": 0.02, "max_completion_length": 5}
    args |= {"per_device_train_batch_size": 4, **more.pop("args", {})}
    return AlignmentTrainer(model, method or PMLE(0.5, 0.0), AlignmentConfig(str(place), **args), PAIRS, **more)


def loaded(folder):
    """The model as a user loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bit(), dtype=torch.float32)


@installed
@pytest.mark.parametrize("door", ["name", "dict", "object", "peft", "prequantised"])
def test_every_door_of_the_trainer(folder, tmp_path, door):
    """By name with quantization_config (also as arguments), a model, a PeftModel, files that are in 4 bits already."""
    more: dict = {"peft_config": adapter()}
    model = str(folder)
    if door in ("name", "dict"):
        config = four_bit() if door == "name" else {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
        more["args"] = {"model_init_kwargs": {"quantization_config": config}}
    elif door == "prequantised":
        model = str(tmp_path / "model")
        loaded(folder).save_pretrained(model)
    else:
        model = loaded(folder)
        if door == "peft":
            model, more = get_peft_model(model, adapter()), {"peft_config": None}
    made = trainer(model, tmp_path / "run", **more)
    made.train()
    made.save_model()
    again = find_model(str(tmp_path / "run")).model()
    torch.testing.assert_close(logps(again), logps(made.policy.model), atol=1e-4, rtol=0)
    assert is_quantized(again)


@installed
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_again_gives_the_same(folder, tmp_path, recompute):
    """The losses and the adapter."""
    found = []
    for value in ("none", recompute):
        made = trainer(loaded(folder), tmp_path / value, args={"recompute": value})
        made.train()
        found.append(logps(made.policy.model))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


@installed
@pytest.mark.parametrize("backbone", ["frozen", "lora"])
def test_a_reward_is_trained_on_the_same_weights(folder, tmp_path, backbone):
    """γ ln π₀ of the model in 4 bits, and a correction; it is read again beside the same."""
    reward = RewardTraining(gamma=0.5, backbone=backbone, **({"epochs": 1} if backbone == "lora" else {}))
    made = trainer(loaded(folder), tmp_path / "run", RKL(0.5, 0.1), reward_funcs=reward, eval_dataset=PAIRS[:4])
    made.train()
    again = trainer(
        loaded(folder), tmp_path / "again", RKL(0.5, 0.1), reward_funcs=str(tmp_path / "run" / "reward")
    ).rollout.reward
    torch.testing.assert_close(again.values(GROUPS), made.rollout.reward.values(GROUPS), atol=1e-4, rtol=0)
    with pytest.raises(RewardError, match=r"it was trained on 4-bit weights of .*set quantization: 4bit"):
        load_reward(tmp_path / "run" / "reward", base=find_model(str(folder)).model(), tokenizer=tiny.tokenizer())


@installed
def test_a_model_that_has_been_run_is_refused_where_that_changed_it(folder, tmp_path):
    """A pass without gradient, on a CPU on which bitsandbytes then packs its weights anew."""
    model = loaded(folder).eval()
    with torch.no_grad():
        model(torch.tensor([[2, 4, 9]]))
    packed = any(
        getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False) for weight in model.parameters()
    )
    if not packed:
        pytest.skip("this CPU has no AVX512-BF16")
    with pytest.raises(ModelError, match="load it again, and pass it before you run it"):
        trainer(model, tmp_path)


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["4-bit", 4, True, "8bit"])
def test_another_quantisation_is_refused(folder, tmp_path, value):
    """With the one that there is; so is another name of the setting."""
    with pytest.raises(RecipeError, match=f"quantization is {value!r}; input should be '4bit'"):
        load_recipe(settings(folder, tmp_path, quantization=value))
    with pytest.raises(RecipeError, match='no setting "quantisation"; did you mean "quantization"'):
        load_recipe(settings(folder, tmp_path, quantisation="4bit"))


@installed
def test_a_recipe_without_an_adapter_is_refused(folder, tmp_path, monkeypatch):
    """Before weights are loaded."""
    monkeypatch.setattr("distalign.experiments.setup._load", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(ModelError, match=r"quantised weights cannot be trained.*lora: true"):
        train(load_recipe(settings(folder, tmp_path, lora=False)), "pmle")


def test_a_reward_that_cannot_be_trained_in_4_bits_is_refused(folder, tmp_path):
    """All its weights, or weights of its own."""
    for reward in ({"backbone": "full"}, {"init": "scratch"}):
        with pytest.raises(RecipeError, match=f"reward.train: {next(iter(reward))}.*in 4 bits"):
            load_recipe(settings(folder, tmp_path, reward={"train": reward}))


def test_without_the_package_nothing_is_loaded(folder, tmp_path, monkeypatch):
    """The command that installs it is named, in a recipe, in an evaluation, and in Python."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found(name) if name != "bitsandbytes" else None
    )
    monkeypatch.setattr("distalign.models.load.load_verified", lambda *_, **__: pytest.fail("weights are loaded"))
    told = re.escape("pip install 'distalign[quantization]'")
    with pytest.raises(ModelError, match=told):
        train(load_recipe(settings(folder, tmp_path)), "pmle")
    assert not (tmp_path / "runs" / "tiny" / "train").exists()
    with pytest.raises(ModelError, match=told):
        find_model(str(folder)).in_4bit()
    saved = tmp_path / "adapter"
    get_peft_model(tiny.model(hidden_size=64, intermediate_size=128), adapter()).save_pretrained(saved)
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(folder)}))
    (saved / NOTE).write_text(json.dumps({"load_in_4bit": True}))
    tiny.write_pairs(tmp_path / "pairs.jsonl", 8)
    raw = {"name": "x", "model": str(folder), "pairs": str(tmp_path / "pairs.jsonl")}
    with pytest.raises(ModelError, match=told):
        load_setup(load_evaluation(raw, policies=[f"p={saved}"]))


@installed
def test_python_refuses_what_a_recipe_does(folder, tmp_path, monkeypatch):
    """Before weights are loaded, where they are given by name."""
    config = {"model_init_kwargs": {"quantization_config": four_bit()}}
    with pytest.raises(ModelError, match="cannot be trained; pass peft_config"):
        trainer(loaded(folder), tmp_path, peft_config=None)
    monkeypatch.setattr("distalign.models.load.load_verified", lambda *_, **__: pytest.fail("weights are loaded"))
    with pytest.raises(ModelError, match="train an adapter on them"):
        trainer(str(folder), tmp_path, peft_config=None, args=config)
    reward = RewardTraining(gamma=0.5, backbone="full")
    with pytest.raises(RewardError, match="backbone: full"):
        trainer(str(folder), tmp_path, RKL(0.5, 0.1), reward_funcs=reward, eval_dataset=PAIRS[:4], args=config)
    with pytest.raises(TrainingError, match="quantization_config is not of 4 bits"):
        AlignmentConfig(str(tmp_path), model_init_kwargs={"quantization_config": {"load_in_8bit": True}})


@installed
def test_an_adapter_on_4_bits_is_not_trained_through(runs, folder, tmp_path):
    """Nor is any adapter merged into 4 bits: the message names the command that makes a model of it."""
    trained = str(runs["pmle"][0] / "model")
    for more in ({"quantization": None}, {"quantization": "4bit"}):
        with pytest.raises(ModelError, match=f"distalign merge {trained}"):
            train(load_recipe(settings(trained, tmp_path, **more)), "pmle")
    (tmp_path / NOTE).write_text("{")
    with pytest.raises(ModelError, match=f"its {NOTE} cannot be read"):
        read_note(tmp_path)


# Merged ---------------------------------------------------------------------------------------------------------------


@installed
def test_merged_as_trained_it_is_what_was_trained(runs, tmp_path):
    """The 4-bit weights written out, and the adapter: the same log-probabilities, as any other model."""
    place, trained = runs["pmle"]
    merged = merge(place, tmp_path / "merged")
    assert merged.dtype == "float32"
    assert abs(merged.kl.mean) < 1e-5
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert f"KL(4-bit ‖ merged) is {merged.kl.mean:.3g}" in card
    assert "library_name: transformers" in card
    assert "BitsAndBytesConfig" not in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not is_quantized(model)
    torch.testing.assert_close(logps(model), trained, atol=1e-3, rtol=0)
    assert not hasattr(model.config, "quantization_config")


@installed
def test_an_adapter_on_the_base_s_own_weights_is_another_model(runs):
    """Merged into those it is W + s B A, and its distance from what was trained is seen."""
    place, _ = runs["rkl"]
    source = find_adapter(place)
    other = replace(source, quantization=None).model()
    assert _divergence(source, source.tokenizer(), other, "float32").mean > 1e-3


@installed
def test_a_merged_model_samples_as_the_adapter_did(runs, tmp_path):
    """With the temperature and the end tokens that it was trained with."""
    place, _ = runs["rkl"]
    merged = merge(place, tmp_path / "merged", check=False)
    assert merged.kl is None
    own, kept = (json.loads((one / "generation_config.json").read_text()) for one in (place / "model", merged.folder))
    assert {key: kept[key] for key in ("temperature", "top_k", "eos_token_id")} == {
        key: own[key] for key in ("temperature", "top_k", "eos_token_id")
    }


def command(monkeypatch, capsys, *words):
    """The command line, in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr("sys.argv", ["distalign", "merge", *map(str, words)])
    level = logging.getLogger("distalign").level
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    logging.getLogger("distalign").setLevel(level)
    return code, *capsys.readouterr()


def test_the_command_merges_an_ordinary_adapter(folder, tmp_path, monkeypatch, capsys):
    """With its dtype and the command for GGUF; it refuses a folder that is there, and what is no adapter."""
    result = train(load_recipe(settings(folder, tmp_path, quantization=None)), "pmle")
    trained = logps(find_model(str(result.model)).model())
    converter = tmp_path / "bin" / "convert_hf_to_gguf.py"
    converter.parent.mkdir()
    converter.touch(0o755)
    monkeypatch.setenv("PATH", str(converter.parent))
    code, out, _ = command(monkeypatch, capsys, result.folder)
    merged = result.folder / "merged"
    assert code == 0
    assert out.splitlines() == [
        f"model: {merged} (float32)",
        f"as GGUF: convert_hf_to_gguf.py {merged} --outfile {merged}/model.gguf --outtype auto",
    ]
    torch.testing.assert_close(logps(find_model(str(merged)).model()), trained, atol=1e-4, rtol=0)
    is_refused(command(monkeypatch, capsys, result.folder), "merged: is there already", "--overwrite")
    code, out, _ = command(monkeypatch, capsys, result.model, "--out", merged, "--overwrite", "--dtype", "bfloat16")
    assert out.startswith(f"model: {merged} (bfloat16)")
    assert load_file(merged / "model.safetensors")[LAYER].dtype == torch.bfloat16
    for needed in (result.folder, result.model, tmp_path, folder):
        # The run, the adapter, what holds both, the base.
        is_refused(command(monkeypatch, capsys, result.folder, "--out", needed, "--overwrite"), "something else")
        assert (result.model / "adapter_model.safetensors").is_file()
    is_refused(command(monkeypatch, capsys, folder), "holds a whole model")
    is_refused(command(monkeypatch, capsys, tmp_path), "holds no adapter", "runs/NAME/train/METHOD")
    is_refused(command(monkeypatch, capsys, result.folder, "--dtype", "int8"), "--dtype int8: take one of")
    assert train(load_recipe(settings(folder, tmp_path, quantization=None)), "pmle", overwrite=True)
    assert not merged.exists()


def test_one_process_merges_into_a_folder(folder, tmp_path):
    """A second one is refused at once and changes nothing, as is one while the run is trained; others go on beside."""
    result = train(load_recipe(settings(folder, tmp_path, quantization=None)), "pmle")
    scratch = result.folder / ".merged.new"
    scratch.mkdir()
    with locked(result.folder):
        for run, out in ((result.folder, None), (result.model, result.folder / "merged")):
            assert exit_code_elsewhere(lambda run=run, out=out: merge(run, out)) == 2
    assert scratch.is_dir()
    with locked(tmp_path, ".other.lock"):
        assert exit_code_elsewhere(lambda: merge(result.folder, tmp_path / "other")) == 2
        assert exit_code_elsewhere(lambda: merge(result.folder, tmp_path / "another")) == 0
    assert not (tmp_path / "other").exists()
    assert (tmp_path / "another" / "model.safetensors").is_file()
    merged = merge(result.folder).folder
    assert merged == result.folder / "merged"
    assert not scratch.exists()
    (merged / "model.gguf").write_text("made from it")
    merge(result.folder, overwrite=True)
    assert (merged / "model.gguf").is_file(), "files beside a merged model are the user's"


def test_without_bitsandbytes_an_adapter_of_4bit_weights_is_not_merged(folder, tmp_path, monkeypatch):
    """The weights that it was trained on cannot be read."""
    result = train(load_recipe(settings(folder, tmp_path, quantization=None)), "pmle")
    (result.model / NOTE).write_text(json.dumps({"load_in_4bit": True}))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found(name) if name != "bitsandbytes" else None
    )
    with pytest.raises(ModelError, match="4-bit weights need bitsandbytes"):
        merge(result.folder)
