"""Labels that no target fits: what they look like, what they cost, and what to do instead."""

from __future__ import annotations

from collections.abc import Sequence

from distalign.data.pairs import Pair

# Below this share of the pairs nothing is said.
FEW = 0.01


def label_warnings(rows: Sequence[Pair]) -> list[str]:
    """One sentence for each kind of label by which the methods miss the target however many pairs there are.

    The floors (nats) were computed on a target of few responses known exactly: docs/data.md.
    """
    ties = sum(row.probability == 0.5 for row in rows) / len(rows) if rows else 0.0
    of_several = sum(any(_several(value) for value in row.extra.values()) for row in rows)
    found = []
    if ties > FEW:
        found.append(
            f"{100 * ties:.0f} % of the pairs are ties written as p_chosen 0.5: learned as such they keep a distance "
            "from the target (0.01 nats at 19 % ties, 0.09 at 48 %); leave them out with drop_ties"
        )
    if of_several > FEW * len(rows):
        found.append(
            f"{of_several} rows hold several responses of which the pair is two: if chosen is the best and rejected "
            "the worst, the distance from the target has a floor (0.3 nats); pair the best with a random other"
        )
    return found


def _several(value: object) -> bool:
    """Whether a column holds three responses or more: texts with what was said of them."""
    if not isinstance(value, list) or len(value) < 3:
        return False
    return all(isinstance(one, dict) and {"response", "text", "completion"} & one.keys() for one in value)
