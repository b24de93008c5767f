"""Mixed precision: what TrainingArguments asks for reaches the layers, wherever the engine runs them."""

from __future__ import annotations

import logging
import math

import acting
import pytest
import tiny
import torch
from test_trainer import trainer

from distalign.engine import Group, check, score
from distalign.methods import METHODS
from distalign.models.load import Source
from distalign.models.policy import make_policy
from distalign.training.config import AlignmentConfig
from distalign.training.trainer import AlignmentTrainer

METHODS_HERE = {
    "dpo": METHODS["dpo"](gamma=0.5),
    "pmle": METHODS["pmle"](gamma=0.5, beta=0.1),
    "rkl": METHODS["rkl"](0.5, 0.3),
}


@pytest.mark.parametrize("name", METHODS_HERE)
def test_layers_compute_in_bfloat16(name, tmp_path, caplog):
    """Sampling, references, evaluation and training; weights and gradients stay in float32, and no path is lost."""
    method = METHODS_HERE[name]
    settings = {"bf16": True, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    if method.needs.samples:
        made = acting.trainer(tmp_path, method, **settings | {"eval_strategy": "no"})
    else:
        made = trainer(tmp_path, method, held=tiny.encoded_pairs(4), **settings)
    reference = made.policy.reference
    models = [made.model, *([reference] if isinstance(reference, torch.nn.Module) else [])]
    seen = {}
    for number, model in enumerate(models):
        for layer in (module for name, module in model.named_modules() if name.endswith("gate_proj")):

            def note(module, _, output, number=number):
                seen.setdefault((number, module.training), set()).add(output.dtype)

            layer.register_forward_hook(note)
    with caplog.at_level(logging.INFO, "distalign"):
        made.train()
    assert "weights in float32, the head's products in float32, their sums in float32" in caplog.text
    assert {(0, True), (0, False)} <= set(seen)
    assert len(models) == 1 or (1, False) in seen
    assert all(dtypes == {torch.bfloat16} for dtypes in seen.values()), seen
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert not [r for r in caplog.records if "one sequence at a time" in r.message or "is copied" in r.message]


def test_a_trained_model_is_left_without_autocast(tmp_path):
    """After training it is an ordinary model in float32: its own logits, and the shared path."""
    made = trainer(tmp_path, METHODS_HERE["dpo"], bf16=True)
    made.train()
    model = made.model.eval()
    assert not {"forward", "_original_forward"} & set(vars(model))
    assert isinstance(model(torch.tensor([[5, 6]]), return_dict=False), tuple)
    group = Group([5, 6, 7], [[8, 9, 10], [11, 12]])
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 2:]
        scores = score(model, [group])
    assert check(model).path == "shared"
    expected = logits.double().log_softmax(-1)[range(3), [8, 9, 10]]
    torch.testing.assert_close(scores.token_logps[0].double(), expected, rtol=0, atol=1e-5)


def test_precisions_share_no_reference(tmp_path):
    """Before any step the policy is its reference in either precision, whoever scored the pairs before."""
    cache = {}
    for number, bf16 in enumerate([False, True, False]):
        settings = {"bf16": bf16, "reference_cache": cache, "held": tiny.encoded_pairs(6)}
        found = trainer(tmp_path / str(number), METHODS_HERE["dpo"], **settings).evaluate()
        assert found["eval_preference/median_logit"] == 0
        assert found["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_a_value_head_keeps_its_precision(tmp_path):
    """What it says is float32, whatever the layers compute in."""
    made = acting.trainer(tmp_path, METHODS["rkl"](0.5, 0.3, estimator="ppo"), bf16=True)
    assert made.score([Group([5, 6, 7], [[8, 9], [10, 11]])]).values.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device, a GPU with CUDA")
def test_a_reference_follows_its_policy(tmp_path):
    """A policy made on the CPU is trained on the GPU, beside its reference."""
    policy = make_policy(tiny.model(), tiny.tokenizer(), Source("tiny", "", ""), reference=True)
    made = trainer(tmp_path, METHODS_HERE["dpo"], policy=policy, use_cpu=False)
    made.train()
    assert next(policy.reference.parameters()).device.type == "cuda"


@pytest.mark.parametrize("switch", [{"optim": "adafactor"}, {"attn_implementation": "eager"}])
def test_what_transformers_switches_on_trains(switch, tmp_path):
    """docs/scaling.md: another optimizer, another attention of the model's own passes."""
    model = tiny.model()
    if "attn_implementation" in switch:
        model.set_attn_implementation(switch["attn_implementation"])
    policy = make_policy(model, tiny.tokenizer(), Source("tiny", "tiny", "made here"), reference=True)
    start = [p.detach().clone() for p in policy.model.parameters()]
    arguments = {"max_steps": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-2}
    args = AlignmentConfig(str(tmp_path), **arguments, **({} if "attn_implementation" in switch else switch))
    made = AlignmentTrainer(policy, METHODS_HERE["dpo"], args, tiny.encoded_pairs(8))
    made.train()
    assert any(not torch.equal(p, before) for p, before in zip(made.policy.model.parameters(), start, strict=True))
    assert check(made.policy.model).path == "shared"
