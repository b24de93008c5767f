"""Every method of the registry: gradient against enumeration, what it reads, identities between methods, settings."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re

import pytest
import torch
from enumeration import Enumeration, gradient

from distalign.methods import DPO, METHODS, PD, PMLE, REBEL, RKL, RLHF, Needs, Pairs, Samples
from distalign.methods.base import Method, NotCollected

EXACT = {"rtol": 0.0, "atol": 1e-10}
GAMMA, BETA, ETA = 0.7, 0.4, 1.3

# Which field of Pairs and Samples comes with which need.
PAIR_FIELDS = {
    "logps": lambda n: n.pairs != "",
    "reference_logps": lambda n: n.pairs != "" and n.reference,
    "behavior_logps": lambda n: "sampled" in n.pairs,
    "rewards": lambda n: n.pairs != "" and n.reward,
    "probability": lambda n: "labelled" in n.pairs,
}
SAMPLE_FIELDS = {
    "token_logps": lambda n: n.samples,
    "mask": lambda n: n.samples,
    "group": lambda n: n.samples,
    "behavior_token_logps": lambda n: n.samples,
    "step_entropy": lambda n: n.entropy,
    "reference_token_logps": lambda n: n.samples and n.reference,
    "step_kl": lambda n: n.kl,
    "rewards": lambda n: n.samples and n.reward,
    "values": lambda n: n.values,
    "advantages": lambda n: n.values,
    "returns": lambda n: n.values,
}


@pytest.fixture(params=METHODS)
def method(request):
    """Each method of the registry with every setting it has at a value of order one, so that no term hides."""
    values = {"gamma": GAMMA, "beta": BETA, "eta": ETA}
    names = [f.name for f in dataclasses.fields(METHODS[request.param]) if f.init]
    return METHODS[request.param](**{name: values[name] for name in names if name in values})


class Setting:
    """An enumerable policy, its reference, a reward for every response, and a batch of pairs."""

    def __init__(self, vocabulary=3, length=2, seed=0):
        self.world = Enumeration(vocabulary, length)
        self.policy = self.world.parameters(seed)
        self.reference = self.world.parameters(seed + 100).detach()
        n = len(self.world.responses)
        generator = torch.Generator().manual_seed(seed)
        self.rewards = torch.randn(n, generator=generator, dtype=torch.float64)
        self.rows = torch.randint(n, (6, 2), generator=generator)
        self.probability = torch.rand(6, generator=generator, dtype=torch.float64)

    def pairs(self, needs, policy=None):
        """The batch of pairs with exactly the declared fields."""
        if not needs.pairs:
            return Pairs()
        policy = self.policy if policy is None else policy
        full = self.world.pairs(policy, self.reference, self.rewards, self.rows, self.probability)
        # The sampling policy is where sampling happened: it does not move with `policy`.
        behavior = self.world.logps(self.policy.detach() + 0.3 * self.reference)[self.rows]
        return only_declared(full.replace(behavior_logps=behavior), PAIR_FIELDS, needs)

    def samples(self, needs, rows, group, policy=None, behavior=None):
        """The responses `rows` with exactly the declared fields, drawn by `behavior` (None: the policy)."""
        if not needs.samples:
            return Samples()
        policy = self.policy if policy is None else policy
        full = self.world.samples(policy, self.reference, self.rewards, rows, group, behavior)
        return only_declared(full, SAMPLE_FIELDS, needs)

    def expected_loss(self, method, policy=None, behavior=None):
        """The method's loss on the pairs, its samples averaged over every draw of two responses, one call per draw."""
        policy = self.policy if policy is None else policy
        pairs = self.pairs(method.needs, policy)
        if not method.needs.samples:
            return method.loss(pairs, Samples())
        rows, group = self.world.groups_of_two()
        weights = self.world.group_weights(policy if behavior is None else behavior)[::2] * 2
        losses = [
            method.loss(pairs, self.samples(method.needs, r, g, policy, behavior))
            for r, g in zip(rows.view(-1, 2), group.view(-1, 2), strict=True)
        ]
        return (weights * torch.stack(losses)).sum()


def only_declared(full, fields, needs):
    """A copy without the fields that were not declared."""
    return type(full)(**{name: getattr(full, name) for name, when in fields.items() if when(needs)})


