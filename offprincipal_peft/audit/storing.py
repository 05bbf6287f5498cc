"""An audit as JSON and back, without loss: written by the dataclasses' own fields, read by their own types.

Maps become ``{"shape": [rows, columns], "zlib": "…"}``: the bytes in row-major order, deflated, in base64. JSON has no
NaN and no infinity; where a field is a number these stand as the strings ``"nan"``, ``"inf"`` and ``"-inf"``. Fields
that the file lacks and that have a default take it, so that a later minor addition can still read an older file; any
other difference is refused with its place.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import tempfile
import types
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .results import FORMAT, AuditReport, Change

_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class AuditFormatError(ValueError):
    """What is no stored audit of this version: where it differs, what stands there and what would be right."""


def to_json(report: AuditReport) -> dict[str, Any]:
    """The report as dictionaries, lists, strings, finite numbers, booleans and None, under its format's name."""
    return {"format": FORMAT, **_plain(report)}


def from_json(data: Any) -> AuditReport:
    """The report that :func:`to_json` made ``data`` of; equal to it but for the identity of its maps' tensors.

    Raises :class:`AuditFormatError` for another format or version, and for data that do not fit, with their place.
    """
    if not isinstance(data, dict) or "format" not in data:
        raise AuditFormatError(f"a stored audit is an object with a 'format' of {FORMAT!r}, not {_shown(data)}")
    if data["format"] != FORMAT:
        raise AuditFormatError(
            f"format is {data['format']!r}, this version reads {FORMAT!r}: run the audit again, or read the file with "
            "the version of this package that wrote it"
        )
    report = _restored({key: value for key, value in data.items() if key != "format"}, AuditReport, "")
    assert isinstance(report, AuditReport)
    tuned = max(0, len(report.sources) - 1)
    found = [("verdicts", len(report.verdicts))]
    found += [(f"weights[{i}].changes", len(weight.changes)) for i, weight in enumerate(report.weights)]
    for where, count in found:
        if count != tuned:
            raise AuditFormatError(
                f"{where} should be a list of {tuned}, one for each tuned checkpoint, not of {count}"
            )
    return report


def without_curves(report: AuditReport) -> AuditReport:
    """The report without its curves: no maps, profiles, spectra and magnitude bins, and of the angles the largest."""
    weights = []
    for weight in report.weights:
        agreement = weight.agreement and dataclasses.replace(weight.agreement, map=None)
        changes = [_without_curves(change) for change in weight.changes]
        weights.append(dataclasses.replace(weight, changes=changes, agreement=agreement))
    return dataclasses.replace(report, weights=weights)


def _without_curves(change: Change) -> Change:
    angles, spectrum = change.angles, change.spectrum
    return dataclasses.replace(
        change,
        map=None,
        magnitudes=None,
        rows=change.rows and dataclasses.replace(change.rows, profile=[]),
        columns=change.columns and dataclasses.replace(change.columns, profile=[]),
        spectrum=spectrum and dataclasses.replace(spectrum, positions=[], before=[], shifts=[]),
        angles=angles and dataclasses.replace(angles, output=angles.output[-1:], input=angles.input[-1:]),
    )


def write_json(report: AuditReport, path: str | Path) -> None:
    """Write :func:`to_json` to ``path`` (UTF-8); an interrupted write leaves what stood there before.

    A large model's takes 20 MB and more; of :func:`without_curves`, a tenth.
    """
    write_text(path, json.dumps(to_json(report), allow_nan=False, ensure_ascii=False, separators=(",", ":")) + "\n")


def read_json_report(path: str | Path) -> AuditReport:
    """The report in ``path``; raises :class:`AuditFormatError`, naming the path, or ``OSError`` if it is unreadable."""
    try:
        return from_json(json.loads(Path(path).read_bytes()))
    except AuditFormatError as error:
        raise AuditFormatError(f"{path}: {error}") from None
    except ValueError as error:
        raise AuditFormatError(f"{path} is no JSON file: {error}") from None


