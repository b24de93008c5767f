"""`distalign compare`: the methods of a recipe on the same pairs."""

from __future__ import annotations

from typing import Annotated

import typer

from distalign.cli import shared


def compare(
    recipe: shared.RecipeArgument,
    methods: Annotated[str | None, typer.Option(help="Some of the recipe's methods, with commas.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All methods, not only those that the recipe compares.")] = False,
    seeds: Annotated[str | None, typer.Option(help="How many seeds, or which, with commas: 3 means 0,1,2.")] = None,
    set_: shared.SetOption = None,
    model: shared.ModelOption = None,
    data: shared.DataOption = None,
    output_dir: shared.OutputOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a comparison that was stopped.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over in a folder that holds an earlier comparison.")
    ] = False,
    wide: shared.WideOption = False,
    json_path: shared.JsonOption = None,
    markdown: shared.MarkdownOption = None,
) -> None:
    """Train a recipe's methods on the same pairs and measure them on held-out prompts."""
    settings = shared.read_recipe(recipe, set_, model=model, data=data, output_dir=output_dir)
    if methods and full:
        shared.refuse("--methods and --full: give one of them")
    if resume and overwrite:
        shared.refuse("--resume and --overwrite: give one of them")
    chosen = list(settings.methods) if full else (settings.compare or list(settings.methods))
    if methods:
        chosen = [name.strip() for name in methods.split(",")]
        if len(set(chosen)) < len(chosen):
            shared.refuse(f"--methods {methods}: names a method twice")
        settings = settings.only(chosen)
    chosen_seeds = shared.read_seeds(seeds, settings.seed)
    shared.check_path(json_path)
    shared.check_path(markdown, "--markdown")
    with shared.stoppable(lambda: f"go on with: {shared.command_line('--resume', without='--overwrite')}"):
        shared.quiet()
        from distalign.experiments.compare import compare as run
        from distalign.report import results_table, write_report

        results = run(settings, chosen, chosen_seeds, resume=resume, overwrite=overwrite).content
        page = write_report(settings.run_dir)
    shared.print_numbers(results_table(results), wide)
    for name, differences in results["paired"].items():
        if "forward_kl" in differences:
            change, start = differences["forward_kl"], results["methods"]["reference"]["forward_kl"]["mean"]
            mean, low, high = (100 * change[end] / start for end in ("mean", "low", "high"))
            # Spaces that no line ends at: a number stays with its unit and its interval.
            amount = f"{mean:+.0f}\u00a0% [{low:+.0f},\u00a0{high:+.0f}]".replace("-", "−")
            shared.print_rich(
                f"{name}: forward KL to the target {amount} against the reference "
                f"(paired, 95\u00a0%, {results['methods'][name]['forward_kl']['n']}\u00a0prompts)"
            )
    shared.write_json(json_path, results)
    shared.write_markdown(markdown, results, shared.command_line())
    print(f"results: {settings.run_dir / 'results.json'}\nreport: {page}")
