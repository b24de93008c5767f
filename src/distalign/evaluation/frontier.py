"""What RKL and RLHF will give at each (β, γ), predicted from samples of the reference before anything is trained.

The optimum of −E[R] − γ H(π) + β KL(π ‖ π₀) is known (arXiv 2506.01523v2, appendix B), so responses of π₀ can be
weighted as if they were its own:

    π ∝ π₀ w,   ln w = (R − γ ln π₀) / (β + γ)

Everything is estimated for each prompt and averaged over THESE prompts. A ratio of sums over G samples is off by
O(1/G) on every prompt, which averaging over prompts does not cure: the jackknife over samples takes it out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distalign.errors import InputError
from distalign.evaluation.answers import policy_answers
from distalign.evaluation.results import finite
from distalign.evaluation.setup import Evaluation, load_setup
from distalign.models.targets import Target
from distalign.rewards import Request
from distalign.stats.intervals import student_quantile
from distalign.training.run_folder import locked, writable

# In a folder of its own: an evaluation of the same name draws its policies on the frontier.
FRONTIER = "frontier.json"

# Below these the samples miss what the optimum is made of, and no band on them can say by how much.
ENOUGH_IN_ALL = 100.0
ENOUGH_PER_PROMPT = 20.0


@dataclass(frozen=True)
class Band:
    """An estimate and its 90 % band, in the unit of the quantity, for the same prompts with endless samples.

    `se_prompts` is the standard error over prompts (NaN for one prompt): for OTHER prompts of the same kind, the
    samples' noise included.
    """

    value: float
    low: float
    high: float
    se_prompts: float


@dataclass(frozen=True)
class Point:
    """What the optimum at (β, γ) has: E[R] in the reward's unit, KL(π ‖ π₀) and H(π) per response in nats.

    γ = 0 is RLHF. `ess` is the number of responses of the optimum itself, spread evenly over the prompts, that would
    be worth as much as the samples of π₀: P² / Σ_p 1/ESS_p, ESS_p = (Σ w)² / Σ w².
    """

    beta: float
    gamma: float
    reward: Band
    kl: Band
    entropy: Band
    ess: float
    ess_per_prompt: float

    @property
    def trusted(self) -> bool:
        """Whether the samples reach far enough for the bands to mean what they say."""
        return self.ess >= ENOUGH_IN_ALL and self.ess_per_prompt >= ENOUGH_PER_PROMPT

    @property
    def warning(self) -> str | None:
        """Why the point is not to be trusted and what to do, or None."""
        if self.trusted:
            return None
        return (
            f"β {self.beta:g}, γ {self.gamma:g}: the samples are worth {self.ess:.0f} of the optimum's own, "
            f"{self.ess_per_prompt:.1f} a prompt ({ENOUGH_IN_ALL:.0f} and {ENOUGH_PER_PROMPT:.0f} are needed), so its "
            "KL and most likely its reward are higher than shown; raise β or draw more samples per prompt"
        )


@dataclass(frozen=True)
class BestOfN:
    """The best of n responses of π₀ by reward: E[R], and an upper bound of its KL(π ‖ π₀), in nats."""

    n: int
    reward: Band
    kl_bound: float


def check_coefficients(betas: Sequence[float] | None, gammas: Sequence[float] | None) -> None:
    """Raise ValueError unless every β and γ is finite and at least 0, and no β = 0 meets γ = 0, which has no optimum.

    None stands for what `default_grid` gives: β above 0, and γ of which one is 0.
    """
    for gamma in [0.0] if gammas is None else gammas:
        for beta in [1.0] if betas is None else betas:
            if not (0 <= beta < math.inf and 0 <= gamma < math.inf and beta + gamma > 0):
                given = "" if gammas is not None else " (of the grid taken where no gammas are given)"
                raise ValueError(
                    f"beta {beta:g}, gamma {gamma:g}{given}: both are finite, neither may be negative, nor both be 0; "
                    "leave that value out"
                )


def best_of_n(rewards: Float[Tensor, "prompts samples"], ns: Sequence[int]) -> list[BestOfN]:
    """Expected reward of the best of n, in the reward's unit, without bias, from G samples a prompt.

        Σ_k C(k − 1, n − 1) / C(G, n) R_(k),   R_(1) ≤ … ≤ R_(G)

    Its KL is at most ln n − (n − 1)/n, and is that where no two responses have the same reward and each is improbable
    (arXiv 2401.01879). Raises ValueError unless 1 ≤ n ≤ G/2: from there on one sample decides, and no error is known.
    """
    ordered = _checked(rewards, "rewards").sort(-1).values
    samples = ordered.shape[1]
    best = []
    for n in ns:
        if not 1 <= n <= samples // 2:
            raise ValueError(f"best of {n} from {samples} samples a prompt; take n from 1 to {samples // 2}")
        fewer = _order_weights(samples - 1, n)
        below = (ordered[:, :-1] * fewer).cumsum(-1)
        above = (ordered[:, 1:] * fewer).flip(-1).cumsum(-1).flip(-1)
        zero = ordered.new_zeros(len(ordered), 1)
        left_out = torch.cat([zero, below], -1) + torch.cat([above, zero], -1)
        band = _band((ordered * _order_weights(samples, n)).sum(-1), left_out)
        best.append(BestOfN(n, band, math.log(n) - (n - 1) / n))
    return best


def default_grid(
    rewards: Float[Tensor, "prompts samples"], logps: Float[Tensor, "prompts samples"]
) -> tuple[list[float], list[float]]:
    """(betas, gammas) worth a look, in units of the rewards' and log-probs' own spread within a prompt.

    β from a quarter of the rewards' standard deviation to eight; γ 0 (RLHF) and up to where γ ln π₀ (nats) varies as
    much as the reward. Raises ValueError where either does not vary within any prompt.
    """
    spread, width = (
        float(_checked(x, name).var(-1).mean().sqrt()) for x, name in ((rewards, "rewards"), (logps, "logps"))
    )
    if not (spread > 0 and width > 0):
        raise ValueError("rewards or logps are the same for all samples of every prompt; there is nothing to weigh")
    betas = [spread * 2.0**k for k in range(-2, 4)]
    gammas = [0.0, *(spread / width * factor for factor in (0.1, 0.3, 1.0))]
    return [float(f"{x:.2g}") for x in betas], [float(f"{x:.2g}") for x in gammas]


def mean_band(values: Float[Tensor, "prompts samples"]) -> Band:
    """The plain mean of samples with its band: what π₀ itself has."""
    total = values.sum(-1)
    return _band(total / values.shape[1], (total[:, None] - values) / (values.shape[1] - 1))


def _point(
    rewards: Float[Tensor, "prompts samples"], logps: Float[Tensor, "prompts samples"], beta: float, gamma: float
) -> Point:
    log_weights = (rewards - gamma * logps) / (beta + gamma)
    shift = log_weights.amax(-1)
    weights = (log_weights - shift[:, None]).clamp(min=-600).exp()  # not 0, so that some weight is always left

    samples = rewards.shape[1]
    mass, mass_left = _sums(weights, torch.ones_like(weights))
    weighted, weighted_left = _sums(weights, torch.stack([rewards, logps]))

    def estimates(mass: Tensor, weighted: Tensor, shift: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        reward, logp = weighted / mass
        kl = (reward - gamma * logp) / (beta + gamma) - shift - (mass / samples).log()
        return reward, kl, -(logp + kl)

    whole = estimates(mass, weighted, shift, samples)
    left_out = estimates(mass_left, weighted_left, shift[:, None], samples - 1)
    reward, kl, entropy = (_band(*both) for both in zip(whole, left_out, strict=True))
    inverse = float((weights.square().sum(-1) / weights.sum(-1).square()).mean())
    return Point(beta, gamma, reward, kl, entropy, len(rewards) / inverse, 1 / inverse)


def _sums(
    weights: Float[Tensor, "prompts samples"], values: Float[Tensor, "*kinds prompts samples"]
) -> tuple[Float[Tensor, "*kinds prompts"], Float[Tensor, "*kinds prompts samples"]]:
    """Σ w f, and the same without each sample. What remains without the heaviest is summed, not subtracted."""
    terms = weights * values
    heaviest = weights.argmax(-1, keepdim=True).expand(*terms.shape[:-1], 1)
    others = terms.scatter(-1, heaviest, 0.0).sum(-1, keepdim=True)
    total = others + terms.gather(-1, heaviest)
    return total[..., 0], (total - terms).scatter(-1, heaviest, others)


def _band(whole: Float[Tensor, "prompts"], left_out: Float[Tensor, "prompts samples"]) -> Band:
    """Average over prompts of a statistic of each prompt's samples, from it and its values without each sample.

    The value is the jackknife's, free of the O(1/G) bias. The band inverts Hall's cubic transformation (Hall 1992,
    Journal of the Royal Statistical Society B 54, 221-228), which takes the skewness out of a studentised sum, at
    Student's quantile for the number of samples that carry the error, (Σψ²)² / Σψ⁴.
    """
    prompts, samples = left_out.shape
    mean = left_out.mean(-1)
    values = samples * whole - (samples - 1) * mean
    influence = (mean[:, None] - left_out) * (math.sqrt((samples - 1) / samples) / prompts)
    value, variance = float(values.mean()), float(influence.square().sum())
    se_prompts = float(values.std()) / math.sqrt(prompts) if prompts > 1 else math.nan
    se, scaled = math.sqrt(variance), influence / math.sqrt(variance) if variance > 0 else influence
    skewness, carrying = float(scaled.pow(3).sum()), 1 / max(float(scaled.pow(4).sum()), 1e-12)
    quantile = student_quantile(max(1, int(carrying)), level=0.90)
    low, high = (value - se * _unskewed(side, skewness) for side in (quantile, -quantile))
    return Band(value, low, high, se_prompts)


def _unskewed(quantile: float, skewness: float) -> float:
    """The studentised sum that Hall's transformation T + κT²/3 + κ²T³/27 + κ/6 takes to the quantile."""
    if abs(skewness) < 1e-6:
        return quantile
    return 3 / skewness * (float(np.cbrt(1 + skewness * (quantile - skewness / 6))) - 1)


