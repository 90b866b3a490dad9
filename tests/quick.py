"""Which tests ``make quick`` runs: those of the folders that were changed, and of the folders above them.

Changed is what differs from the last commit; where nothing does, what the last commit changed. The folders
above are those in later rows of the house in docs/design.md: they may import from it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
BESIDE = {
    "benchmarks": "tests/test_benchmarks.py",
    "docs": "tests/test_docs.py",
    "examples": "tests/test_examples.py",
    "README.md": "tests/test_docs.py",
    "setup.cfg": "tests/test_packaging.py",
    "pyproject.toml": "tests/test_packaging.py",
}


def house() -> list[list[str]]:
    """The rows of the list in the design document, names only."""
    text = (ROOT / "docs" / "design.md").read_text().partition("## The house")[2]
    lines = text.split("```")[1].strip().splitlines()
    return [re.findall(r"(\w+)(?:/|\.py)(?= |$)", line.split("     ")[0]) for line in lines]


def changed_files() -> list[str]:
    def git(*arguments: str) -> list[str]:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    return [
        *git("diff", "--name-only", "HEAD"),
        *git("ls-files", "--others", "--exclude-standard"),
    ] or git("diff", "--name-only", "HEAD~1")


def affected(files: Iterable[str]) -> list[str]:
    """Folders and files of tests, as pytest takes them.

    Args:
        files: Paths of changed files from the root of the repository.
    """
    rows = house()
    row = {name: number for number, names in enumerate(rows) for name in names}
    wanted = {"tests/test_layers.py"}
    lowest = len(rows)
    for path in map(Path, files):
        top = path.parts[0]
        if top == "tests":
            inside = ROOT / "tests" / path.parts[1]
            wanted.add("tests" if inside.name in ("conftest.py", "zoo.py") else f"tests/{inside.name}")
        elif top == "src":
            part = path.parts[2].removesuffix(".py")
            lowest = min(lowest, row.get(part, len(rows) - 1))
        elif top == "callbacks":
            lowest = min(lowest, row["callbacks"])
        elif top in BESIDE:
            wanted.add(BESIDE[top])
    if lowest < len(rows):  # what stands above every folder, and a folder of tests for each part
        wanted |= {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")}
        above = {name for names in rows[lowest:] for name in names}
        wanted |= {f"tests/{name}" for name in above if (ROOT / "tests" / name).is_dir()}
    return ["tests"] if "tests" in wanted else sorted(path for path in wanted if (ROOT / path).exists())


if __name__ == "__main__":
    print(*affected(changed_files()))
