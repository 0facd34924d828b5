"""Print the shape of the code: untyped dicts, wide lines and long functions.

    python bench/house.py [FOLDER]

ft_assets_tests/test_house.py has the limits and tests them.
"""

import argparse
import ast
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ft_assets"
COLUMNS = 100
LONG = 60


@dataclass(frozen=True)
class Shape:
    """Counts over all Python files of a folder."""

    files: int
    lines: int
    untyped_dicts: int
    wide_lines: int
    functions: int
    long_functions: int

    @property
    def untyped_dicts_per_kloc(self) -> float:
        return 1000 * self.untyped_dicts / self.lines

    @property
    def long_function_share(self) -> float:
        return self.long_functions / self.functions


def shape_of(folder: Path) -> Shape:
    """Count `dict[str, Any]`, lines above 100 columns and functions above 60 lines."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))]
    lines = [line for text in texts for line in text.splitlines()]
    sizes = [
        node.end_lineno - node.lineno + 1
        for text in texts
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    ]
    return Shape(
        files=len(texts),
        lines=len(lines),
        untyped_dicts=sum(text.count("dict[str, Any]") for text in texts),
        wide_lines=sum(len(line) > COLUMNS for line in lines),
        functions=len(sizes),
        long_functions=sum(size > LONG for size in sizes),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=PACKAGE)
    shape = shape_of(parser.parse_args().folder)
    print(f"files                       {shape.files}")
    print(f"lines                       {shape.lines}")
    print(f"dict[str, Any]              {shape.untyped_dicts}")
    print(f"  per 1,000 lines           {shape.untyped_dicts_per_kloc:.1f}")
    print(f"lines above {COLUMNS} columns     {shape.wide_lines / shape.lines:.1%}")
    print(f"functions above {LONG} lines    {shape.long_function_share:.1%}")


if __name__ == "__main__":
    main()
