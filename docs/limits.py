"""Write the tables of docs/limits.md from the errors and warnings in the code; the rest is hand-written.

python docs/limits.py
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).parent / "limits.md"
SOURCES = {ROOT / "src" / "gradiometer": "", ROOT / "callbacks": "callbacks/"}
APART = ("conformance/", "demo/")
"""The test suite for estimators and the demo, which no run meets."""
TABLES = {
    "never on this run": {"UnsupportedError"},
    "not at this step": {"SampleSkippedError", "TooEarlyError", "MissingFieldError"},
    "arguments": {"InputError"},
    "warnings": {"warn", "_say"},
    "reasons": {"return"},
}
MARKED = re.compile(r"(<!-- table: (?P<name>[\w ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


class Refusal(NamedTuple):
    """One place in the code that refuses something, or says that it was left out."""

    kind: str
    says: str
    fix: str
    where: str


def refusals(source: str, where: str) -> Iterator[Refusal]:
    """Every refusal of a source whose words stand there.

    Args:
        source: A module's text.
        where: Its path, for the last column.
    """
    tree = ast.parse(source)
    constants = {
        target.id: statement.value
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    for node in sorted(ast.walk(tree), key=lambda node: getattr(node, "lineno", 0)):
        if isinstance(node, ast.Call) and node.args:
            kind = getattr(node.func, "id", getattr(node.func, "attr", ""))
            fixes = [keyword.value for keyword in node.keywords if keyword.arg == "fix"]
            says = _words(node.args[0], constants)
            if any(kind in kinds for kinds in TABLES.values()) and says.strip("… :."):
                yield Refusal(kind, says, _words(fixes[0], constants) if fixes else "", where)
        elif isinstance(node, ast.FunctionDef) and node.returns is not None and _may_refuse(node):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    says = _words(inner.value, constants)
                    if " " in says.strip("… "):
                        yield Refusal("return", says, "", where)


def _may_refuse(function: ast.FunctionDef) -> bool:
    """Whether a function returns a reason, or where there is none another type or no words."""
    parts = ast.unparse(function.returns).split(" | ") if function.returns is not None else []
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    empty = any(isinstance(value, ast.Constant) and value.value == "" for value in returned)
    return "str" in parts and (len(parts) > 1 or empty)


def _words(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """A text of the code, with dots for what is put in when it is said."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        inside = _words(node.value, constants) if isinstance(node.value, ast.Name) else ""
        return inside or "…"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _words(node.left, constants) + _words(node.right, constants)
    if isinstance(node, ast.Name) and isinstance(constants.get(node.id), (ast.Constant, ast.JoinedStr)):
        return _words(constants[node.id], constants)
    return ""


def everything() -> list[Refusal]:
    """The refusals of all sources, in the order of their files."""
    return [
        refusal
        for root, prefix in SOURCES.items()
        for path in sorted(root.rglob("*.py"))
        for where in [prefix + path.relative_to(root).as_posix()]
        if not where.startswith(APART)
        for refusal in refusals(path.read_text(encoding="utf-8"), where)
    ]


def table(name: str, found: list[Refusal]) -> str:
    """One table.

    Args:
        name: As in a mark.
        found: The refusals of the code.
    """
    rows = list(dict.fromkeys(refusal for refusal in found if refusal.kind in TABLES[name]))
    with_fix = any(row.fix for row in rows)
    columns = ("what is said", *(["what to write instead"] if with_fix else []), "file")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (row.says, *([row.fix or "–"] if with_fix else []), f"`{row.where}`")
        lines.append(
            f"| {' | '.join(' '.join(cell.replace('|', '/').lstrip('; ').split()) for cell in cells)} |"
        )
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """The page with every table made anew.

    Args:
        page: The page, with a pair of marks around each table.

    Raises:
        SystemExit: If a table is missing.
    """
    names = [match["name"] for match in MARKED.finditer(page)]
    if sorted(names) != sorted(TABLES):
        raise SystemExit(f"{PAGE.name} has tables of {sorted(names)}, and there are {sorted(TABLES)}.")
    found = everything()
    return MARKED.sub(lambda match: match[1] + table(match["name"], found) + match[3], page)


def main() -> None:
    """Write the page."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
