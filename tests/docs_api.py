"""The signatures of public names as ``docs/api.md`` writes them: names and defaults, without annotations."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from typing import Any

from peft import PeftConfig

import offprincipal_peft

ENTRY = re.compile(r"^- `([^`]+)`", re.MULTILINE)
SECTION = re.compile(r"^##+ `(offprincipal_peft[\w.]*)`.*$", re.MULTILINE)


def packages() -> list[str]:
    """The package itself and every package in it that says what it exports."""
    found = [f"offprincipal_peft.{m.name}" for m in pkgutil.iter_modules(offprincipal_peft.__path__) if m.ispkg]
    return [name for name in ("offprincipal_peft", *found) if hasattr(importlib.import_module(name), "__all__")]


def exported(package: str) -> list[str]:
    names: list[str] = importlib.import_module(package).__all__
    return sorted(names)


def written(name: str, value: Any) -> str:
    """``name`` as the page writes it; ``name`` may be dotted (``Class.method``)."""
    if inspect.ismodule(value) or not callable(value):
        return name
    if isinstance(value, type) and issubclass(value, PeftConfig):  # those of PEFT's base classes are PEFT's to explain
        inherited = {field.name for base in value.__mro__[1:] for field in _fields(base)}
        own = {field.name for field in _fields(value)} - inherited | ({"r", "lora_alpha", "target_modules"} & inherited)
        own |= {name for name in value.__annotations__ if name in inherited}
        parameters = [p for p in inspect.signature(value).parameters.values() if p.name in own]
        return f"{name}({', '.join(['*', *map(_parameter, parameters)])}, …)"
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (TypeError, ValueError):
        return name
    if parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    parts: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        parts.append(_parameter(parameter))
    return f"{name}({', '.join(parts)})"


def _fields(cls: type) -> tuple[Any, ...]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")  # type: ignore[call-overload]
    name = f"{stars}{parameter.name}"
    if parameter.default is parameter.empty:
        return name
    plain = isinstance(parameter.default, bool | int | float | str | tuple | list | None)
    plain = plain or type(parameter.default).__module__ == "torch"
    return f"{name}={parameter.default!r}" if plain else f"{name}=…"


def find(module: str, dotted: str) -> Any:
    """What ``dotted`` names in a module; raises ``AttributeError`` where it names nothing."""
    value: Any = importlib.import_module(module)
    for part in dotted.split("."):
        value = inspect.getattr_static(value, part) if inspect.isclass(value) else getattr(value, part)
        value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    return value


def entries(page: str) -> dict[str, dict[str, str]]:
    """Module -> name -> what the page writes for it, over the sections that a module's name heads."""
    headings = [*SECTION.finditer(page)]
    found: dict[str, dict[str, str]] = {}
    for heading in headings:
        rest = page[heading.end() :]
        end = re.search(r"^#", rest, re.MULTILINE)
        section = rest[: end.start()] if end else rest
        for entry in ENTRY.finditer(section):
            text = " ".join(entry[1].split())
            found.setdefault(heading[1], {})[text.partition("(")[0]] = text
    return found
