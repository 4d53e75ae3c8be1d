"""Job files in YAML, read as TOML is read: what is written says what it is, and nothing is guessed.

The rules are those of YAML 1.2, under which `3e-4` is a number and `no` a word; what a job cannot mean is refused: a
key that stands twice, a key without a value, an alias.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from rdpo.config.section import Table

NULL, BOOL, INT, FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))
PATTERNS = {
    NULL: (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    BOOL: (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    INT: (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    FLOAT: (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's reader of plain data, with the words of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """A node; one that repeats another by name is refused: a few of them can stand for more than memory holds."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"*{event.anchor}: write it out", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A table, whose keys are words, each there once and with a value."""
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            problem = ""
            if name in seen:
                problem = f"{name} stands there twice"
            elif value.tag == NULL:
                problem = f"{name} has no value; leave it out"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        found = super().construct_mapping(node, deep)
        return {str(key): value for key, value in found.items()}


for _tag, (_pattern, _first) in PATTERNS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


def read_yaml(text: str) -> Table:
    """The tables of a YAML file.

    Raises:
        ValueError: it is not YAML, or holds what a job cannot mean; says the line.
    """
    try:
        # A subclass of the safe loader: it makes plain data alone.
        found = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    if not isinstance(found, dict):
        raise ValueError("it holds no keys")
    return found