def exact_objectives(s):
    """The objectives as the paper writes them, over all responses, for the batch of pairs of a setting."""
    logps, reference = s.world.logps(s.policy), s.world.logps(s.reference)
    behavior = s.world.logps(s.policy.detach() + 0.3 * s.reference)
    a, b = s.rows.T
    ratio, behavior_ratio, p = logps - reference, logps - behavior, s.probability
    kl, entropy = s.world.kl(s.policy, s.reference), s.world.entropy(s.policy)
    penalised = s.rewards - BETA * (behavior - reference)
    expected_reward = s.world.reward(s.policy, s.rewards)

    def cross_entropy(label, logit):
        q = torch.sigmoid(logit)
        return -(label * q.log() + (1 - label) * (1 - q).log()).mean()

    soft = torch.sigmoid(s.rewards[a] - s.rewards[b])
    soft_entropy = -(soft * soft.log() + (1 - soft) * (1 - soft).log()).mean()
    gap = behavior_ratio[a] - behavior_ratio[b]
    return {
        "pmle": cross_entropy(p, GAMMA * (logps[a] - logps[b])) + BETA * kl,
        "pd": cross_entropy(soft, GAMMA * (logps[a] - logps[b])) - soft_entropy + BETA * kl,
        "rkl": -expected_reward - GAMMA * entropy + BETA * kl,
        "dpo": cross_entropy(p, GAMMA * (ratio[a] - ratio[b])),
        "rebel": ((gap - ETA * (penalised[a] - penalised[b])) ** 2).mean(),
        "rlhf": -expected_reward + BETA * kl,
    }


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("length", [2, 3])
def test_gradient_equals_enumeration(request, method, length, stale):
    """Value and gradient of the mean loss are those of the paper's objective, by enumeration, for old samples too."""
    exact = exact_objectives(s := Setting(length=length))
    name = request.node.callspec.params["method"]
    if name not in exact:
        pytest.skip("no closed form here; the next test covers every method")
    estimate = s.expected_loss(method, behavior=s.policy.detach() + 0.3 * s.reference if stale else None)
    torch.testing.assert_close(estimate, exact[name], **EXACT)
    torch.testing.assert_close(gradient(estimate, s.policy), gradient(exact[name], s.policy), **EXACT)


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_pd_on_the_datas_pairs_equals_enumeration(length, beta):
    """The same objective, whoever wrote the pairs: value and gradient, with the KL term and without."""
    s = Setting(length=length)
    exact = exact_objectives(s)["pd"] - (BETA - beta) * s.world.kl(s.policy, s.reference)
    estimate = s.expected_loss(PD(GAMMA, beta, pairs="data"))
    torch.testing.assert_close(estimate, exact, **EXACT)
    torch.testing.assert_close(gradient(estimate, s.policy), gradient(exact, s.policy), **EXACT)


