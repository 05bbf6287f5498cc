"""Turn PEFT's test modules into tests of the two methods.

Cases that PEFT's tests run for LoRA become cases of off-principal LoRA; where a test takes a list of config classes,
principal-masked sparse fine-tuning joins it. Cases of other methods are left out, and so are tests that are only about
other methods. In PEFT's modules the name ``LoraConfig`` then stands for off-principal LoRA, so that the branches
``config_cls == LoraConfig`` and the tests that write ``LoraConfig(...)`` in their bodies run on it too.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import peft
import pytest
from _pytest.mark.structures import ParameterSet

from conformance import source
from conformance.stand_ins import OffPrincipal, OffPrincipalLora, Sparse
from offprincipal_peft import OffPrincipalLoraConfig, PrincipalSparseConfig

STAND_INS = (OffPrincipal, OffPrincipalLora, Sparse)
OURS = (*STAND_INS, OffPrincipalLoraConfig, PrincipalSparseConfig)
LORA = peft.LoraConfig

# What the adoption left out, by "module::test": shown by and checked in test_adoption.py.
DROPPED: dict[str, str] = {}
KEPT: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Methods:
    """The classes that stand for LoRA and join it."""

    off_principal: type
    sparse: type


STANDING_IN = Methods(OffPrincipal, Sparse)
THEMSELVES = Methods(OffPrincipalLoraConfig, PrincipalSparseConfig)


def adopt(
    name: str,
    prepare: Callable[[types.ModuleType], None] | None = None,
    methods: Methods = STANDING_IN,
) -> dict[str, Any]:
    """The classes, functions and fixtures of PEFT's test module ``name``, for a test module's namespace.

    ``prepare`` may change the module's lists of cases in place; ``methods`` are the config classes used. Where PEFT's
    tests were not fetched there is one test, which fails and says how to fetch them.
    """
    if not source.available():

        def test_peft_tests_were_fetched() -> None:
            pytest.fail(source.MISSING)

        return {"test_peft_tests_were_fetched": test_peft_tests_were_fetched}
    for helper in ("testing_utils", "testing_common"):
        _rename_lora(source.load(helper), OffPrincipal)
    module = source.load(name)
    if prepare is not None:
        prepare(module)
    found: dict[str, Any] = {}
    for key, value in vars(module).items():
        if getattr(value, "__module__", None) == module.__name__:
            if inspect.isclass(value) and key.startswith("Test"):
                _adopt_class(name, value, methods)
                found[key] = value
            is_test = inspect.isfunction(value) and key.startswith("test_")
            if is_test and _adopt_test(f"{name}::{key}", value, methods):
                found[key] = value
        if _is_fixture(value):
            found[key] = value
    _rename_lora(module, methods.off_principal)
    return found


def _rename_lora(module: types.ModuleType, into: type) -> None:
    if getattr(module, "LoraConfig", None) is LORA:
        module.LoraConfig = into  # type: ignore[attr-defined]


def _adopt_class(module: str, cls: type, methods: Methods) -> None:
    for key, value in list(vars(cls).items()):
        if not key.startswith("test_"):
            continue
        identity = f"{module}::{cls.__name__}::{key}"
        if value is None:
            DROPPED[identity] = "needs the package parameterized"
        if value is None or not _adopt_test(identity, value, methods, cls):
            delattr(cls, key)


def _adopt_test(identity: str, test: Any, methods: Methods, owner: type | None = None) -> bool:
    """Translate a test's cases in place; whether anything of it is left."""
    ours = False
    marks = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            rows, dropped = translated(mark.args[1], methods)
            ours = ours or any(_is_ours(row) for row in rows)
            if dropped and not rows:
                DROPPED[identity] = "no case for LoRA"
                return False
            if rows != list(mark.args[1]):
                kwargs = {key: value for key, value in mark.kwargs.items() if key != "ids"}
                mark = pytest.mark.parametrize(mark.args[0], rows, **kwargs).mark
        marks.append(mark)
    others = None if ours else _other_methods(test, owner)
    if others is not None:
        DROPPED[identity] = f"is about {', '.join(others)}" if others else "is about no method"
        return False
    if marks:
        test.pytestmark = marks
    KEPT.add(identity)
    return True


