"""The methods on tables: their fits against independent optimisers, and what figure 1 and its relatives must show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distalign.lab import classes, figure1
from distalign.lab.classes import Classes
from distalign.lab.coverage import Coverage
from distalign.lab.degeneracy import Degeneracy
from distalign.lab.exact import asymptotic_constant, divergence, information_weights, optimum
from distalign.lab.figure1 import Figure1, fit_slope, tune
from distalign.lab.fit import fit_dpo, fit_pairs, fit_pd, fit_pmle, fit_rebel, fit_reward, fit_rkl
from distalign.lab.gamma import Gamma, best_sharpness
from distalign.lab.tables import draw, linear_tables, random_tables
from distalign.methods import DPO, PMLE, Pairs, Samples
from distalign.methods.preference import bradley_terry_nll, preference_logit, preference_nll

GAMMA, RIDGE = 0.5, 1e-3


def nothing(*_, **__):
    """No progress is shown."""


@pytest.fixture(scope="module")
def tables():
    """Eight worlds like the paper's, with a reference that is far from the target."""
    return random_tables(8, 4, 6, scale=1.0, gamma=GAMMA, seed=0)


@pytest.fixture(scope="module")
def counts(tables):
    """Enough pairs that nothing is separable."""
    return draw(tables, 2**14, seed=0)


@pytest.fixture(scope="module")
def rewards(tables, counts):
    """Their Bradley-Terry reward."""
    return fit_reward(tables, counts, ridge=RIDGE)


def minimised(objective, shape):
    """Logits at the minimum of an objective, by L-BFGS: knows nothing of pairs, Hessians or classes."""
    logits = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=3000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = objective(logits.log_softmax(-1))
        value.backward()
        return value

    optimiser.step(closure)
    return logits.detach().log_softmax(-1)


def repeated(tables, counts, world):
    """The comparisons of one world as a method sees them: a row a comparison result, and how often it came."""
    i, j = tables.pairs
    both = torch.stack([torch.stack([i, j], 1), torch.stack([j, i], 1)])  # first won, second won
    return both, torch.stack([counts.wins[world], counts.total[world] - counts.wins[world]])


@pytest.mark.parametrize("method", [PMLE(gamma=GAMMA, beta=0.0), DPO(gamma=GAMMA)], ids=["pmle", "dpo"])
def test_newton_finds_what_the_method_minimises(method, tables, counts):
    """The fit from counts is the minimum of the method's own `loss` over the labelled pairs."""
    both, times = repeated(tables, counts, world=0)
    logps = fit_pmle(tables, counts, ridge=1e-9) if isinstance(method, PMLE) else fit_dpo(tables, counts, ridge=1e-9)
    reference = tables.reference[0]

    def objective(policy):
        total = 0.0
        for side in (0, 1):
            for pair in range(both.shape[1]):
                rows = policy[:, both[side, pair]], reference[:, both[side, pair]]
                for context in range(4):
                    row = Pairs(logps=rows[0][context : context + 1], reference_logps=rows[1][context : context + 1])
                    total = total + times[side, context, pair] * method.loss(row, Samples())
        return total / times.sum()

    found = minimised(objective, (4, 6))
    torch.testing.assert_close(logps[0], found, rtol=0, atol=1e-5)


def test_in_a_full_table_three_losses_have_one_minimum(tables, counts, rewards):
    """PMLE, PD with soft labels from any pairs, and RKL at β = 0 are softmax(R̂/γ): one estimator."""
    induced = (rewards / GAMMA).log_softmax(-1)
    found = {
        "pmle": fit_pmle(tables, counts, ridge=RIDGE),
        "rkl": fit_rkl(tables, rewards),
        "pd, pairs from mu": fit_pd(tables, rewards, tables.pair_weights(tables.behavior)),
        "pd, pairs from reference": fit_pd(tables, rewards, tables.pair_weights(tables.reference)),
        "pd, pairs from policy": fit_pd(tables, rewards, tables.pair_weights(induced)),
    }
    for name, logps in found.items():
        assert float((logps - induced).abs().max()) < 1e-6, name


def test_dpo_and_rebel_are_the_reference_times_that_estimate(tables, counts, rewards):
    """DPO with its β = γ, and rounds of REBEL with η = 1/γ and β = γ, are π₀ · softmax(R̂/γ) up to normalisation."""
    product = (tables.reference + rewards / GAMMA).log_softmax(-1)
    assert float((fit_dpo(tables, counts, ridge=RIDGE) - product).abs().max()) < 1e-6
    rebel = fit_rebel(tables, rewards, eta=1 / GAMMA, beta=GAMMA, rounds=3)
    assert float((rebel - product).abs().max()) < 1e-6
    # Without a KL term every round multiplies by exp(ηR̂) again.
    rounds = fit_rebel(tables, rewards, eta=1 / GAMMA, beta=0.0, rounds=3)
    assert float((rounds - (tables.reference + 3 * rewards / GAMMA).log_softmax(-1)).abs().max()) < 1e-5


