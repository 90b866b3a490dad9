"""Write the tables of docs/observables.md from the words in the code; the prose between is hand-written.

python docs/tables.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gradiometer.control import panel
from gradiometer.engine import cost
from gradiometer.observables import OBSERVABLES
from gradiometer.record.readings import Quantity

PAGE = Path(__file__).parent / "observables.md"
COLUMNS = ("key", "formula", "unit", "cost", "source", "what it tells you", "what to do")
TABLES: dict[str, tuple[str, Mapping[str, Quantity]]] = {
    **{kind.__name__: (kind.group, kind.quantities) for kind in OBSERVABLES},
    "control": (panel.GROUP, panel.QUANTITIES),
    "cost": (cost.COST_GROUP, cost.COST_QUANTITIES),
}
MARKED = re.compile(r"(<!-- table: (?P<names>[\w, ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def written(page: str) -> str:
    """The page with every table made anew.

    Args:
        page: The page, with a pair of marks around each table: ``<!-- table: JacobianNorm -->``, with the
            class names of one or more observables, ``control`` or ``cost``, and ``<!-- end of table -->``.

    Raises:
        SystemExit: If a table stands nowhere, or twice, or a mark names what does not exist.
    """
    names = [name for match in MARKED.finditer(page) for name in match["names"].split(", ")]
    if sorted(names) != sorted(TABLES):
        raise SystemExit(
            f"{PAGE.name} has tables of {sorted(names)}, and the code has {sorted(TABLES)}: write a line "
            "'<!-- table: NAME -->' and a line '<!-- end of table -->' where the missing one is to stand."
        )
    return MARKED.sub(lambda match: match[1] + table(match["names"].split(", ")) + match[3], page)


def table(names: list[str]) -> str:
    """One table of the readings of some observables.

    Args:
        names: As in a mark.
    """
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    rows = [row(group, *item) for group, words in map(TABLES.__getitem__, names) for item in words.items()]
    return "\n".join([*head, *rows]) + "\n"


def row(group: str, name: str, words: Quantity) -> str:
    """One row; a dash stands where the words say nothing.

    Args:
        group: The observable's group.
        name: The reading's name.
        words: Its quantity.
    """
    unit = words.unit.replace("^2", "²")
    cells = (words.formula, unit, words.cost, words.source, words.tells, words.act)
    if any("|" in cell for cell in cells):
        raise SystemExit(f"{group}/{name}: a table takes no '|'; write abs(x), or ‖x‖.")
    return f"| {' | '.join([f'`dynamics/{group}/{name}`', *(cell or '–' for cell in cells)])} |"


def main() -> None:
    """Write the page."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