def _order_weights(samples: int, n: int) -> Float[Tensor, "samples"]:
    """Probability that the k-th smallest of the samples is the largest of n of them, drawn without replacement."""
    k = torch.arange(1, samples + 1, dtype=torch.float64)
    log_binomial = torch.lgamma(k) - math.lgamma(n) - torch.lgamma((k - n + 1).clamp(min=1))
    log_all = math.lgamma(samples + 1) - math.lgamma(n + 1) - math.lgamma(samples - n + 1)
    return torch.where(k >= n, (log_binomial - log_all).exp(), 0.0)


def _checked(values: Float[Tensor, "prompts samples"], name: str) -> Float[Tensor, "prompts samples"]:
    values = values.detach().to("cpu", torch.float64)
    if len(values) < 1 or values.shape[1] < 2:
        raise ValueError(f"{name} are {list(values.shape)}; give at least one prompt with two samples")
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        prompt, sample = bad[0].tolist()
        raise ValueError(f"{name}[{prompt}, {sample}] is {float(values[prompt, sample])}; draw that response again")
    return values


# All points together --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recommendation:
    """What to train within a KL budget: points that are trusted and whose band of KL ends within it.

    `highest_reward`: the most reward. For a given KL no policy has more than RLHF's, so γ = 0 is often it.
    `keeps_entropy`: the most reward among those that keep the wanted share of the reference's entropy, or None.
    `by_gamma`: the most reward for each γ, for those who know γ (from `calibrate`) and look for β.
    """

    kl_budget: float
    entropy_floor: float
    highest_reward: Point
    keeps_entropy: Point | None
    by_gamma: tuple[Point, ...]

    def __str__(self) -> str:
        lines = [
            f"KL of at most {self.kl_budget:g} nats: β {self.highest_reward.beta:g}, γ {self.highest_reward.gamma:g} "
            f"has the highest reward, {_cell(self.highest_reward.reward)}, with entropy "
            f"{_cell(self.highest_reward.entropy)}."
        ]
        floor = f"an entropy of at least {self.entropy_floor:.3g} nats"
        if self.keeps_entropy is None:
            lines.append(f"None has {floor}; take a larger γ or β.")
        elif self.keeps_entropy is not self.highest_reward:
            point = self.keeps_entropy
            lines.append(f"With {floor}: β {point.beta:g}, γ {point.gamma:g}, reward {_cell(point.reward)}.")
        return "\n".join(lines)


