"""Scores, samples, evaluation, training and the memory estimate on a GPU: what a CPU gives in float64.

All of it is skipped where there is no GPU. With DISTALIGN_TEST_DEVICE=cpu in the environment, everything but the
kernels of FlexAttention and the memory of a GPU runs on a CPU, which tests the tests.

In float64, gpt2 and opt are float64 throughout. The other families take norms or rotations in float32, where two
devices round differently: there float64 agrees to float32's rounding alone.
"""

from __future__ import annotations

import copy
import os
import random
from contextlib import nullcontext

# Matrix products that are bit for bit the same each time, which one test asks for; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import acting
import pytest
import tiny
import torch
from engine_models import GROUPS, build, direct_logits, direct_token_logps, largest_difference
from test_trainer import direct_loss, trainer

from distalign.data import EncodedPair
from distalign.engine import Group, check, flex, score, selfcheck
from distalign.engine.memory import set_recompute
from distalign.methods import METHODS
from distalign.models.load import Source
from distalign.models.policy import Lora, make_policy
from distalign.rollout.sample import sample
from distalign.rollout.trial import way_of
from distalign.training.config import AlignmentConfig
from distalign.training.trainer import AlignmentTrainer

DEVICE = torch.device(os.environ.get("DISTALIGN_TEST_DEVICE", "cuda"))
CPU = torch.device("cpu")
PROMPTS = [[5, 9, 17, 33, 40, 8, 71], [7, 8], [21, 22, 23, 24, 30, 31, 32, 33, 34], [61]]
SETTINGS = {"n": 3, "max_new_tokens": 6, "end_id": 12, "seed": 3, "rows": 5}

pytestmark = [
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(),
        reason="needs a GPU with CUDA; DISTALIGN_TEST_DEVICE=cpu runs what a CPU can",
    ),
    # What compilers of kernels warn of is not ours, and as an error it would be taken for a broken kernel.
    pytest.mark.filterwarnings("default"),
]
gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs kernels or memory of a GPU")

NO_DROPOUT = {"gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}, "opt": {"dropout": 0.0}}
SHARED = ["gpt2", "opt", "llama", "qwen2_window", "mistral_window", "gemma2", "gemma3", "gpt_oss", "deepseek_v3"]
PADDED = ["falcon", "bloom"]
FLOAT64_THROUGHOUT = {"gpt2", "opt"}
TIED = {"gpt2", "opt", "gemma2", "gemma3", "tied"}


def tolerance(family, dtype):
    """What rounding explains, relative to the largest value or gradient."""
    if dtype == torch.float32:
        return 1e-4
    return 1e-9 if family in FLOAT64_THROUGHOUT else 1e-5


def two(family, dtype=torch.float64, **settings):
    """The same random model on the device and, in float64, on the CPU."""
    kind = "llama" if family == "tied" else family
    settings = {**NO_DROPOUT.get(kind, {}), **({"tie_word_embeddings": True} if family == "tied" else {}), **settings}
    model = build(kind, dtype, **settings)
    return copy.deepcopy(model).to(DEVICE), model.double()


def moved(model):
    """Another model like this one, its weights moved a little: a reference."""
    other = copy.deepcopy(model)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_((0.03 * torch.randn(parameter.shape, dtype=torch.float64)).to(parameter))
    return other


def results(model, reference=None, groups=GROUPS):
    """All scores and the gradients of a weighted sum of them, as float64 on the CPU."""
    model.zero_grad(set_to_none=True)
    scores = score(model, groups, reference=reference, entropy=True)
    values = [scores.token_logps, scores.step_entropy]
    weights = torch.linspace(-1, 1, len(scores.mask), device=scores.mask.device).double()
    loss = scores.logps @ weights - 3 * scores.step_entropy.sum()
    if reference is not None:
        values += [scores.step_kl, scores.reference_token_logps]
        loss = loss + 2 * scores.step_kl.sum()
    loss.backward()
    found = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    assert scores.token_logps.device.type == next(model.parameters()).device.type
    return [value.detach().cpu().double() for value in values], found


def assert_same(found, expected, limit):
    """Values relative to the largest, gradients relative to the largest."""
    for a, b in zip(found[0], expected[0], strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < limit
    assert found[1].keys() == expected[1].keys()
    assert largest_difference(found[1], expected[1]) < limit


# Scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("family", [*SHARED, "tied", *PADDED])
def test_scores_and_gradients_are_those_of_a_cpu(family, dtype):
    """Log-probabilities, entropy, KL to a reference and every gradient, in several groups of several responses."""
    model, truth = two(family, dtype)
    ours = results(model, moved(model))
    assert check(model).path == ("padded" if family in PADDED else "shared")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied or family not in TIED
    # The reference's weights are those of the device, rounded as there.
    assert_same(ours, results(truth, moved(model).to(CPU).double()), tolerance(family, dtype))
    with torch.no_grad():
        direct, alone = torch.cat(direct_token_logps(truth)).double(), score(model, GROUPS)
    for tokens in (ours[0][0], alone.token_logps.cpu().double()):
        gap = tokens[alone.mask.cpu()] - direct
        assert float(gap.abs().max() / direct.abs().max()) < tolerance(family, dtype)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "tied"])
