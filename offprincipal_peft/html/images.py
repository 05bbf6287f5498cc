"""Pictures of grids as PNG data URIs, made with zlib alone."""

from __future__ import annotations

import base64
import struct
import zlib

_INK = (124, 88, 237)  # between the accents of the light and the dark page: the picture is ink on either ground


def png(cells: bytes, width: int, height: int, top: int = 255) -> bytes:
    """A PNG of ``height`` rows of ``width`` cells, row-major: transparent at 0, full ink from ``top`` on.

    Sixteen shades, to keep pages small. Raises ``ValueError`` where the cells are not so many, none, or top is 0.
    """
    if len(cells) != width * height or not cells or not 1 <= top <= 255:
        raise ValueError(f"{width} × {height} cells and a top in 1..255 wanted, got {len(cells)} cells and {top}")
    shade = bytes(min(15, (15 * value + top // 2) // top) for value in range(256))
    rows = []
    for start in range(0, len(cells), width):
        row = cells[start : start + width].translate(shade)
        row += b"\0" * (width % 2)
        rows.append(b"\0" + bytes(a << 4 | b for a, b in zip(row[::2], row[1::2], strict=True)))
    header = struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)  # four bits a cell, into a palette
    parts = (
        (b"IHDR", header),
        (b"PLTE", bytes(_INK) * 16),
        (b"tRNS", bytes(17 * i for i in range(16))),
        (b"IDAT", zlib.compress(b"".join(rows), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def data_uri(picture: bytes) -> str:
    """A PNG for ``src`` or ``href``."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