def write_text(path: str | Path, text: str) -> None:
    """Put ``text`` (as UTF-8) at ``path`` in one step; missing folders are made.

    A link's target is written; what is no file, a pipe for instance, is written to. What UTF-8 cannot hold (names that
    are no text) becomes ``\\udcff``, which JSON reads as what it was.
    """
    if Path(path).exists() and not Path(path).is_file():
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    handle, temporary = tempfile.mkstemp(prefix=".audit-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)  # there is no call that only reads it
    os.umask(mask)
    return mask


# ---- out


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.dtype != torch.uint8:
            raise TypeError(f"a map's density is uint8, got {value.dtype}")
        return {"shape": list(value.shape), "zlib": base64.b64encode(zlib.compress(_bytes(value), 9)).decode("ascii")}
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"an audit holds numbers, strings and lists, not {type(value).__name__}")


def _bytes(map: Tensor) -> bytes:  # uint8, any shape
    return bytes(map.detach().cpu().contiguous().flatten().tolist())


# ---- in


@cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _restored(value: Any, kind: Any, where: str) -> Any:
    """``value`` as ``kind``, an annotation of :mod:`results`; ``where`` is its place, for messages."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _one_of(value, inner, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _object(value, kind, where)
    if kind is Tensor:
        return _tensor(value, where)
    if kind is float:
        if isinstance(value, str) and value in _SPECIAL:
            return _SPECIAL[value]
        if isinstance(value, int | float) and not isinstance(value, bool):
            with suppress(OverflowError):
                return float(value)
        raise _misfit(value, "a number", where)
    if kind in (int, str, bool):
        if type(value) is not kind:
            raise _misfit(value, {int: "a whole number", str: "a string", bool: "true or false"}[kind], where)
        return value
    if origin is list:
        return [_restored(item, inner[0], f"{where}[{i}]") for i, item in enumerate(_list(value, where))]
    if origin is tuple:
        items = _list(value, where)
        kinds = [inner[0]] * len(items) if inner[-1] is Ellipsis else list(inner)
        if len(items) != len(kinds):
            raise _misfit(value, f"a list of {len(kinds)}", where)
        return tuple(_restored(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(items, kinds, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise _misfit(value, "an object", where)
        return {key: _restored(item, inner[1], f"{where}[{key!r}]") for key, item in value.items()}
    raise TypeError(f"{where or 'the report'}: no rule to read {kind}")


def _one_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    """The first of a union's types that fits; whole numbers stay whole where both would do."""
    if value is None and type(None) in kinds:
        return None
    rest = sorted((kind for kind in kinds if kind is not type(None)), key=lambda kind: kind is float)
    for kind in rest[:-1]:
        try:
            return _restored(value, kind, where)
        except AuditFormatError:
            continue
    return _restored(value, rest[-1], where)


def _object(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, dict):
        raise _misfit(value, "an object", where)
    hints = _types(kind)
    place = f"{where}." if where else ""
    if foreign := sorted(set(value) - set(hints)):
        raise AuditFormatError(f"{where or 'the report'} has no field {foreign[0]!r}; it has {', '.join(hints)}")
    for field in dataclasses.fields(kind):
        default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name not in value and default:
            raise AuditFormatError(f"{place}{field.name} is missing")
    return kind(**{name: _restored(item, hints[name], f"{place}{name}") for name, item in value.items()})


def _tensor(value: Any, where: str) -> Tensor:
    if not isinstance(value, dict) or set(value) != {"shape", "zlib"}:
        raise _misfit(value, "a map: an object with 'shape' and 'zlib'", where)
    shape = _restored(value["shape"], list[int], f"{where}.shape")
    try:
        data = zlib.decompress(base64.b64decode(_restored(value["zlib"], str, f"{where}.zlib"), validate=True))
    except (ValueError, zlib.error) as error:
        raise AuditFormatError(f"{where}.zlib cannot be unpacked: {error}") from None
    if min(shape, default=0) < 0 or len(data) != math.prod(shape):
        raise AuditFormatError(f"{where} holds {len(data)} bytes, its shape {shape} needs {math.prod(shape)}")
    return torch.tensor(list(data), dtype=torch.uint8).reshape(shape)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _misfit(value, "a list", where)
    return value


def _misfit(value: Any, wanted: str, where: str) -> AuditFormatError:
    return AuditFormatError(f"{where or 'the report'} should be {wanted}, not {_shown(value)}")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:59]}…"