def test_what_is_computed_again_has_the_same_gradients(family, recompute):
    """Activation checkpointing changes no number."""
    model, truth = two(family)
    set_recompute(model, recompute)
    ours = results(model.train(), moved(model).eval())
    assert_same(ours, results(truth.train(), moved(truth).eval()), tolerance(family, torch.float64))


# FlexAttention --------------------------------------------------------------------------------------------------------

LONG = {"head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.15}
FLEX = {"llama": {}, "mistral_window": {"sliding_window": 50}, "gemma2": {"sliding_window": 50}, "gpt_oss": {}}


def rows(*shapes):
    """Groups of random ids."""
    draw, ids = random.Random(2).choices, range(3, 101)
    return [Group(draw(ids, k=prompt), [draw(ids, k=length) for length in lengths]) for prompt, lengths in shapes]


GROUPS_LONG = rows((140, (60, 1, 38)), (3, (90,)))


@pytest.fixture
def attended(monkeypatch):
    """How often FlexAttention was called."""
    calls, attend = [], flex.attend
    monkeypatch.setattr(flex, "attend", lambda *args, **settings: (calls.append(1), attend(*args, **settings))[1])
    return calls


def distances(found, expected):
    """Of values the mean distance in nats; of all gradients together the norm of the difference, relative."""
    values = [float((a - b).abs().mean()) for a, b in zip(found[0], expected[0], strict=True)]
    a, b = (torch.cat([side[1][name].flatten() for name in expected[1]]) for side in (found, expected))
    return [*values, float((a - b).norm() / b.norm())]


@gpu
@pytest.mark.parametrize("name", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("family", FLEX)
def test_flex_attention_in_models(family, name, attended):
    """The kernels serve long rows, and are as near to float64 as the attention by segments is."""
    model = build(family, torch.bfloat16 if name == "bfloat16" else torch.float32, **LONG, **FLEX[family]).to(DEVICE)
    truth = results(copy.deepcopy(model).to(CPU).double(), groups=GROUPS_LONG)
    context = torch.autocast(DEVICE.type, torch.bfloat16) if name == "autocast" else nullcontext()
    with context:
        assert check(model).by_flex
        attended.clear()
        ours = results(model, groups=GROUPS_LONG)
        assert len(attended) == model.config.num_hidden_layers
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flex, "serves", lambda call: False)
            segments = results(model, groups=GROUPS_LONG)
        assert len(attended) == model.config.num_hidden_layers
    rounding = 2e-5 if name == "float32" else 3e-2
    print(family, name, *(f"{d:.1e}" for each in (ours, segments) for d in distances(each, truth)))
    for near, far in zip(distances(ours, truth), distances(segments, truth), strict=True):
        assert near < 2 * far + rounding
    assert distances(segments, truth)[-1] < (1e-3 if name == "float32" else 0.3)


@gpu
@pytest.mark.parametrize("family", FLEX)
def test_flex_attention_is_kept_by_selective_checkpointing(family):
    """The backward pass computes the cheap parts again, with the same gradients."""
    model = build(family, torch.float32, **LONG, **FLEX[family]).to(DEVICE).train()
    plain = results(model, groups=GROUPS_LONG)
    set_recompute(model, "selective")
    assert_same(results(model, groups=GROUPS_LONG), plain, 1e-4)


@gpu
@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        (torch.bfloat16, {"heads": 9, "kv_heads": 3, "dim": 64, "value_dim": 64}),
        (torch.bfloat16, {"dim": 128, "value_dim": 128, "window": 17}),
        (torch.float16, {"dim": 192, "value_dim": 128, "scaling": 0.1}),
        (torch.float32, {"dim": 64, "value_dim": 64, "window": 17, "softcap": 2.0, "scaling": 0.2, "sinks": True}),
        (torch.bfloat16, {"dim": 256, "value_dim": 256, "softcap": 2.0}),
    ],
    ids=["smollm2", "window", "deepseek-half", "everything", "gemma2"],
)
def test_flex_attention_in_layers(dtype, change):
    """Heads of the sizes that there are: values and gradients within the engine's own tolerance of the segments."""
    tokens = sum(sum(segment.lengths) for segment in selfcheck._FLEX_SAMPLE)
    call = flex.Call(DEVICE, dtype, tokens, 8, 2, 64, 64, None, None, 0.0, None, False)._replace(**change)
    assert flex.serves(call)
    found = selfcheck._flex_difference(call)
    print(f"{found:.1e}")
    assert found < selfcheck._FLEX_TOLERANCES[dtype]