@pytest.mark.parametrize(("gamma", "beta"), [(GAMMA, 0.0), (GAMMA, 0.2), (0.0, 0.3)])
def test_rkl_reaches_the_closed_form_in_the_full_table(tables, rewards, gamma, beta):
    """Natural gradients of `rkl_loss` (RLHF at γ = 0) end at appendix B's optimum."""
    found = fit_rkl(replace(tables, gamma=gamma), rewards, beta=beta)
    assert float((found - optimum(rewards, tables.reference, gamma=gamma, beta=beta)).abs().max()) < 1e-8


def test_restricted_classes_reach_the_minimum_of_their_objective():
    """PMLE, PD and RKL with four features: no change within the class lowers their objective."""
    tables, features = linear_tables((3, 4, 8, 7), relevant=4, scale=1.0, gamma=GAMMA, seed=0)
    small = features[..., :4]
    counts = draw(tables, 4096, seed=0)
    rewards = fit_reward(tables, counts, features, ridge=RIDGE)
    policy = fit_rkl(tables, rewards, small, beta=0.1)

    def objective(logits):
        logps = logits.log_softmax(-1)
        kl = divergence(logps, tables.reference)
        return ((logps.exp() * (GAMMA * logps - rewards)).sum(-1).mean(-1) + 0.1 * kl).sum()

    def likelihood(logits):
        gap = tables.pair_logps(GAMMA * logits)
        return (counts.total * bradley_terry_nll(gap, counts.frequency)).sum()

    labelled = fit_pmle(tables, counts, small, ridge=1e-9)
    for fitted, value in ((policy, objective), (labelled, likelihood)):
        change = torch.zeros(3, 4, 1, dtype=torch.float64, requires_grad=True)
        moved = value(fitted + (small @ change[:, None])[..., 0])
        (gradient,) = torch.autograd.grad(moved, change)
        assert float(gradient.abs().max()) < 1e-6 * float(moved.detach().abs())


def test_a_ridge_keeps_a_separable_estimate_finite_and_without_one_the_search_says_so(tables):
    """Twenty pairs in 24 cells: no maximum likelihood estimate exists."""
    few = draw(tables, 20, seed=0)
    assert bool(fit_pmle(tables, few, ridge=RIDGE).isfinite().all())
    frequency = few.frequency.flatten()
    with pytest.raises((RuntimeError, torch.linalg.LinAlgError), match=r"separable|singular"):
        fit_pairs(tables, lambda rewards: bradley_terry_nll(rewards, frequency), few.total)


def test_tuning_by_the_oracle_is_never_worse_and_by_held_out_pairs_uses_only_pairs(tables, counts, rewards):
    """The oracle's policy is at least as near as any on the grid; held-out tuning reads neither the target nor rewards
    that saw the held-out pairs.
    """
    betas = torch.logspace(-3, 3, 13, dtype=torch.float64)
    kl = divergence(tables.target, tune(tables, rewards, betas, gamma=GAMMA))
    for beta in betas.tolist():
        assert bool((kl <= divergence(tables.target, optimum(rewards, tables.reference, gamma=GAMMA, beta=beta))).all())
    rest, held_out = counts.split(0.2, seed=0)
    refit = fit_reward(tables, rest, ridge=RIDGE)
    blind = replace(tables, target=random_tables(8, 4, 6, scale=1.0, gamma=GAMMA, seed=9).target)

    def weight(tables, rewards, **by_pairs):
        """Which of `betas` every world has."""
        logps = tune(tables, rewards, betas, gamma=GAMMA, **by_pairs)
        optima = torch.stack([optimum(rewards, tables.reference, gamma=GAMMA, beta=beta) for beta in betas.tolist()])
        return (optima - logps).abs().sum((-2, -1)).argmin(0)

    by_pairs = {"held_out": held_out, "refit": refit}
    chosen = weight(tables, rewards, **by_pairs)
    assert torch.equal(chosen, weight(blind, rewards, **by_pairs))
    assert torch.equal(chosen, weight(tables, torch.randn_like(rewards), **by_pairs))
    assert not torch.equal(weight(blind, rewards), weight(tables, rewards))