@dataclass(frozen=True)
class Frontier:
    """Points, best-of-n and what the reference itself has, all on the same prompts and samples."""

    points: tuple[Point, ...]
    best_of: tuple[BestOfN, ...]
    reference_reward: Band
    reference_entropy: Band
    prompts: int
    samples: int

    @property
    def warnings(self) -> list[str]:
        """One line for every point that is not to be trusted."""
        return [point.warning for point in self.points if point.warning]

    def recommend(self, kl_budget: float, *, keep_entropy: float = 0.9) -> Recommendation:
        """What to train so that KL(π ‖ π₀) per response stays within `kl_budget` nats on prompts like these.

        `keep_entropy` is a fraction of the reference's entropy. Raises ValueError if no trusted point is that near.
        """
        within = [point for point in self.points if point.trusted and point.kl.high <= kl_budget]
        if not within:
            nearest = min((p for p in self.points if p.trusted), key=lambda p: p.kl.high, default=None)
            known = (
                "no point is trusted" if nearest is None else f"the nearest trusted one has {_cell(nearest.kl)} nats"
            )
            raise ValueError(
                f"no point with a KL within {kl_budget:g} nats: {known}; try larger β, or more samples per prompt"
            )
        floor = keep_entropy * self.reference_entropy.value
        broad = [point for point in within if point.entropy.value >= floor]
        best = {gamma: [p for p in within if p.gamma == gamma] for gamma in sorted({p.gamma for p in within})}

        def reward(point: Point) -> float:
            return point.reward.value

        by_gamma = tuple(max(points, key=reward) for points in best.values())
        highest, keeps = max(within, key=reward), max(broad, key=reward, default=None)
        return Recommendation(kl_budget, floor, highest, keeps, by_gamma)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file: numbers, texts, lists and dictionaries; NaN as None."""
        content = {
            "prompts": self.prompts,
            "samples": self.samples,
            "reference": {"reward": asdict(self.reference_reward), "entropy": asdict(self.reference_entropy)},
            "points": [{**asdict(p), "trusted": p.trusted, "warning": p.warning} for p in self.points],
            "best_of": [asdict(best) for best in self.best_of],
        }
        return {key: finite(part) for key, part in content.items()}


def predict_frontier(
    rewards: Float[Tensor, "prompts samples"],
    logps: Float[Tensor, "prompts samples"],
    *,
    betas: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
) -> Frontier:
    """The optimum's reward, KL and entropy at every (β, γ), from samples of π₀ alone; γ varies slowest.

    `rewards` are R̂ and `logps` ln π₀ of the samples, sums over tokens in nats, of the distribution that they were drawn
    from (temperature included), end-of-sequence included. None takes the grid of `default_grid`. Best-of-n stands
    beside it for n = 2, 4, 8 … up to a quarter of the samples.

    Raises ValueError for fewer than two samples, a number that is not finite, a negative β or γ, or β = γ = 0.
    """
    check_coefficients(betas, gammas)
    rewards, logps = _checked(rewards, "rewards"), _checked(logps, "logps")
    if betas is None or gammas is None:
        default = default_grid(rewards, logps)
        betas, gammas = default[0] if betas is None else betas, default[1] if gammas is None else gammas
    prompts, samples = rewards.shape
    points = tuple(_point(rewards, logps, float(beta), float(gamma)) for gamma in gammas for beta in betas)
    ns = [2**k for k in range(1, samples.bit_length()) if 4 * 2**k <= samples]
    reward, entropy = (mean_band(values.double()) for values in (rewards, -logps))
    return Frontier(points, tuple(best_of_n(rewards, ns)), reward, entropy, prompts, samples)


def _cell(band: Band) -> str:
    return f"{band.value:.3g} [{band.low:.3g}, {band.high:.3g}]"


# From a reference and its prompts -------------------------------------------------------------------------------------


def forecast(
    settings: Evaluation,
    *,
    betas: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
    target: Target | None = None,
) -> Frontier:
    """The frontier of the settings' reward, from `samples` responses of the reference to each prompt.

    Responses are kept by content as those of `evaluate`. Writes frontier.json. Raises InputError without a reward, and
    for fewer than two samples of each prompt; ValueError for coefficients that `check_coefficients` refuses. All of it
    before a model is loaded.
    """
    check_coefficients(betas, gammas)
    if not settings.reward:
        raise InputError(f"{settings.name}: a frontier is of a reward, and there is none; add reward to the settings")
    if settings.samples < 2:
        raise InputError(f"{settings.name}: samples is {settings.samples}; a frontier takes two and wants 64 a prompt")
    folder = writable(settings.frontier_dir)
    with locked(folder):
        setup = load_setup(settings.model_copy(update={"policies": {}, "judge": None}), target)
        answers = policy_answers(setup, "reference", folder / "reference", [])
        reward = setup.reward()
        assert reward is not None
        requests = [
            Request(one.prompt, own, one.row) for one, own in zip(setup.prompts, answers.responses, strict=True)
        ]
        rewards = reward(requests).double().view(len(requests), settings.samples)
        logps = answers.scores["logps"].view(len(requests), settings.samples)
        frontier = predict_frontier(rewards, logps, betas=betas, gammas=gammas)
        text = json.dumps({**frontier.to_json(), "of": setup.identity()}, indent=1, ensure_ascii=False)
        (folder / FRONTIER).write_text(text, encoding="utf-8")
        return frontier
