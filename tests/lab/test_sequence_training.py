"""The experiment "sequences": held-out pairs choose and are never trained on; each method gets its own loss."""

from __future__ import annotations

import math

import pytest
import torch

from distalign.lab import sequences
from distalign.lab.exact import asymptotic_constant, divergence, optimum
from distalign.lab.net import Shape, double, stack
from distalign.lab.sequence_rewards import MODELS, fit_bigram, fit_rewards
from distalign.lab.sequence_training import Adam, Job, Schedule, Trained, train
from distalign.lab.sequence_worlds import (
    Data,
    World,
    bigram,
    bigram_features,
    draw_pairs,
    generator,
    logps,
    make_worlds,
)
from distalign.lab.sequences import TREE, Cell, Sequences
from distalign.lab.tree import Tree
from distalign.methods import PD, PMLE, REBEL, RKL, RLHF
from distalign.methods.preference import bradley_terry_nll, induced_reward

SMALL = Tree(vocabulary=4, length=3)
QUICK = Schedule(12, lr=2e-2, batch=64, every=1)


@pytest.fixture(scope="module")
def data():
    """Labelled pairs of a small world."""
    worlds = make_worlds([(0, 0, "markov")], SMALL, distance=0.3, steps=60)
    return draw_pairs(worlds[0], 2048, SMALL, gamma=1.0)


@pytest.fixture
def history(monkeypatch):
    """The weights at every look at the held-out pairs."""
    seen, keep = [], Adam.keep

    def watched(self, value):
        seen.append({name: weight.detach().clone() for name, weight in self.weights.items()})
        keep(self, value)

    monkeypatch.setattr(Adam, "keep", watched)
    return seen


def flipped(one, *, held_out):
    """The same pairs with opposite labels, of the held-out ones or of all others."""
    pairs, cut = one.pairs.clone(), one.held_out
    part = slice(0, cut) if held_out else slice(cut, None)
    pairs[part] = pairs[part].flip(1)
    return Data(one.world, pairs)


def learn(kind, data):
    """(table kept, what makes a table [prompts, responses] of weights) of a policy or of a reward model."""
    if kind == "pmle":
        kept = train([Job("pmle", PMLE(gamma=1.0, beta=0.0), data)], SMALL, QUICK).best
        return SMALL.path_sums(logps(double(kept), SMALL))[0], lambda w: SMALL.path_sums(logps(double(w), SMALL))[0]
    rewards = MODELS[kind]([data.world], SMALL, 1.0).rewards
    return fit_rewards(kind, [data], SMALL, QUICK, gamma=1.0)[0], lambda w: rewards(double(w))[0]


@pytest.mark.parametrize("kind", ["pmle", "scalar", "policy"])
def test_held_out_labels_choose_the_step_and_train_nothing(kind, data, history):
    """Opposite held-out labels leave every step as it was, to the bit, and what is kept is the likeliest step by them;
    opposite labels of the other pairs change the last step.
    """
    chosen = []
    for one in (data, flipped(data, held_out=True)):
        del history[: -QUICK.steps]
        kept, table = learn(kind, one)
        steps = history[-QUICK.steps :]
        losses = [float(bradley_terry_nll(table(w).flatten()[one.pairs[: one.held_out]]).mean()) for w in steps]
        chosen.append(losses.index(min(losses)))
        torch.testing.assert_close(kept, table(steps[chosen[-1]]), rtol=0, atol=1e-6)
    once, again = history[: QUICK.steps], history[QUICK.steps :]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(once, again, strict=True) for name in a)
    assert chosen[0] != chosen[1]
    learn(kind, flipped(data, held_out=False))
    assert any(not torch.equal(once[-1][name], history[-1][name]) for name in once[-1])


def test_a_bigram_reward_is_the_minimum_and_sees_no_held_out_pair(data):
    """It is what Newton's method finds on the table's design, to 1e-5 nats; held-out labels change nothing."""
    rewards = fit_bigram([data], SMALL, ridge=0.5)
    assert torch.equal(rewards, fit_bigram([flipped(data, held_out=True)], SMALL, ridge=0.5))
    tables = torch.eye(24, dtype=torch.float64).view(24, 6, 4)
    design = SMALL.path_sums(bigram(tables[:, :2], tables[:, 2:], SMALL)).flatten(1).T
    chosen, rejected = data.pairs[data.held_out :].T
    gaps, weights = design[chosen] - design[rejected], torch.zeros(24, dtype=torch.float64)
    for _ in range(20):
        wrong = (-gaps @ weights).sigmoid()
        curvature = gaps.T @ (gaps * (wrong * (1 - wrong))[:, None]) + 0.5 * torch.eye(24)
        weights += torch.linalg.solve(curvature, gaps.T @ wrong - 0.5 * weights)
    torch.testing.assert_close(rewards[0].flatten(), design @ weights, rtol=0, atol=1e-5)
    features = bigram_features(SMALL)
    for each in (features, design.view(2, -1, 24)):
        assert int(torch.linalg.matrix_rank((each - each.mean(1, keepdim=True)).flatten(0, 1))) == features.shape[-1]