def test_gradient_is_the_derivative_of_the_expected_value(method):
    """Whatever the objective: the expected gradient is the derivative of the expected value, sampling included."""
    s = Setting()
    found = gradient(s.expected_loss(method), s.policy)
    direction = torch.randn(s.policy.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = 1e-3
    with torch.no_grad():
        at = {k: s.expected_loss(method, s.policy + k * h * direction) for k in (-2, -1, 1, 2)}
    slope = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
    torch.testing.assert_close((found * direction).sum(), slope, rtol=1e-8, atol=1e-9)


def poisoned(full, fields, needs):
    """The same data in an object that raises when an undeclared field is so much as looked at."""
    forbidden = {name for name, when in fields.items() if not when(needs)}

    class Poisoned(type(full)):
        def __getattribute__(self, name):
            if name in forbidden and armed:
                raise AssertionError(f"read {name}, which needs does not declare")
            return super().__getattribute__(name)

    armed = False
    copy = Poisoned(**{f.name: getattr(full, f.name) for f in dataclasses.fields(full)})
    armed = True
    return copy


def variants():
    """Every registered method at its defaults and with each optional term switched off."""
    cases = [pytest.param(factory(), id=name) for name, factory in METHODS.items()]
    for name, factory in METHODS.items():
        if {"gamma", "beta"} <= {f.name for f in dataclasses.fields(factory)}:
            cases.append(pytest.param(factory(beta=0.0), id=f"{name}-beta=0"))
    cases.append(pytest.param(PD(kl_in="reward"), id="pd-reward"))
    cases += [pytest.param(PD(pairs=pairs), id=f"pd-{pairs}") for pairs in ("data", "reference", "data+policy")]
    cases.append(pytest.param(PD(beta=0.05, pairs="data"), id="pd-data-beta=0.05"))
    cases.append(pytest.param(REBEL(beta=0.0), id="rebel-beta=0"))
    for settings in ({"estimator": "ppo"}, {"estimator": "split"}):
        label = "-".join(settings.values())
        cases += [pytest.param(factory(**settings), id=f"{factory.__name__}-{label}") for factory in (RKL, RLHF)]
    return cases


@pytest.mark.parametrize("method", variants())
def test_uses_only_what_it_declares(method):
    """Undeclared fields may be absent, and are not even looked at; declared ones are enough."""
    s, needs = Setting(), method.needs
    rows = torch.tensor([0, 1, 1, 3])
    group = torch.tensor([0, 0, 1, 1])
    bare = method.loss(s.pairs(needs), s.samples(needs, rows, group))
    full_pairs = s.world.pairs(s.policy, s.reference, s.rewards, s.rows, s.probability)
    full_pairs = full_pairs.replace(behavior_logps=s.world.logps(s.policy.detach() + 0.3 * s.reference)[s.rows])
    full_samples = s.world.samples(s.policy, s.reference, s.rewards, rows, group)
    guarded = method.loss(poisoned(full_pairs, PAIR_FIELDS, needs), poisoned(full_samples, SAMPLE_FIELDS, needs))
    assert bare.shape == ()
    torch.testing.assert_close(bare, guarded, rtol=0, atol=0)
    assert bool(gradient(bare, s.policy).abs().sum() > 0)


@pytest.mark.parametrize("method", variants())
def test_missing_data_is_named(method):
    """Nothing collected: the error names the field and where it is declared."""
    with pytest.raises(NotCollected, match=r"^(Pairs|Samples)\.\w+ was not collected; declare it in the method's"):
        method.loss(Pairs(), Samples())


@pytest.mark.parametrize("needs", [{"reward": True}, {"pairs": "labelled", "kl": True}, {"kl": True}])
def test_needs_that_nothing_could_meet_are_refused(needs):
    """Rewards and full-vocabulary values are of responses that the policy draws."""
    with pytest.raises(ValueError, match=r"Needs: \w+ is of drawn responses; declare samples"):
        Needs(**needs)


def test_needs_follow_the_settings():
    """A term that is switched off asks for nothing: offline PMLE does not even want a reference."""
    assert PMLE(beta=0.0).needs == Needs(pairs="labelled")
    assert PMLE().needs == Needs(pairs="labelled", samples=True, kl=True)
    assert PD(beta=0.0).needs == Needs(pairs="sampled", reward=True)
    assert PD().needs == Needs(pairs="sampled", samples=True, reward=True, kl=True)
    assert PD(pairs="data").needs == Needs(pairs="labelled", reward=True)
    assert PD(beta=0.05, pairs="data").needs == Needs(pairs="labelled", samples=True, reward=True, kl=True)
    assert PD(beta=0.0, pairs="reference").needs == Needs(pairs="reference", reward=True)
    mixed = Needs(pairs="labelled+sampled", samples=True, reward=True, kl=True)
    assert PD(pairs="data+policy").needs == mixed
    assert PD(kl_in="reward").needs == Needs(pairs="sampled", reward=True, reference=True)
    assert RKL(beta=0.0).needs == Needs(samples=True, reward=True)
    assert RKL().needs == Needs(samples=True, reward=True, reference=True)
    assert DPO().needs == Needs(pairs="labelled", reference=True)
    assert REBEL().needs == Needs(pairs="sampled", reward=True, reference=True)
    assert REBEL(beta=0.0).needs == Needs(pairs="sampled", reward=True)
    assert RLHF().needs == Needs(samples=True, reward=True, reference=True)
    assert RLHF(beta=0.0).needs == Needs(samples=True, reward=True)
    assert RKL(estimator="ppo").needs == Needs(samples=True, reward=True, reference=True, values=True)
    split = Needs(samples=True, reward=True, kl=True, entropy=True)
    assert RKL(estimator="split").needs == split
    assert RLHF(estimator="split").needs == dataclasses.replace(split, entropy=False)


GRADIENT = {"estimator": "joint", "gae_lambda": 0.95, "clip": 0.2, "value_coefficient": 0.1, "whiten": True}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (PMLE, {"gamma": 1e-2, "beta": 1e-5}),
        (PD, {"gamma": 0.1, "beta": 0.05, "pairs": "policy", "kl_in": "loss"}),
        (RKL, {**GRADIENT, "gamma": 0.01, "beta": 0.05}),
        (DPO, {"gamma": 0.05}),
        (REBEL, {"eta": 1.0, "beta": 0.05}),
        (RLHF, {**GRADIENT, "gamma": 0.0, "beta": 0.05}),
    ],
)
def test_defaults_are_the_papers_tldr_settings(method, settings):
    """A method's dataclass keeps the paper's values."""
    assert dataclasses.asdict(method()) == settings


