from __future__ import annotations

import pytest
import torch

from distalign.engine import lm_head as head_module
from distalign.engine.lm_head import Head, HiddenRows, LogitRows, score_rows, tile_shape

ROWS, HIDDEN, VOCABULARY = 13, 8, 37
SHAPES = {"one tile": (64, 64), "many tiles": (5, 7), "narrow tiles": (13, 1)}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "scaled": {"scale": 0.3},
    "all": {"bias": True, "softcap": 1.5, "scale": 0.7},
}


@pytest.fixture(params=SHAPES)
def tiles(request, monkeypatch):
    """Tiles much smaller than the problem, so that sums run over several."""
    monkeypatch.setattr(head_module, "tile_shape", lambda *_: SHAPES[request.param])


def inputs(dtype=torch.float64, bias=False, softcap=None, scale=1.0, seed=0):
    """Hidden rows, a head and its raw tensors."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, offset = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((ROWS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    )
    return hidden, weight, (offset if bias else None), {"softcap": softcap, "scale": scale}


def direct(hidden, weight, bias, softcap=None, scale=1.0, temperature=1.0):
    """The whole log-softmax, by definition."""
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return (z / temperature).log_softmax(-1)


TARGETS = torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("keep", [0, 500, 10**6])
@pytest.mark.usefixtures("tiles")
def test_logps_equal_log_softmax(kind, temperature, frozen, keep):
    """Values and gradients of ln p(y), whatever waits for the backward pass; a frozen head gets no gradient."""
    hidden, weight, bias, rest = inputs(**HEADS[kind])
    if frozen:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    leaves = [tensor for tensor in (hidden, weight, bias) if tensor is not None and tensor.requires_grad]
    upstream = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    expected = direct(hidden, weight, bias, temperature=temperature, **rest).gather(1, TARGETS[:, None])[:, 0]
    found = score_rows(HiddenRows(hidden, Head(weight, bias, **rest), temperature), TARGETS, keep=keep).logps
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("reference_kind", ["hidden", "logits"])
@pytest.mark.usefixtures("tiles")
def test_entropy_and_kl_equal_their_definitions(kind, reference_kind):
    """Values and gradients of ln p(y), entropy and KL together, against another head or given logits."""
    hidden, weight, bias, rest = inputs(**HEADS[kind])
    other, other_weight, other_bias, _ = inputs(bias=True, seed=9)
    log_p = direct(hidden, weight, bias, temperature=0.8, **rest)
    log_q = direct(other, other_weight, other_bias, temperature=0.8).detach()
    p = log_p.exp()
    pick = TARGETS[:, None]
    expected = [log_p.gather(1, pick)[:, 0], -(p * log_p).sum(1), (p * (log_p - log_q)).sum(1)]
    reference = (
        HiddenRows(other.detach(), Head(other_weight.detach(), other_bias.detach()), 0.8)
        if reference_kind == "hidden"
        else LogitRows(log_q * 0.8 + 5.0, 0.8)
    )
    out = score_rows(HiddenRows(hidden, Head(weight, bias, **rest), 0.8), TARGETS, entropy=True, reference=reference)
    found = [out.logps, out.entropy, out.kl]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(out.reference_logps, log_q.gather(1, pick)[:, 0], rtol=1e-12, atol=1e-12)
    assert not out.reference_logps.requires_grad
    leaves = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    weights = [torch.randn(ROWS, dtype=torch.float64) for _ in found]
    ours = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, found, strict=True)), leaves)
    theirs = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, expected, strict=True)), leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradients_by_finite_differences():
    """The written backward pass agrees with numerical differentiation."""
    hidden, weight, bias, rest = inputs(bias=True, softcap=2.0, scale=0.5)
    reference = LogitRows(torch.randn(ROWS, VOCABULARY, dtype=torch.float64))

    def values(h, w, b):
        out = score_rows(HiddenRows(h, Head(w, b, **rest)), TARGETS, entropy=True, reference=reference)
        return out.logps, out.entropy, out.kl

    assert torch.autograd.gradcheck(values, (hidden, weight, bias), fast_mode=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)],
)
@pytest.mark.usefixtures("tiles")
def test_dtypes(dtype, tolerance):
    """Half precision is accumulated in float32; gradients have the dtype of what they belong to."""
    hidden, weight, bias, _ = inputs(dtype, bias=True)
    out = score_rows(HiddenRows(hidden, Head(weight, bias)), TARGETS, entropy=True)
    log_p = direct(hidden.double(), weight.double(), bias.double())
    assert out.logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        out.logps.double(), log_p.gather(1, TARGETS[:, None])[:, 0], rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(out.entropy.double(), -(log_p.exp() * log_p).sum(1), rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(out.logps.sum() + out.entropy.sum(), [hidden, weight, bias])
    assert [grad.dtype for grad in grads] == [dtype] * 3


@pytest.mark.parametrize(("keep", "products"), [(0, 10), (8 * ROWS * 16, 8), (10**6, 5)])
def test_kept_tiles_spare_products(keep, products, monkeypatch):
    """Tiles that fit are not computed again, once: a second backward pass through the graph computes all of them."""
    monkeypatch.setattr(head_module, "tile_shape", lambda *_: (ROWS, 8))
    made = []
    tile = HiddenRows.tile
    monkeypatch.setattr(HiddenRows, "tile", lambda *arguments: made.append(1) or tile(*arguments))
    hidden, weight, _, _ = inputs()
    logps = score_rows(HiddenRows(hidden, Head(weight)), TARGETS, keep=keep).logps.sum()
    first = torch.autograd.grad(logps, [hidden, weight], retain_graph=True)
    assert len(made) == products
    second = torch.autograd.grad(logps, [hidden, weight])
    assert len(made) == products + 5
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def test_forbidden_tokens():
    """A bias of −∞ forbids a token: probability 0, a finite entropy and finite gradients."""
    hidden, weight, bias, _ = inputs(bias=True)
    with torch.no_grad():
        bias[:20] = -torch.inf
    targets = TARGETS.clamp(min=20)
    out = score_rows(HiddenRows(hidden, Head(weight, bias)), targets, entropy=True)
    expected = (hidden @ weight[20:].T + bias[20:]).log_softmax(-1)
    torch.testing.assert_close(out.entropy, -(expected.exp() * expected).sum(1))
    (grad,) = torch.autograd.grad(out.logps.sum() + out.entropy.sum(), [hidden])
    assert grad.isfinite().all()


def test_large_logits_do_not_overflow():
    """Logits of ±10⁴ give the limit, not an infinity."""
    hidden, weight, _, _ = inputs(torch.float32)
    out = score_rows(HiddenRows(hidden * 1e4, Head(weight)), TARGETS, entropy=True)
    assert out.logps.isfinite().all()
    assert (out.entropy >= -1e-2).all()


@pytest.mark.usefixtures("tiles")
def test_rows_of_a_table_of_logits_are_scored_tile_by_tile():
    """Without gradient: any rows, in any order, with tokens that cannot be, as by the definitions."""
    table, places = torch.randn(2 * ROWS, VOCABULARY, dtype=torch.float64), torch.randperm(2 * ROWS)[:ROWS]
    table[:, [0, 5]] = -torch.inf
    targets = TARGETS.clone().masked_fill_((TARGETS == 0) | (TARGETS == 5), 1)
    other, weight, _, _ = inputs(seed=9)
    log_p, log_q = (table[places] / 0.8).log_softmax(1), direct(other, weight, None, temperature=0.8)
    p, pick = log_p.exp(), targets[:, None]
    possible = log_p.isfinite()
    entropy = -torch.where(possible, p * log_p, 0).sum(1)
    kl = torch.where(possible, p * (log_p - log_q), 0).sum(1)
    for rows in (LogitRows(table, 0.8).chosen(places), LogitRows(table[places], 0.8)):
        with torch.no_grad():
            out = score_rows(rows, targets, entropy=True, reference=HiddenRows(other, Head(weight), 0.8))
        found, expected = [out.logps, out.entropy, out.kl], [log_p.gather(1, pick)[:, 0], entropy, kl]
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(out.reference_logps, log_q.gather(1, pick)[:, 0], rtol=1e-11, atol=1e-11)


def test_other_vocabulary_is_refused():
    """A reference with another vocabulary is an error that names both sizes."""
    hidden, weight, _, _ = inputs()
    with pytest.raises(ValueError, match="36 tokens, the policy's 37"):
        score_rows(HiddenRows(hidden, Head(weight)), TARGETS, reference=LogitRows(torch.zeros(ROWS, 36)))


@pytest.mark.parametrize("rows", [1, 7, 600, 5000])
def test_tiles_are_small(rows):
    """A tile holds about a million logits at most, however many rows there are."""
    block, width = tile_shape(rows, 150_000, torch.device("cpu"))
    assert 1 <= block <= 1024
    assert block * width <= 2**20