def test_the_constant_of_a_world_is_the_limit_of_its_bigram_rewards(data):
    """Mean of m · KL over 24 draws of 10,000 pairs: the computed constant, to four standard errors (each some 5 %)."""
    world = data.world
    reference = SMALL.path_sums(world.reference)
    constant = asymptotic_constant(world.target[None], reference[None], bigram_features(SMALL)[None], gamma=2.0)
    draws = [draw_pairs(world, 10_000 + i, SMALL, gamma=2.0) for i in range(24)]
    policies = optimum(fit_bigram(draws, SMALL, ridge=1e-3), reference, gamma=2.0, beta=0.0)
    sizes = torch.tensor([len(draw.pairs) - draw.held_out for draw in draws])
    found = sizes * divergence(world.target, policies)
    error = float(found.std()) / math.sqrt(len(draws))
    assert float(found.mean()) == pytest.approx(float(constant), abs=4 * error)
    assert error < 0.08 * float(constant)


def random_world(kind):
    """A world of the experiment's size, nothing fitted."""
    weights = Shape(8, 2, 4).fresh(generator(7))
    table = logps(double(weights), TREE)[0]
    target = torch.randn(2, len(TREE.responses), generator=generator(8), dtype=torch.float64).log_softmax(-1)
    return World(kind, (0, 0, kind), target, table, weights, float(divergence(target, TREE.path_sums(table))))


def test_each_name_is_trained_by_its_own_method(monkeypatch):
    """By name: the method with the experiment's γ, an oracle's β for RLHF alone, and the rewards that belong to it."""
    asked = []

    def instead(jobs, tree, schedule, advance):
        asked.extend(jobs)
        weights = stack([job.data.world.weights for job in jobs])
        return Trained(weights, weights)

    monkeypatch.setattr(sequences, "train", instead)
    experiment = Sequences(gamma=0.5)
    cells = []
    for kind, endings in (("markov", [""]), ("tilted", ["_policy", "_scalar"])):
        data = draw_pairs(random_world(kind), 512, TREE, gamma=0.5)
        cells.append(Cell(data, {end: torch.full((2, len(TREE.responses)), float(len(end))) for end in endings}))
    rows = experiment._sampled(cells, lambda done, total: None)
    best = experiment._optima(cells[0].data.world, cells[0].rewards[""])["rlhf"]
    methods = {job.name: job.method for job in asked if job.data.world.kind == "markov"}
    assert methods == {
        "rkl": RKL(gamma=0.5, beta=0.0),
        "pd": PD(gamma=0.5, beta=0.0),
        "rlhf": RLHF(beta=best.beta),
        "rebel": REBEL(2.0, 0.5),
    }
    tilted = {job.name: job for job in asked if job.data.world.kind == "tilted"}
    assert set(tilted) == {"rkl_policy", "rlhf_policy", "rkl_scalar", "rlhf_scalar"}
    assert all(job.rewards is cells[1].rewards[name[name.index("_") :]] for name, job in tilted.items())
    assert {row["method"] for row in rows} == set(methods) | set(tilted)


def test_an_oracle_weight_helps_and_is_not_needed_where_the_reward_is_right():
    """With γ ln π* the tuned RKL is the target, at β = 0; with a wrong reward its β makes it better, and the oracle's
    weights scale with γ: the same target and reference have the same limits at any γ.
    """
    world = random_world("markov")
    right = Sequences(gamma=0.5)._optima(world, induced_reward(world.target, gamma=0.5))["rkl_tuned"]
    assert right.beta == 0.0
    torch.testing.assert_close(right.logps, world.target, rtol=0, atol=1e-12)
    noise = torch.randn(world.target.shape, generator=generator(9), dtype=torch.float64)
    wrong = Sequences()._optima(world, induced_reward(world.target, gamma=1.0) + 2 * noise)
    plain, tuned, rlhf = (float(divergence(world.target, wrong[name].logps)) for name in ("rkl", "rkl_tuned", "rlhf"))
    assert tuned < min(plain, rlhf) - 0.01
    limits = [[row["forward_kl"] for row in Sequences(gamma=gamma)._limits(world)] for gamma in (0.25, 1.0, 4.0)]
    assert limits[0] == pytest.approx(limits[1], abs=1e-9)
    assert limits[2] == pytest.approx(limits[1], abs=1e-9)