def test_slopes_have_intervals_that_hold_the_truth():
    """KL = (1/n) · noise: the slope's 95 % interval holds −1 in nearly all draws, and narrows with seeds."""
    sizes = [2**k for k in range(11, 17)]
    random = torch.Generator().manual_seed(0)
    n = torch.tensor(sizes, dtype=torch.float64)[:, None]
    held, widths = 0, {}
    for seeds in (20, 80):
        for draw_ in range(20):
            noise = torch.randn(6, seeds, generator=random, dtype=torch.float64)
            slope = fit_slope(sizes, (0.3 * noise).exp() / n, seed=draw_)
            held += slope.low <= -1 <= slope.high
            widths[seeds] = slope.high - slope.low
    assert held >= 34
    assert widths[80] < 0.7 * widths[20]
    with pytest.raises(ValueError, match="two sizes"):
        fit_slope([4], torch.ones(1, 3), seed=0)


@pytest.fixture(scope="module")
def figure():
    """Figure 1 with 16 seeds at every fourth power of two from 2¹¹ on (two more in the paper's window)."""
    return Figure1(seeds=16, min_n=2**11).run(nothing)


def rows_of(figure, key, scale, **wanted):
    """Rows of one scale with the wanted values."""
    return [r for r in figure[key] if r["scale"] == scale and all(r[k] == v for k, v in wanted.items())]


@pytest.mark.parametrize("method", ["pmle", "pd", "rkl"])
def test_rate_is_one_over_n(figure, method):
    """Paper's toy, 2¹¹…2¹⁶, 16 seeds: slope's interval within [−1.15, −0.92] (40 seeds give [−1.10, −0.95])."""
    (slope,) = rows_of(figure, "slopes", "0.1", method=method, to=2**16)
    assert slope["from"] == 2**11
    assert slope["low"] >= -1.15
    assert slope["high"] <= -0.92
    assert slope["low"] < slope["slope"] < slope["high"]


@pytest.mark.parametrize("scale", ["0.1", "1.0"])
def test_n_times_kl_is_the_computed_constant(figure, scale):
    """n·KL/C within [0.85, 1.15] for every n ≥ 2¹³ (16 seeds; the median of 40 seeds stays within 10 %)."""
    ratios = [row["ratio"] for row in rows_of(figure, "constant_ratios", scale) if row["n"] >= 2**13]
    assert len(ratios) == 3 * 8
    assert min(ratios) >= 0.85
    assert max(ratios) <= 1.15


@pytest.mark.parametrize("scale", ["0.1", "1.0"])
@pytest.mark.parametrize("method", ["rlhf", "dpo", "rebel"])
def test_baselines_level_off_at_their_computed_floors(figure, scale, method):
    """Within 15 % of the floor at n = 2²⁰, above it (16 seeds; 10 % with 40), while RKL is far below."""
    (floor,) = rows_of(figure, "floors", scale, method=method)
    (last,) = rows_of(figure, "rows", scale, method=method, n=2**20)
    (rkl,) = rows_of(figure, "rows", scale, method="rkl", n=2**20)
    assert last["forward_kl"]["median"] == pytest.approx(floor["forward_kl"], rel=0.15)
    assert rkl["forward_kl"]["median"] < 0.1 * floor["forward_kl"]


def test_rlhf_is_twice_as_far_at_the_papers_scale_and_far_more_at_scale_one(figure):
    """RLHF over RKL at 2¹⁶ pairs, both with oracle β: 1.7 to 2.4 at scale 0.1, above 40 at scale 1."""
    ratios = {}
    for scale in ("0.1", "1.0"):
        rlhf, rkl = (rows_of(figure, "rows", scale, method=name, n=2**16)[0] for name in ("rlhf", "rkl_tuned"))
        ratios[scale] = rlhf["forward_kl"]["median"] / rkl["forward_kl"]["median"]
    assert 1.7 <= ratios["0.1"] <= 2.4
    assert ratios["1.0"] > 40


