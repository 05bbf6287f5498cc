"""The grammar of mask expressions: text to a tree over named masks. Parsed, never evaluated as code.

::

    expression := term ('|' term)*
    term       := factor ('&' factor)*
    factor     := '~' factor | '(' expression ')' | atom | function '(' expression ')'
    atom       := 'principal' | 'low' | 'safe' | 'random'
    function   := 'random' | 'matched' | 'thinned'

``safe`` is the paper's ``low | ~principal`` (2511.08567). ``~`` binds tighter than ``&``, ``&`` tighter than ``|``.
What the names mean for a weight is decided in :mod:`masks`; this file knows only the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

ATOMS = ("principal", "low", "safe", "random")
FUNCTIONS = ("random", "matched", "thinned")

_TOKEN = re.compile(r"\s*(?:([A-Za-z_][A-Za-z_0-9]*)|([~&|()]))")

T = TypeVar("T")


@dataclass(frozen=True)
class Atom:
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Not:
    operand: Node

    def __str__(self) -> str:
        return f"~{_wrapped(self.operand)}"


@dataclass(frozen=True)
class Binary:
    operator: str  # "&" or "|"
    left: Node
    right: Node

    def __str__(self) -> str:
        return f"{_wrapped(self.left)} {self.operator} {_wrapped(self.right)}"


@dataclass(frozen=True)
class Call:
    function: str
    operand: Node

    def __str__(self) -> str:
        return f"{self.function}({self.operand})"


Node = Atom | Not | Binary | Call


def _wrapped(node: Node) -> str:
    return f"({node})" if isinstance(node, Binary) else str(node)


class MaskExpressionError(ValueError):
    """A malformed expression; the message shows the text with a caret under the place."""

    def __init__(self, text: str, position: int, what: str) -> None:
        self.position = position
        super().__init__(f"mask expression, position {position + 1}: {what}\n  {text}\n  {' ' * position}^")


def parse(text: str) -> Node:
    """The tree of an expression. Raises :class:`MaskExpressionError` (a ``ValueError``) with the position."""
    if not isinstance(text, str):
        raise TypeError(f"a mask expression is a string such as 'low | ~principal', got {type(text).__name__}")
    parser = _Parser(text)
    tree = parser.expression()
    if parser.kind != "end":
        parser.fail(f"expected '&', '|' or the end, found {parser.found}")
    return tree


def atoms(node: Node) -> set[str]:
    """Names of the masks that an expression is built from; ``safe`` counts as ``low`` and ``principal``."""
    return fold(
        node,
        atom=lambda name: {"low", "principal"} if name == "safe" else {name},
        negate=lambda x: x,
        combine=lambda _, x, y: x | y,
        call=lambda _, x: x,
    )


def fold(
    node: Node,
    *,
    atom: Callable[[str], T],
    negate: Callable[[T], T],
    combine: Callable[[str, T, T], T],
    call: Callable[[str, T], T],
) -> T:
    """Evaluate a tree bottom-up with one function per kind of node."""
    if isinstance(node, Atom):
        return atom(node.name)
    rest = {"atom": atom, "negate": negate, "combine": combine, "call": call}
    if isinstance(node, Not):
        return negate(fold(node.operand, **rest))  # type: ignore[arg-type]
    if isinstance(node, Binary):
        return combine(node.operator, fold(node.left, **rest), fold(node.right, **rest))  # type: ignore[arg-type]
    return call(node.function, fold(node.operand, **rest))  # type: ignore[arg-type]


class _Parser:
    """Recursive descent, one token ahead."""

    def __init__(self, text: str) -> None:
        self.text, self.end, self.depth = text, 0, 0
        self.advance()

    def advance(self) -> None:
        rest = self.text[self.end :]
        self.start = self.end + len(rest) - len(rest.lstrip())
        match = _TOKEN.match(self.text, self.end)
        if match:
            self.kind, self.value = ("name", match[1]) if match[1] else (match[2], match[2])
            self.start, self.end = match.start(1 if match[1] else 2), match.end()
        elif self.start >= len(self.text):
            self.kind, self.value = "end", ""
        else:
            self.kind, self.value = "unknown", self.text[self.start]
            self.fail(f"unexpected character {self.value!r}; allowed are names, '~', '&', '|' and parentheses")

    @property
    def found(self) -> str:
        return "the end" if self.kind == "end" else repr(self.value)

    def fail(self, what: str) -> None:
        raise MaskExpressionError(self.text, self.start, what)

    def expect(self, kind: str) -> None:
        if self.kind != kind:
            self.fail(f"expected {kind!r}, found {self.found}")
        self.advance()

    def expression(self) -> Node:
        node = self.term()
        while self.kind == "|":
            self.advance()
            node = Binary("|", node, self.term())
        return node

    def term(self) -> Node:
        node = self.factor()
        while self.kind == "&":
            self.advance()
            node = Binary("&", node, self.factor())
        return node

    def factor(self) -> Node:
        self.depth += 1
        if self.depth > 100:
            self.fail("nested more than 100 deep")
        try:
            if self.kind == "~":
                self.advance()
                return Not(self.factor())
            if self.kind == "(":
                self.advance()
                node = self.expression()
                self.expect(")")
                return node
            return self.named()
        finally:
            self.depth -= 1

    def named(self) -> Node:
        if self.kind != "name":
            self.fail(f"expected a mask name, '~' or '(', found {self.found}")
        name, start = self.value, self.start
        if name not in ATOMS and name not in FUNCTIONS:
            functions = ", ".join(f"{function}(x)" for function in FUNCTIONS)
            self.fail(f"unknown mask {name!r}; there are {', '.join(ATOMS)} and {functions}")
        self.advance()
        if self.kind == "(":
            if name not in FUNCTIONS:
                self.fail(f"{name!r} takes no argument")
            self.advance()
            operand = self.expression()
            self.expect(")")
            return Call(name, operand)
        if name not in ATOMS:
            self.start = start
            self.fail(f"{name!r} needs an argument, for instance {name}(principal)")
        return Atom(name)
