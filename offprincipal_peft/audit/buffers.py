"""Memory that is read into again and again, and reading one step ahead of its use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Buffers:
    """Memory for ``count`` blocks that is used in turn: what was taken stays whole until ``count`` more were taken.

    A buffer that is used again saves the system from clearing fresh pages, which costs more than reading cached files.
    """

    def __init__(self, count: int) -> None:
        self._held = [torch.empty(0, dtype=torch.uint8) for _ in range(count)]
        self._next = 0

    def take(self, entries: int, dtype: torch.dtype) -> Tensor:  # -> (entries,), not initialised
        self._next = (self._next + 1) % len(self._held)
        size = entries * dtype.itemsize
        if self._held[self._next].numel() < size:
            self._held[self._next] = torch.empty(size, dtype=torch.uint8)
        return self._held[self._next][:size].view(dtype)


def ahead(jobs: Iterable[Callable[[], T]], count: int = 1) -> Generator[T]:
    """What each job returns, in order; the next ``count`` run in as many threads while the last result is in use."""
    with ThreadPoolExecutor(count, "checkpoint-reader") as readers:
        coming: deque[Future[T]] = deque()
        for job in jobs:
            ready = coming.popleft() if len(coming) == count else None
            result = ready.result() if ready is not None else None
            coming.append(readers.submit(job))
            if ready is not None:
                del ready
                yield result  # type: ignore[misc]
                del result
        while coming:
            yield coming.popleft().result()
