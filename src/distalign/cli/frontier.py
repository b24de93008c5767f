"""`distalign frontier`: what each (β, γ) will give, before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from distalign.cli import shared

if TYPE_CHECKING:
    from distalign.evaluation.frontier import Band, Frontier
    from distalign.report.terminal import Fitting


def frontier(
    recipe: shared.RecipeArgument,
    samples: Annotated[int, typer.Option(help="Responses of the reference to each prompt.", min=2)] = 64,
    betas: Annotated[
        str | None, typer.Option(help="KL weights, with commas; chosen by the rewards if not given.")
    ] = None,
    gammas: Annotated[str | None, typer.Option(help="Entropy weights, with commas; 0 is RLHF.")] = None,
    kl_budget: Annotated[float | None, typer.Option(help="Recommend within this KL, in nats per response.")] = None,
    set_: shared.SetOption = None,
    model: shared.ModelOption = None,
    prompts: shared.PromptsOption = None,
    pairs: shared.HeldOutOption = None,
    output_dir: shared.OutputOption = None,
    wide: shared.WideOption = False,
    json_path: shared.JsonOption = None,
) -> None:
    """Predict reward, KL and entropy of each (β, γ) before training, from responses of the reference."""
    shared.check_path(json_path)
    if kl_budget is not None and not kl_budget >= 0:
        shared.refuse(f"--kl-budget {kl_budget:g}: give nats per response, 0 or more")
    weights, entropies = _numbers("--betas", betas), _numbers("--gammas", gammas)
    with shared.stoppable(lambda: f"what was answered is kept; go on with: {shared.command_line()}"):
        shared.quiet()
        from distalign.evaluation.frontier import FRONTIER, forecast
        from distalign.evaluation.setup import load_evaluation
        from distalign.rewards.potential import saved_potential

        # The prompts of the pairs that are given come before the recipe's prompts.
        flags = ["prompts=null"] if pairs and not prompts else []
        flags += shared.overrides(model=model, prompts=prompts, pairs=pairs, output_dir=output_dir)
        settings = load_evaluation(recipe, [*flags, f"samples={samples}", *(set_ or [])])
        potentials = [line for one in settings.reward for line in saved_potential(one.model)]
        try:
            result = forecast(settings, betas=weights, gammas=entropies)
        except ValueError as error:
            shared.refuse(f"frontier: {error}")
    shared.print_numbers(frontier_table(result), wide)
    shared.write_json(json_path, result.to_json())
    print(f"frontier: {settings.frontier_dir / FRONTIER}")
    for line in potentials:
        print(line)
    if kl_budget is not None:
        try:
            shared.print_rich(str(result.recommend(kl_budget)))
        except ValueError as error:
            shared.refuse(f"--kl-budget {kl_budget:g}: {error}")


def frontier_table(frontier: Frontier) -> Fitting:
    """The points and best-of-n for a terminal; those not to be trusted are dim."""
    from rich.text import Text

    from distalign.report.numbers import format_interval
    from distalign.report.terminal import Fitting, Texts

    def cell(band: Band) -> str:
        return format_interval(band.value, band.low, band.high, sign="")

    start = ("reference", "", cell(frontier.reference_reward), "0", cell(frontier.reference_entropy), "", "")
    rows = [[Text(part) for part in start]]
    for point in frontier.points:
        names = f"{point.beta:g}", f"{point.gamma:g}" if point.gamma else "0 (RLHF)"
        cells = [cell(band) for band in (point.reward, point.kl, point.entropy)]
        style = "" if point.trusted else "dim"
        sizes = f"{point.ess:.0f}", f"{point.ess_per_prompt:.1f}"
        rows.append([Text(part, style) for part in (*names, *cells, *sizes)])
    for best in frontier.best_of:
        line = (f"best of {best.n}", "", cell(best.reward), f"≤ {best.kl_bound:.3g}", "", "", "")
        rows.append([Text(part) for part in line])
    heads = ("β", "γ", "reward", "KL(π‖π₀)\nnats", "entropy\nnats", "ESS", "per prompt")
    names, *columns = (Texts(head, [row[i] for row in rows]) for i, head in enumerate(heads))
    doubtful = len(frontier.warnings)
    return Fitting(
        names,
        columns,
        title=f"Predicted from {frontier.samples} samples of the reference on each of {frontier.prompts} prompts",
        note=f"dim: {doubtful} points with too few effective samples (ESS) to trust" if doubtful else "",
    )


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        shared.refuse(f"{option} {text}: not numbers; write them with commas, as 0.1,0.5,2")
