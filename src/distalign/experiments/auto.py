"""A recipe's `auto` becomes a number: chosen on the training pairs (`training.auto`), logged with its reason."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

from transformers import PreTrainedModel

from distalign.data import EncodedPair, prompts_of
from distalign.engine import Group, score_in_batches
from distalign.errors import InputError
from distalign.experiments.recipe import Recipe
from distalign.rewards.potential import PROMPTS, SAMPLES
from distalign.rollout.sample import sample
from distalign.training.auto import Choice, Evidence, choose_beta, choose_gamma, count_evidence, labels_of

logger = logging.getLogger("distalign.experiments.auto")

SUBSET = 1024  # training pairs that are looked at


def settle_gamma(recipe: Recipe, base: PreTrainedModel, train: Sequence[EncodedPair]) -> Recipe:
    """The recipe with a number for γ where it is auto: a known target's own, else the start's calibration.

    Raises InputError where the pairs do not say.
    """
    names = recipe.automatic("gamma")
    if not names:
        return recipe
    if recipe.target is not None:
        choice = Choice(recipe.target.gamma, "the known target's own")
    else:
        pairs = _some(train, recipe.seed)
        groups = [Group(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]
        logps = score_in_batches(base, groups, token_budget=recipe.forward_budget).logps
        try:
            choice = choose_gamma(logps.view(-1, 2).cpu(), labels_of(pairs))
        except ValueError as error:
            raise InputError(f"{recipe.name}: gamma is auto, which these pairs do not say ({error})") from None
    logger.info("gamma auto (%s) is %s", ", ".join(names), choice)
    return recipe.with_numbers("gamma", dict.fromkeys(names, choice.value))


def settle_beta(recipe: Recipe, base: PreTrainedModel, train: Sequence[EncodedPair], end_id: int) -> Recipe:
    """The recipe with a number for β where it is auto; every γ is a number already."""
    names = recipe.automatic("beta")
    if not names:
        return recipe
    pairs = _some(train, recipe.seed)
    prompts = [one.prompt for one in prompts_of(pairs)][:PROMPTS]
    length = recipe.rollout.max_completion_length
    responses = sample(base, prompts, n=SAMPLES, max_new_tokens=length, end_id=end_id, seed=20_000)
    read: dict[float, Evidence] = {}
    numbers = {}
    for name in names:
        needs, gamma = recipe.method(name).needs, recipe.methods[name]["gamma"]
        if needs.pairs != "labelled" and all(one.exact for one in recipe.reward):
            choice = Choice(0.0, "the exact reward has no noise")
        else:
            if gamma not in read:
                read[gamma] = count_evidence(
                    base, pairs, prompts, responses, gamma=gamma, n=len(train), token_budget=recipe.forward_budget
                )
            choice = choose_beta(needs, read[gamma])
        logger.info("beta auto (%s) is %s", name, choice)
        numbers[name] = choice.value
    return recipe.with_numbers("beta", numbers)


def _some(pairs: Sequence[EncodedPair], seed: int) -> list[EncodedPair]:
    """At most `SUBSET` of the pairs."""
    return list(pairs) if len(pairs) <= SUBSET else random.Random(seed).sample(pairs, SUBSET)
