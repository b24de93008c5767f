"""`distalign methods`: what there is."""

from __future__ import annotations

from distalign.cli import shared


def methods(wide: shared.WideOption = False, json_path: shared.JsonOption = None) -> None:
    """The methods: their equation, what they need, and the rate at which they reach the target."""
    from distalign.methods import METHODS
    from distalign.report.terminal import Fitting, Texts

    rows = []
    for name, method in METHODS.items():
        default = method()
        settings = ", ".join(
            f"{key} {value:g}" if type(value) is float else f"{key} {value}" for key, value in vars(default).items()
        )
        needs = default.needs
        words = [f"{needs.pairs} pairs" if needs.pairs else "", "samples" if needs.samples else ""]
        words += ["reward" if needs.reward else "", "reference" if needs.reference or needs.kl else ""]
        rows.append(
            {
                "method": name,
                "minimises": default.equation,
                "rate at β = 0": f"1/n ({default.theorem})" if default.theorem else "none",
                "needs": ", ".join(word for word in words if word),
                "optimum": default.optimum,
                "defaults": settings,
                "source": default.source,
            }
        )
    names, *columns = (Texts(key, [row[key] for row in rows], right=False) for key in rows[0])
    shared.print_numbers(Fitting(names, columns), wide)
    shared.write_json(json_path, {"methods": rows})