def test_every_method_is_a_frozen_dataclass_that_names_its_source():
    """A method cannot change under a running trainer, cites its paper, and states its rate or None."""
    for factory in METHODS.values():
        assert factory.__dataclass_params__.frozen
        assert "arXiv" in factory.source
        assert issubclass(factory, Method)
        assert factory.equation
        assert factory.optimum
        assert inspect.getdoc(factory)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, None, "much"])
def test_settings_outside_their_range_are_refused(value):
    """Every setting of every method: the error says which, what was found, and what to do."""
    for name, factory in METHODS.items():
        for setting in dataclasses.fields(factory):
            if type(setting.default) is not float or not setting.init:
                continue
            with pytest.raises(ValueError, match=f"{factory.__name__}: {setting.name} is {value!r}; set it to"):
                METHODS[name](**{setting.name: value})


def test_zero_is_refused_where_nothing_would_be_left():
    """γ = 0 in a likelihood, η = 0; RKL needs one of its two."""
    for build in (lambda: PMLE(gamma=0.0), lambda: PD(gamma=0.0), lambda: DPO(gamma=0.0), lambda: REBEL(eta=0.0)):
        with pytest.raises(ValueError, match="more than zero"):
            build()
    with pytest.raises(ValueError, match="both 0"):
        RKL(gamma=0.0, beta=0.0)
    assert RKL(gamma=0.0, beta=0.1).needs.reference


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RLHF(estimator="full"), "RLHF: estimator is 'full'; set it to one of joint, split, ppo"),
        (lambda: PD(pairs="data", kl_in="reward"), "PD: kl_in is 'reward'; set it to one of loss"),
        (lambda: PD(pairs="reference", kl_in="reward"), "PD: kl_in is 'reward'; set it to one of loss"),
        (lambda: Needs(pairs="policy"), "Needs: pairs is 'policy'; write one of labelled, reference, sampled, or sev"),
        (lambda: RLHF(gae_lambda=1.5), "RLHF: gae_lambda is 1.5; set it between 0 and 1"),
    ],
)
def test_a_choice_that_there_is_not_is_refused(build, message):
    """The error names the setting, what was found, and the choices."""
    with pytest.raises(Exception, match="kl_in"):
        PD(kl_in="both")  # pyright: ignore
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_split_and_joint_have_the_same_expectation():
    """Two estimators of one gradient, whatever drew the samples."""
    s = Setting(length=3)
    behavior = s.policy.detach() + 0.3 * s.reference
    for drawn_by in (None, behavior):
        joint = s.expected_loss(RKL(GAMMA, BETA), behavior=drawn_by)
        split = s.expected_loss(RKL(GAMMA, BETA, estimator="split"), behavior=drawn_by)
        torch.testing.assert_close(joint, split, **EXACT)
        torch.testing.assert_close(gradient(joint, s.policy), gradient(split, s.policy), **EXACT)


