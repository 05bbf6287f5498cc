"""Memory that was freed and that the C library still holds, given back to the system.

glibc keeps freed blocks of up to 32 MB for later requests. Buffers of many sizes, as a decomposition asks for, leave
holes in it that nothing fits, and those count as resident: 20 to 40 MB beside a matrix of four million entries.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable
from typing import Any


def release_free_memory() -> None:
    """Ask the C library to return its free pages; nothing happens where it is not glibc. Takes about a millisecond."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], Any] | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # a libc that calls itself glibc and lacks its extension
        return None
    found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
    return found