@gpu
def test_flex_attention_is_compiled_once_for_all_lengths(attended):
    """Rows of other lengths and layouts compile nothing, nor does another window."""
    both = [build(family, torch.float32, **LONG, **FLEX[family]).to(DEVICE) for family in ("llama", "mistral_window")]
    for model in both:
        results(model, groups=GROUPS_LONG)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before > 0
    attended.clear()
    for model in both:
        for shape in ((129, (1,)), (256, (1, 128)), (300, (17, 40, 2)), (40, (33,) * 8), (400, (100, 90))):
            results(model, groups=rows(shape))
    assert len(attended) == 2 * 5 * 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


# Samples --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2_window", "mistral_window", "gemma3", "gpt_oss", "falcon"])
def test_greedy_tokens_are_those_of_a_cpu(family):
    """Prompts of unequal length, several responses, at least some tokens before an end."""
    model, truth = two(family)
    settings = {"n": 2, "max_new_tokens": 8, "min_new_tokens": 3, "temperature": 0.0, "end_id": 12, "seed": 0}
    found = sample(model, PROMPTS, rows=5, **settings)
    assert found == sample(truth, PROMPTS, **settings)
    assert way_of(model, [], 20).cache == way_of(truth, [], 20).cache == ("copied" if family == "falcon" else "shared")


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral_window", "gemma3", "gpt_oss"])
def test_one_cache_for_all_responses_changes_no_token(family, monkeypatch):
    """A prompt's cache shared, and copied for every response: the same draws."""
    model, _ = two(family)
    way = way_of(model, [], 20)
    assert way.cache == "shared"
    responses = sample(model, PROMPTS, **SETTINGS)
    monkeypatch.setattr("distalign.rollout.sample.way_of", lambda *_: way._replace(cache="copied"))
    assert sample(model, PROMPTS, **SETTINGS) == responses
    assert sample(model, PROMPTS, **{**SETTINGS, "seed": 4}) != responses


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_of_samples(temperature):
    """30,000 first tokens over a vocabulary of 7: chi-square."""
    model, truth = two("llama", torch.float32, vocab_size=7, initializer_range=0.1)
    settings = {"n": 30_000, "rows": 30_000, "max_new_tokens": 1, "end_id": 6, "seed": 1}
    [responses] = sample(model, [[3, 4, 5]], temperature=temperature, **settings)
    counts = torch.bincount(torch.tensor(responses)[:, 0], minlength=7).double()
    with torch.no_grad():
        [logits] = direct_logits(truth, [Group([3, 4, 5], [[1]])])
    expected = 30_000 * (logits[0] / temperature).softmax(-1)
    assert float(expected.min()) > 20

    half = ((counts - expected) ** 2 / expected).sum() / 2
    assert float(torch.special.gammaincc(torch.tensor(3.0).double(), half)) > 1e-4


# Training -------------------------------------------------------------------------------------------------------------

RUNS = {"dpo": METHODS["dpo"](gamma=0.5), "pmle": METHODS["pmle"](gamma=0.5, beta=0.0), "rkl": METHODS["rkl"](0.5, 0.3)}


