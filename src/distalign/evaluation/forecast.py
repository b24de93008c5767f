"""The frontier of a reference on real prompts: its responses drawn, rewarded, and weighed for every (β, γ)."""

from __future__ import annotations

import json
from collections.abc import Sequence

from distalign.errors import InputError
from distalign.evaluation.answers import content_key, draw_answers, load_answers
from distalign.evaluation.evaluate import FRONTIER
from distalign.evaluation.frontier import Frontier, predict_frontier
from distalign.evaluation.frontier_estimates import check_coefficients
from distalign.evaluation.results import finite
from distalign.evaluation.settings import Evaluation
from distalign.evaluation.setup import frontier_of, load_base, prepare, reward_of
from distalign.models.targets import Target
from distalign.rewards import Request


def forecast(
    settings: Evaluation,
    *,
    betas: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
    target: Target | None = None,
) -> Frontier:
    """What RKL and RLHF will give at each (β, γ), by the settings' reward, from `samples` responses of the reference.

    Responses are kept by content as those of `evaluate`. Writes frontier.json. Raises InputError without a reward, and
    for fewer than two samples a prompt; ValueError for coefficients that `check_coefficients` refuses. All of it before
    a model is loaded.
    """
    check_coefficients(betas, gammas)
    if not settings.reward:
        raise InputError(f"{settings.name}: a frontier is of a reward, and there is none; add reward to the settings")
    if settings.samples < 2:
        raise InputError(f"{settings.name}: samples is {settings.samples}; a frontier takes two and wants 64 a prompt")
    bench = prepare(settings.model_copy(update={"policies": {}, "judge": None}), target)
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    load_base(bench, target)
    folder = settings.run_dir / "frontier"
    base = bench.sources["reference"]
    key = content_key("reference", base, base, settings, bench.ids, [], bench.end_id)
    answers = load_answers(folder, "reference", key)
    if answers is None:
        answers = draw_answers(
            "reference", key, bench.base, settings, bench.ids, [], end_id=bench.end_id, reference=bench.base
        )
        answers.save(folder)
    reward = reward_of(bench)
    assert reward is not None
    requests = [Request(one.prompt, own, one.row) for one, own in zip(bench.prompts, answers.responses, strict=True)]
    rewards = reward(requests).double().view(len(requests), settings.samples)
    logps = answers.scores["logps"].view(len(requests), settings.samples)
    found = predict_frontier(rewards, logps, betas=betas, gammas=gammas)
    text = json.dumps(finite({**found.to_json(), "of": frontier_of(bench)}), indent=1, ensure_ascii=False)
    (settings.run_dir / FRONTIER).write_text(text, encoding="utf-8")
    return found