def _is_ours(row: Any) -> bool:
    return any(value in OURS if inspect.isclass(value) else isinstance(value, OURS) for value in _values(row))


def _values(row: Any) -> Sequence[Any]:
    if isinstance(row, ParameterSet):
        return row.values
    return row if isinstance(row, tuple | list) else (row,)


def translated(rows: Sequence[Any], methods: Methods) -> tuple[list[Any], int]:
    """PEFT's rows of cases with LoRA's translated and other methods' left out, and how many that were.

    The second method joins where a row is no more than the class of LoRA's config.
    """
    kept: list[Any] = []
    dropped = 0
    for row in rows:
        try:
            values = [_translated(value, methods) for value in _values(row)]
        except _OtherMethodError:
            dropped += 1
            continue
        if isinstance(row, ParameterSet):
            kept.append(ParameterSet(tuple(values), row.marks, row.id))
        else:
            kept.append(type(row)(values) if isinstance(row, tuple | list) else values[0])
        if row is LORA:
            kept.append(methods.sparse)
        elif isinstance(row, tuple) and row == (LORA, {}):
            kept.append((methods.sparse, {}))
    return kept, dropped


class _OtherMethodError(Exception):
    """A case of another PEFT method, or one that off-principal LoRA refuses."""


def _translated(value: Any, methods: Methods) -> Any:
    if inspect.isclass(value) and issubclass(value, peft.PeftConfig):
        if value in OURS:
            return value
        if value is LORA:
            return methods.off_principal
        raise _OtherMethodError
    if type(value) is LORA:
        return stand_in(value)
    if isinstance(value, peft.PeftConfig) and not isinstance(value, OURS):
        raise _OtherMethodError
    return value


def stand_in(config: peft.LoraConfig) -> OffPrincipal:
    """Off-principal LoRA with what differs from LoRA's defaults in ``config``."""
    default = LORA()
    changed = {f.name: getattr(config, f.name) for f in dataclasses.fields(LORA) if f.init}
    changed = {key: value for key, value in changed.items() if value != getattr(default, key)}
    changed.pop("peft_type", None)
    try:
        return OffPrincipal(**changed)
    except ValueError as error:
        raise _OtherMethodError(str(error)) from error


def _other_methods(test: Any, owner: type | None) -> list[str] | None:
    """The config classes that a test names, itself or in its fixtures and helpers; ``None`` where LoRA's is one."""
    configs = {
        name
        for name in _reached_names(test, owner)
        if inspect.isclass(getattr(peft, name, None)) and issubclass(getattr(peft, name), peft.PeftConfig)
    }
    return None if "LoraConfig" in configs else sorted(configs)


def _reached_names(test: Any, owner: type | None) -> set[str]:
    """Names in the code of a test, of the fixtures it asks for, and of the helpers beside it that it calls."""
    names: set[str] = set()
    waiting, done = [_function(test)], set()
    while waiting:
        function = waiting.pop()
        done.add(function)
        found = set(_names(function.__code__))
        names |= found
        for name in found | set(inspect.signature(function).parameters):
            helper = _function(getattr(owner, name, None)) or _function(function.__globals__.get(name))
            beside = helper is not None and helper.__module__ == function.__module__
            if beside and helper not in done:
                waiting.append(helper)
    return names


def _function(value: Any) -> Any:
    """The plain function in a test, method or fixture; ``None`` for anything else."""
    if _is_fixture(value):
        value = value._fixture_function
    return inspect.unwrap(value) if inspect.isfunction(value) else None


def _is_fixture(value: Any) -> bool:
    return type(value).__name__ == "FixtureFunctionDefinition"


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
