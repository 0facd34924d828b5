"""Read finetune.yaml strictly: what YAML 1.1 would change without a word is refused."""

import re
from pathlib import Path
from typing import Any

import yaml

from ft_assets.errors import ConfigError

# YAML 1.1 reads these as other numbers than a person does: base 60, and base 8 by a leading zero.
BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")
BASE_8 = re.compile(r"[-+]?0[0-7_]+")
MOST_NODES = 100_000
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that refuses what it would otherwise change without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            line = key.start_mark.line + 1
            if name is not None and name in seen:
                raise _Refused(
                    line, f"the key {name} is here and in line {seen[name]}", "each key once"
                )
            seen[name] = line
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag in NUMBERS:
            line = node.start_mark.line + 1
            if BASE_60.fullmatch(node.value) or BASE_8.fullmatch(node.value):
                raise _Refused(
                    line,
                    f"{node.value} would be read as a number of base 60 or 8",
                    f'a decimal number, or a text: "{node.value}"',
                )
        return super().construct_object(node, deep)


class _Refused(Exception):
    """What is refused, with its line, what was found, and what was expected."""

    def __init__(self, line: int, found: str, expected: str) -> None:
        super().__init__(found)
        self.line, self.found, self.expected = line, found, expected


def _loaded(text: str) -> Any:
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _nodes(node, {}) > MOST_NODES:
            raise _Refused(
                node.start_mark.line + 1,
                f"its anchors and aliases make more than {MOST_NODES} values",
                "a file that a person writes",
            )
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _nodes(node: yaml.Node, known: dict[int, float]) -> float:
    """Return the number of values below a node, with each alias counted as what it stands for."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # while it is counted: an alias of itself never ends
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [one for pair in node.value for one in pair]
        known[id(node)] = 1 + sum(_nodes(one, known) for one in inner)
    return known[id(node)]


def read_strictly(path: Path) -> Any:
    """Return the content of a YAML file. Raises ConfigError with the line of what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            where=str(path),
            found=f"is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}",
            expected="a text file in UTF-8",
            fix="save it as UTF-8",
        ) from None
    try:
        return _loaded(text)
    except _Refused as refused:
        raise ConfigError(
            where=f"{path}:{refused.line}",
            found=refused.found,
            expected=refused.expected,
            fix="correct the line",
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        deep = isinstance(error, RecursionError)
        problem = "is nested too deeply" if deep else getattr(error, "problem", None) or error
        raise ConfigError(
            where=f"{path}:{mark.line + 1}" if mark else str(path),
            found=f"is not YAML: {problem}",
            expected="YAML",
            fix="correct the line" if mark else "correct the value",
        ) from None
