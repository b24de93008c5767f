"""`distalign compare`: the methods of a recipe on the same pairs."""

from __future__ import annotations

from typing import Annotated

import typer

from distalign.cli.shared import (
    DataOption,
    JsonOption,
    MarkdownOption,
    ModelOption,
    OutputOption,
    RecipeArgument,
    SetOption,
    WideOption,
    check_path,
    command_line,
    print_numbers,
    print_rich,
    quiet,
    read_recipe,
    read_seeds,
    refuse,
    stoppable,
    write_json,
    write_markdown,
)


def compare(
    recipe: RecipeArgument,
    methods: Annotated[str | None, typer.Option(help="Some of the recipe's methods, with commas.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All methods, not only those that the recipe compares.")] = False,
    seeds: Annotated[str | None, typer.Option(help="How many seeds, or which, with commas: 3 means 0,1,2.")] = None,
    set_: SetOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    output_dir: OutputOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a comparison that was stopped.")] = False,
    wide: WideOption = False,
    json_path: JsonOption = None,
    markdown: MarkdownOption = None,
) -> None:
    """Train a recipe's methods on the same pairs and measure them on held-out prompts."""
    settings = read_recipe(recipe, set_, model=model, data=data, output_dir=output_dir)
    if methods and full:
        refuse("--methods and --full: give one of them")
    default = list(settings.methods) if full else (settings.compare or list(settings.methods))
    chosen = [name.strip() for name in methods.split(",")] if methods else default
    if len(set(chosen)) < len(chosen):
        refuse(f"--methods {methods}: names a method twice")
    for name in chosen:
        if name not in settings.methods:
            refuse(f'{recipe}: recipe has no method "{name}"; it has {", ".join(settings.methods)}')
    chosen_seeds = read_seeds(seeds, settings.seed)
    check_path(json_path)
    check_path(markdown, "--markdown")
    with stoppable(lambda: f"go on with: {command_line('--resume')}"):
        quiet()
        from distalign.experiments.compare import compare as run
        from distalign.report import results_table, write_report

        results = run(settings, chosen, chosen_seeds, resume=resume).content
        page = write_report(settings.run_dir)
    print_numbers(results_table(results), wide)
    for name, differences in results["paired"].items():
        if "forward_kl" in differences:
            change, start = differences["forward_kl"], results["methods"]["reference"]["forward_kl"]["mean"]
            mean, low, high = (100 * change[end] / start for end in ("mean", "low", "high"))
            # Spaces that no line ends at: a number stays with its unit and its interval.
            amount = f"{mean:+.0f}\u00a0% [{low:+.0f},\u00a0{high:+.0f}]".replace("-", "−")
            print_rich(
                f"{name}: forward KL to the target {amount} against the reference "
                f"(paired, 95\u00a0%, {results['methods'][name]['forward_kl']['n']}\u00a0prompts)"
            )
    write_json(json_path, results)
    write_markdown(markdown, results, command_line())
    print(f"results: {settings.run_dir / 'results.json'}\nreport: {page}")
