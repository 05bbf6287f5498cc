"""YAML that remembers its lines, so that a complaint about a value says where it stands.

Only plain values are read (the safe loader); a key that stands twice in a mapping, of which YAML would silently keep
the last, is refused.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

Place = tuple[Hashable, ...]  # ("methods", 1, "learning_rate")


class SpecError(ValueError):
    """A sweep that cannot run as it is written: the file and line where known, what is wrong, what is right."""


@dataclass
class Lines:
    """The line (from 1) of every key and item of a document."""

    name: str = ""
    at: dict[Place, int] = field(default_factory=dict)

    def __contains__(self, place: Place) -> bool:
        return place in self.at

    def also(self, place: Place, other: Place) -> None:
        """What stands at ``place`` is known as ``other`` too."""
        if place in self.at:
            self.at.setdefault(other, self.at[place])

    def fail(self, place: Place, message: str) -> NoReturn:
        """Raise :class:`SpecError` for what stands at ``place``, or for the closest thing around it."""
        for depth in range(len(place), -1, -1):
            if place[:depth] in self.at:
                raise SpecError(f"{self.name}:{self.at[place[:depth]]}: {message}")
        path = ".".join(map(str, place))
        raise SpecError(f"{path}: {message}" if path else message)


def load_yaml(source: Path | str) -> tuple[Any, Lines]:
    """The values of a file, or of text that spans more than one line, with their lines."""
    if isinstance(source, Path) or "\n" not in source:
        name = str(source)
        try:
            text = Path(source).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SpecError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        except OSError as error:
            raise SpecError(f"{name}: {error.strerror or error}") from None
    else:
        name, text = "<text>", source
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        lines = Lines(name)
        if node is None:
            raise SpecError(f"{name}: empty")
        _walk(node, (), lines, set())
        return loader.construct_document(node), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}" if mark else name
        raise SpecError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from None
    finally:
        loader.dispose()


def _walk(node: Any, place: Place, lines: Lines, open_nodes: set[int]) -> None:
    if id(node) in open_nodes:
        raise SpecError(f"{lines.name}:{node.start_mark.line + 1}: an alias that contains itself")
    lines.at.setdefault(place, node.start_mark.line + 1)
    inside = open_nodes | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*place, index), lines, inside)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise SpecError(f"{lines.name}:{key.start_mark.line + 1}: '{key.value}' stands twice in one mapping")
            if not isinstance(key, yaml.ScalarNode):
                raise SpecError(f"{lines.name}:{key.start_mark.line + 1}: a key is a name, not a list or a mapping")
            seen.add(key.value)
            lines.at[(*place, key.value)] = key.start_mark.line + 1
            _walk(value, (*place, key.value), lines, inside)
