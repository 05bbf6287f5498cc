"""When written weights may be trusted: inside one forward or generate of the PEFT model nothing writes a parameter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class WriteScope:
    """While open, a layer writes its adapter's values once. One is shared by the layers of a model."""

    def __init__(self) -> None:
        self.depth = 0
        self.number = 0  # of the scope that was opened last

    @property
    def is_open(self) -> bool:
        return self.depth > 0

    @contextmanager
    def open(self) -> Iterator[None]:
        self.depth += 1
        if self.depth == 1:
            self.number += 1
        try:
            yield
        finally:
            self.depth -= 1