@pytest.mark.slow
def test_classes_decide_who_is_better():
    """A reward of 5 features under a policy with 60 is worth a factor of 8; every estimate has its own constant."""
    experiment = Classes(seeds=12, min_n=2**18, contexts=4)
    numbers = experiment.run(nothing)
    found = {(row["case"], row["method"]): row for row in numbers["rows"]}
    for case in ("table", "linear"):
        for method in ("rkl", "pd", "pd_policy"):
            assert found[case, "pmle"]["n_kl"]["mean"] > 8 * found[case, method]["n_kl"]["mean"]
    # n·KL/C is nearly χ²/d with d the number of the estimate's parameters: its error in 12 worlds is known.
    parameters = {"table": (236, 5), "linear": (60, 5), "skewed": (40, 4), "reversed": (4, 4)}
    for (case, method), row in found.items():
        if "over_constant" in row:
            error = (2 / (12 * parameters[case][method != "pmle"])) ** 0.5
            assert abs(row["over_constant"]["mean"] - 1) < 0.1 + 3 * error, (case, method)
    # Reversed: asymptotically RKL and on-policy PD cost more than PMLE, PD on the labelled pairs costs the same.
    constants = {(row["case"], row["method"]): row["constant"] for row in numbers["constants"]}
    assert constants["reversed", "rkl"] > 1.2 * constants["reversed", "pmle"]
    assert constants["reversed", "pd"] == pytest.approx(constants["reversed", "pmle"], rel=1e-6)
    # Hard labels: PD separates from RKL, and its order is that of the theorems.
    means = [found["skewed", method]["n_kl"]["mean"] for method in ("rkl", "pd_hard", "pmle")]
    assert 4 * means[0] < means[1] < 0.8 * means[2]
    assert {panel.title for panel in experiment.show(numbers).panels} == {
        f"n·KL, {case}" for case in ("table", "linear", "skewed", "reversed")
    }


def test_coverage_costs():
    """Pairs that the target would not give cost more, as their constants say, within the theorems' kind of bound."""
    numbers = Coverage(seeds=16, skews=(-1.0, 2.0)).run(nothing)
    found = {(row["method"], row["skew"]): row for row in numbers["rows"]}
    for method in ("pmle", "rkl"):
        own, far = found[method, -1.0], found[method, 2.0]
        assert own["coverage"] == pytest.approx(1, abs=1e-9)  # μ = π*
        assert far["constant"] > 1.2 * own["constant"]
        for row in (own, far):
            assert row["constant"] < row["bound"]
            assert abs(row["over_constant"]["mean"] - 1) < 0.25 + 2 * row["over_constant"]["se"]


def test_degeneracy_is_rlhfs_and_separable_datas():
    """RLHF's entropy goes to 0 with β, RKL's to the target's; DPO and PMLE collapse on separable pairs unless β > 0."""
    experiment = Degeneracy(seeds=4, steps=500, betas=9)
    numbers = experiment.run(nothing)
    assert [claim.promised for claim in experiment.show(numbers).claims if not claim.holds] == []
    fitted = [row for row in numbers["by_beta"] if row["reward"] == "fitted"]
    entropies = {m: [row["entropy"] for row in fitted if row["method"] == m] for m in ("rlhf", "rkl")}
    assert entropies["rlhf"] == sorted(entropies["rlhf"])
    assert min(entropies["rkl"]) > 0.8 * numbers["target_entropy"]