def run(folder, name, *, lora=None, **settings):
    """A trainer of six steps on the device."""
    settings |= {"max_steps": 6, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 3}
    settings |= {"use_cpu": DEVICE.type == "cpu", "lr_scheduler_type": "linear", "learning_rate": 3e-3}
    method = RUNS[name]
    return (acting.trainer if method.needs.samples else trainer)(folder, method, lora=lora, **settings)


@pytest.mark.parametrize("kind", ["full", "lora", "bfloat16"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_and_its_continuation(name, kind, tmp_path, monkeypatch):
    """The first loss is the CPU's in float64; weights move; layers compute in the dtype asked for; a run can go on."""
    on_cpu = tiny.model
    monkeypatch.setattr(tiny, "model", lambda *args, **settings: on_cpu(*args, **settings).to(DEVICE))
    settings = {"full": {}, "lora": {"lora": Lora(r=4)}, "bfloat16": {"bf16": True}}[kind]
    # Noise of a gradient that should be zero is a whole step to Adam. A cumulative sum has no such algorithm.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = run(tmp_path / "whole", name, **settings)
        assert next(whole.model.parameters()).device.type == DEVICE.type
        start, dtypes = acting.parameters(whole).clone(), set()

        layer = next(module for name, module in whole.model.named_modules() if name.endswith("gate_proj"))
        hook = layer.register_forward_hook(lambda _, inputs, output: dtypes.add(layer.training and output.dtype))
        whole.train()
        hook.remove()
        again = run(tmp_path / "again", name, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    finally:
        torch.use_deterministic_algorithms(False)
    lines = [line for line in acting.metrics(tmp_path / "whole") if "loss" in line]
    assert len(lines) >= 6
    assert bool(torch.tensor([line["loss"] for line in lines]).isfinite().all())
    assert dtypes - {False} == {torch.bfloat16 if kind == "bfloat16" else torch.float32}
    assert check(whole.model).path == "shared"
    moved_by = (acting.parameters(whole) - start).abs()
    assert 1e-3 < float(moved_by.max()) < 0.1
    gap = float((acting.parameters(again) - acting.parameters(whole)).abs().max())
    print(f"{name} {kind}: continued and whole differ by {gap:.1e}")
    assert gap <= 1e-5
    if name != "rkl":
        policy = make_policy(on_cpu().double(), tiny.tokenizer(), Source("tiny", "", ""), reference=True)
        expected = float(direct_loss(RUNS[name], policy, tiny.encoded_pairs(8)).detach())
        assert lines[0]["loss"] == pytest.approx(expected, rel=0.05 if kind == "bfloat16" else 1e-4)


# Memory ---------------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize(("budget", "settings"), [(1024, {}), (8192, {}), (8192, {"bf16": True})])
def test_memory_is_what_was_estimated(budget, settings, tmp_path):
    """Two steps of two micro-batches of a Llama of 110 million parameters: at most 10 % too little, twice too much."""
    sizes = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 14, "num_attention_heads": 10}
    sizes |= {"num_key_value_heads": 5, "vocab_size": 32_000, "initializer_range": 0.02}
    with DEVICE:
        base = tiny.model(max_position_embeddings=1024, **sizes)
    policy = make_policy(base, tiny.tokenizer(), Source("tiny", "", ""), reference=False)
    del base
    batch = 2 * budget // 512
    pairs = [EncodedPair(*(row.prompt, *row.responses), None, "") for row in rows(*[(400, (56, 56))] * 2 * batch)]
    settings = {"per_device_train_batch_size": batch, "max_steps": 2, "save_strategy": "no", **settings}
    args = AlignmentConfig(output_dir=str(tmp_path), token_budget=budget, **settings)
    made = AlignmentTrainer(policy, METHODS["pmle"](0.5, 0.0), args, pairs)
    check(policy.model)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made.train()
    grown = torch.cuda.max_memory_allocated() - before
    memory, needs = made.memory, made.memory.needed(budget)
    print(
        f"estimated {needs / 1e9:.3f} GB, allocated {grown / 1e9:.3f}, tiles {memory.tiles(budget) / 1e9:.3f}; {memory}"
    )
    assert memory.tokens == budget
    assert 0.9 * grown < needs < 2 * grown
