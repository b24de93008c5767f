"""`distalign methods`: what there is."""

from __future__ import annotations

from distalign.cli.shared import JsonOption, print_table, write_json


def methods(json_path: JsonOption = None) -> None:
    """The methods: their equation, what they need, and the rate at which they reach the target."""
    from distalign.methods import METHODS

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
                "defaults": settings,
                "source": default.source,
                "needs": ", ".join(word for word in words if word),
                "optimum": default.optimum,
                "rate": default.rate or "–",
            }
        )
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    write_json(json_path, {"methods": rows})