def test_gamma_is_not_in_the_preferences_and_is_in_samples():
    """All claims of the experiment, with few seeds; and the sharpness that is found is the likeliest."""
    experiment = Gamma(seeds=16, max_n=2**17)
    shown = experiment.show(experiment.run(nothing))
    assert [claim.promised for claim in shown.claims if not claim.holds] == []
    rewards = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = (1000 * (rewards / 0.7).softmax(-1)).round()
    found = best_sharpness(rewards, seen)
    for factor in (0.99, 1.01):
        best = (seen * (rewards / found[:, None, None]).log_softmax(-1)).sum((1, 2))
        other = (seen * (rewards / (factor * found[:, None, None])).log_softmax(-1)).sum((1, 2))
        assert bool((best > other).all())
    torch.testing.assert_close(found, torch.full((2,), 0.7, dtype=torch.float64), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("row", "function"),
    [("pmle", "fit_pmle"), ("pd", "fit_pd"), ("rkl", "fit_rkl"), ("dpo", "fit_dpo"), ("rebel", "fit_rebel")],
)
def test_every_row_of_figure_1_is_made_by_its_own_loss(row, function, tables, monkeypatch):
    """What stands in a row is what the method's own fit returned, and nobody else's."""
    real, made = getattr(figure1, function), []

    def keep(*arguments, **more):
        made.append(real(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(figure1, function, keep)
    policies = Figure1(seeds=8)._estimates(tables, 4096)
    assert [name for name, logps in policies.items() if any(logps is one for one in made)] == [row]


def test_held_out_rows_of_figure_1_are_tuned_by_held_out_pairs(tables, monkeypatch):
    """The four tuned rows: by the oracle or by pairs, with the entropy term or without."""
    real, asked = figure1.tune, []

    def note(tables, rewards, betas, *, gamma, held_out=None, refit=None):
        asked.append((gamma, held_out is not None, refit is not None))
        return real(tables, rewards, betas, gamma=gamma, held_out=held_out, refit=refit)

    monkeypatch.setattr(figure1, "tune", note)
    Figure1(seeds=8)._estimates(tables, 4096)
    assert asked == [(0.5, False, False), (0.5, True, True), (0.0, False, False), (0.0, True, True)]


def test_hard_labels_are_the_rewards_and_not_the_truths(monkeypatch):
    """PD with hard labels draws them from σ(ΔR̂)."""
    real, teachers = classes.draw, []

    def keep(tables, n, seed, *, stream=0):
        teachers.append((tables, stream))
        return real(tables, n, seed, stream=stream)

    monkeypatch.setattr(classes, "draw", keep)
    experiment = Classes(seeds=2)
    tables, features = linear_tables((2, 3, 6, 4), relevant=2, scale=1.0, gamma=0.5, seed=0, skew=1.0)
    experiment._estimates(tables, features, features[..., :2], 4096)
    rewards = fit_reward(tables, real(tables, 4096, 0), features[..., :2], ridge=experiment.ridge)
    (_, first), (teacher, stream) = teachers
    assert first == 0 != stream
    gap, wanted = teacher.pair_logps(teacher.target), tables.pair_logps(rewards)
    torch.testing.assert_close(0.5 * (gap[..., 0] - gap[..., 1]), wanted[..., 0] - wanted[..., 1])
    assert torch.equal(teacher.behavior, tables.reference)


def test_on_policy_pd_has_settled_and_has_its_own_constant():
    """One more round moves nothing that is shown; its constant is not that of the pairs from μ."""
    experiment = Classes(seeds=3)
    tables, features = linear_tables((3, 10, 40, 40), relevant=4, scale=1.0, gamma=0.5, seed=0, skew=1.0)
    rewards = fit_reward(tables, draw(tables, 2**14, 0), features, ridge=1e-3)
    settled = experiment._on_policy(tables, rewards, features[..., :4])
    again = fit_pd(tables, rewards, tables.pair_weights(settled), features[..., :4])
    first = fit_pd(tables, rewards, tables.pair_weights(tables.reference), features[..., :4])
    moved = divergence(settled, again)
    assert bool((moved < 1e-3 * divergence(tables.target, settled)).all())
    assert bool((divergence(settled, first) > 30 * moved).all())
    own, seen = (
        asymptotic_constant(
            tables.target,
            tables.behavior,
            features[..., :4],
            features,
            information_weights(source, tables.target, gamma=0.5),
            gamma=0.5,
        )
        for source in (tables.target, tables.behavior)
    )
    found = experiment._constants(tables, features[..., :4], features)
    torch.testing.assert_close(found["pd_policy"], own)
    torch.testing.assert_close(found["pd"], seen)
    assert bool((own > 1.05 * seen).all())


def test_gamma_is_judged_on_fresh_labels_and_its_error_is_right():
    """The NLL is of pairs that were not trained on; the predicted error is that of many worlds, without noise in R."""
    experiment = Gamma(seeds=8, max_n=2**13)
    tables = experiment._tables(0.5)
    row = experiment._misspecified(tables, 0.5)
    fresh, trained = draw(tables, 2**13, 0, stream=1), draw(tables, 2**13, 0)
    logps = fit_pmle(tables, trained, ridge=experiment.ridge)

    def nll(counts):
        loss = preference_nll(preference_logit(tables.pair_logps(logps), gamma=0.5), counts.frequency)
        return float(((counts.total * loss).sum((-2, -1)) / counts.total.sum((-2, -1))).mean())

    assert row["fresh_nll"] == pytest.approx(nll(fresh), abs=1e-9)
    assert abs(nll(fresh) - nll(trained)) > 1e-4
    many = Gamma(seeds=400)
    worlds = many._tables(0.5)
    found = many._identified(worlds, 0.5 * worlds.target, 1000)
    width = (found["gamma"]["q75"] - found["gamma"]["q25"]) / 1.349
    assert width == pytest.approx(found["predicted_se"], rel=0.2)
    assert found["gamma"]["median"] == pytest.approx(0.5, rel=0.02)


def test_what_cannot_be_judged_is_not():
    """Few pairs: numbers, and claims that say so."""
    for least, most in ((32, 64), (2**11, 2**12)):
        experiment = Figure1(seeds=3, min_n=least, max_n=most)
        claims = experiment.show(experiment.run(nothing)).claims
        judged = {claim.holds for claim in claims if "1/n" in claim.promised or "floor" in claim.promised}
        assert judged == {None}