@pytest.mark.parametrize("method", [RKL(GAMMA, BETA), RLHF(BETA)], ids=["rkl", "rlhf"])
def test_ppo_starts_as_the_policy_gradient(method):
    """With λ = 1 and unscaled advantages the first PPO step follows the exact gradient, whatever the value function."""
    s = Setting(length=3)
    ppo = dataclasses.replace(method, estimator="ppo", gae_lambda=1.0, whiten=False)
    rows = torch.arange(len(s.world.responses))
    drawn = s.world.samples(s.policy, s.reference, s.rewards, rows, None, behavior=s.policy)
    advantages, returns = ppo.credit(drawn)
    drawn = drawn.replace(advantages=advantages, returns=returns, values=drawn.values.detach())
    p = s.world.logps(s.policy).exp().detach()
    losses = torch.stack([ppo.loss(Pairs(), one_row(drawn, row)) for row in rows])
    wanted = exact_objectives(s)["rkl" if type(method) is RKL else "rlhf"]
    torch.testing.assert_close(gradient((p * losses).sum(), s.policy), gradient(wanted, s.policy), **EXACT)
    logps = s.world.logps(s.policy)
    worth = s.rewards - getattr(method, "gamma", 0.0) * logps - BETA * (logps - s.world.logps(s.reference))
    torch.testing.assert_close(returns[:, 0], worth.detach(), **EXACT)
    assert bool((advantages[~drawn.mask] == 0).all())


def one_row(samples, row):
    """The samples of one response."""
    return Samples(**{f.name: getattr(samples, f.name)[row : row + 1] for f in dataclasses.fields(samples)})


def test_whitened_advantages_have_mean_zero_and_variance_one():
    """Over the response tokens of a round; what lies behind the end takes no part."""
    s = Setting(length=3)
    rows = torch.arange(len(s.world.responses))
    drawn = s.world.samples(s.policy, s.reference, s.rewards, rows, None, behavior=s.policy)
    tokens = RKL(GAMMA, BETA, estimator="ppo").credit(drawn)[0][drawn.mask]
    assert tokens.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert tokens.var(correction=0).item() == pytest.approx(1.0)


def test_a_constant_per_prompt_in_the_reward_changes_nothing(method):
    """Rewards are defined up to it: the gradient is the same, and so is the value of every loss over pairs."""
    s, needs = Setting(length=3), method.needs
    if not needs.reward:
        pytest.skip("reads no reward")
    rows, group = torch.tensor([0, 4, 9, 2]), torch.tensor([0, 0, 1, 1])
    pairs, samples = s.pairs(needs), s.samples(needs, rows, group)
    before = method.loss(pairs, samples)
    if needs.pairs:
        constant = torch.linspace(-50, 50, len(s.rows), dtype=torch.float64)[:, None]
        pairs = pairs.replace(rewards=pairs.rewards + constant)
    if hasattr(samples, "rewards"):
        samples = samples.replace(rewards=samples.rewards + torch.tensor([7.0, 7.0, -3.0, -3.0]))
    after = method.loss(pairs, samples)
    torch.testing.assert_close(gradient(after, s.policy), gradient(before, s.policy), **EXACT)
    if needs.pairs:
        torch.testing.assert_close(after, before, **EXACT)


def test_a_declined_field_is_not_silently_none():
    """hasattr asks whether a field was collected; credit is refused by a method without values."""
    samples = Samples(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    assert not hasattr(samples, "rewards")
    assert hasattr(samples, "behavior_token_logps")
    with pytest.raises(TypeError, match="PMLE declares no values"):
        PMLE().credit(samples)


@pytest.mark.parametrize("name", METHODS)
def test_rate_is_claimed_without_a_kl_term_only(name):
    """The theorems are for β = 0; with β > 0 there is a floor."""
    factory = METHODS[name]
    if factory.theorem is None:
        assert factory().rate is None
    else:
        assert factory(beta=0.0).rate == f"1/n ({factory.theorem})"
        assert factory(beta=0.05).rate is None


def test_dataclass_fields_are_all_covered():
    """The table above knows every field of Pairs and Samples."""
    assert set(PAIR_FIELDS) == {f.name for f in dataclasses.fields(Pairs)}
    assert set(SAMPLE_FIELDS) == {f.name for f in dataclasses.fields(Samples)}
