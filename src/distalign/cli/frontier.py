"""`distalign frontier`: what each (β, γ) will give, before training."""

from __future__ import annotations

from typing import Annotated

import typer

from distalign.cli.shared import (
    EvaluationArgument,
    JsonOption,
    PromptsOption,
    ReferenceOption,
    SetOption,
    check_path,
    overrides,
    print_rich,
    quiet,
    refuse,
    write_json,
)


def frontier(
    recipe: EvaluationArgument,
    samples: Annotated[int, typer.Option(help="Responses of the reference to each prompt.", min=2)] = 64,
    betas: Annotated[
        str | None, typer.Option(help="KL weights, with commas; chosen by the rewards if not given.")
    ] = None,
    gammas: Annotated[str | None, typer.Option(help="Entropy weights, with commas; 0 is RLHF.")] = None,
    kl_budget: Annotated[float | None, typer.Option(help="Recommend within this KL, in nats per response.")] = None,
    set_: SetOption = None,
    model: ReferenceOption = None,
    prompts: PromptsOption = None,
    json_path: JsonOption = None,
) -> None:
    """Predict reward, KL and entropy of each (β, γ) before training, from responses of the reference."""
    check_path(json_path)
    weights, entropies = _numbers("--betas", betas), _numbers("--gammas", gammas)
    quiet()
    from distalign.evaluation.frontier import forecast
    from distalign.evaluation.setup import load_evaluation

    flags = [*overrides(model=model, prompts=prompts), f"samples={samples}", *(set_ or [])]
    settings = load_evaluation(recipe, flags, [])
    try:
        result = forecast(settings, betas=weights, gammas=entropies)
    except ValueError as error:
        refuse(f"frontier: {error}")
    print_rich(result.table())
    write_json(json_path, result.to_json())
    print(f"frontier: {settings.run_dir / 'frontier.json'}")
    if kl_budget is not None:
        try:
            print(result.recommend(kl_budget))
        except ValueError as error:
            refuse(f"--kl-budget {kl_budget:g}: {error}")


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        refuse(f"{option} {text}: not numbers; write them with commas, as 0.1,0.5,2")
