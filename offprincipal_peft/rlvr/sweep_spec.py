"""What a sweep runs: a YAML file expanded into trials, every one checked before the first starts.

```yaml
base: {model: smollm2-135m, task: sums, steps: 16}   # fields of every trial
methods:                                              # names, or entries with their own values
  - lora
  - {method: offprincipal, label: away, options: {principal_rank: [16, 32]}, learning_rate: [1e-4, 2e-4]}
grid: {rank: [8, 16], learning_rate: [1e-4]}          # crossed with each other and with every method
seeds: [0, 1]
threads: 1
```
An entry's own values stand in for the grid's and the base's. In an entry a list is a list of values to try, also
inside ``options``; in ``base`` it is a value; a list as one of the values is a list in a list. ``target_modules:
[a, b]`` in an entry is one value, since it is a list of names by nature. Options (fields that hold a mapping) are
merged key by key, and ``method_options.principal_rank`` names one of them in ``grid``.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import itertools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .config import TrialConfig
from .sweep_yaml import Lines, SpecError, load_yaml

__all__ = ["Resources", "SpecError", "SweepSpec"]

MOST_TRIALS = 10_000  # a slip in a grid, not a sweep
FIELDS = tuple(f.name for f in dataclasses.fields(TrialConfig))
MAPPINGS = ("method_options", "task_options", "trainer_options", "optimizer_options")
_SHORT = {"options": "method_options"}
# Fields with a place of their own in a spec.
_ELSEWHERE = {
    "seed": "'seeds: [0, 1]'",
    "threads": "'threads: 1'",
    "method": "'methods:'",
    "label": "an entry of 'methods:'",
}

Axis = tuple[str, list[Any], tuple[Any, ...]]  # field or field.key, the values, where they stand


@dataclass(frozen=True)
class Resources:
    """What one trial gets.

    Attributes:
        cpus: cores, for Ray's placement; local trials share the machine ``parallel`` at a time.
        gpus: devices; a fraction shares one. 0 leaves the devices as they are locally and hides them on Ray.
        accelerate: flags of ``accelerate launch`` for a trial on several processes, ``num_processes`` among them.
    """

    cpus: float = 1
    gpus: float = 0
    accelerate: dict[str, Any] | None = None


@dataclass(frozen=True)
class SweepSpec:
    """A sweep as it was given, checked; see the module's text for the layout.

    Attributes:
        base, grid, methods, seeds: what the trials are made of.
        threads: of the numeric libraries in each trial; part of every trial, since sums depend on it.
        parallel: trials at once on this machine.
        retries: how often a trial is started again whose process died without a record.
        resources: of each trial.
        source: the mapping as given.
    """

    base: dict[str, Any]
    methods: list[dict[str, Any]]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    threads: int = 1
    parallel: int = 1
    retries: int = 1
    resources: Resources = field(default_factory=Resources)
    source: dict[str, Any] = field(default_factory=dict)
    lines: Lines = field(default_factory=Lines, repr=False, compare=False)

    @classmethod
    def from_yaml(cls, source: Path | str) -> SweepSpec:
        """Read a file, or text that spans more than one line; raises :class:`SpecError` with the line at fault."""
        return cls._read(*load_yaml(source))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SweepSpec:
        """The same from plain values; raises :class:`SpecError`."""
        return cls._read(values, Lines())

    def trials(self) -> list[TrialConfig]:
        """Every trial, in the order of the methods, then of the grid, then of the seeds."""
        trials: dict[str, TrialConfig] = {}
        for index, entry in enumerate(self.methods):
            axes = self._axes(index, entry)
            size = math.prod(len(values) for _, values, _ in axes) * len(self.seeds)
            if len(trials) + size > MOST_TRIALS:
                self.lines.fail(("methods", index), f"over {MOST_TRIALS} trials; a sweep holds at most that many")
            for values in itertools.product(*(values for _, values, _ in axes)):
                for seed in self.seeds:
                    config = self._trial(index, dict(zip([name for name, _, _ in axes], values, strict=True)), seed)
                    if config.trial_id in trials:
                        self.lines.fail(("methods", index), f"the trial {config.trial_id} comes up twice")
                    trials[config.trial_id] = config
        return list(trials.values())

    @classmethod
    def _read(cls, values: Any, lines: Lines) -> SweepSpec:
        keys = [f.name for f in dataclasses.fields(cls) if f.name not in ("source", "lines")]
        values = _mapping(values, (), lines)
        _known(values, keys, (), lines, "a sweep")
        source, values = copy.deepcopy(values), copy.deepcopy(values)
        base = _mapping(values.get("base"), ("base",), lines)
        _known(base, FIELDS, ("base",), lines, "a trial")
        _placed(base, ("label",), ("base",), lines)
        base |= {name: _mapping(base[name], ("base", name), lines) for name in MAPPINGS if name in base}
        if "threads" in values and "threads" in base:
            lines.fail(("base", "threads"), "threads stands here and at the top; keep the one at the top")
        if "seeds" in values and "seed" in base:
            lines.fail(("base", "seed"), "seed stands here beside 'seeds:' at the top; keep 'seeds:'")
        seeds = values.get("seeds", [base.get("seed", 0)])
        if not isinstance(seeds, list) or not seeds:
            lines.fail(("seeds",), f"{seeds!r}: seeds is a list such as [0, 1]")
        _no_repeats(seeds, ("seeds",), lines)
        spec = cls(
            base=base,
            methods=_methods(values, base, lines),
            grid=_grid(values.get("grid"), lines),
            seeds=seeds,
            threads=_count("threads", values.get("threads", base.get("threads", 1)), 1, lines),
            parallel=_count("parallel", values.get("parallel", 1), 1, lines),
            retries=_count("retries", values.get("retries", 1), 0, lines),
            resources=_resources(values.get("resources"), lines),
            source=source,
            lines=lines,
        )
        spec.trials()  # so that a spec that exists is a spec that runs
        return spec

    def _axes(self, index: int, entry: dict[str, Any]) -> list[Axis]:
        """What varies for one entry, and the entry's single values as lists of one."""
        own = list(_entry_axes(entry, ("methods", index)))
        names = {name for name, _, _ in own}
        shared: list[Axis] = [(name, values, ("grid", name)) for name, values in self.grid.items() if name not in names]
        for name, values, where in own:
            _no_repeats(values, where, self.lines)
            if not values:
                self.lines.fail(where, f"{name} has no value to try")
        return shared + own

    def _trial(self, index: int, chosen: dict[str, Any], seed: int) -> TrialConfig:
        values = copy.deepcopy(self.base) | {"seed": seed, "threads": self.threads}
        for name, value in copy.deepcopy(chosen).items():
            outer, _, key = name.partition(".")
            if outer in MAPPINGS:
                if not key and not isinstance(value, dict):
                    self._refuse(index, f"{name}={value!r}: it is a mapping of options to values")
                values[outer] = {**values.get(outer, {}), **({key: value} if key else value)}
            else:
                values[name] = value
        try:
            config = TrialConfig.from_dict(values)
            json.dumps(config.to_dict(), allow_nan=False)
        except (ValueError, TypeError) as error:
            self._refuse(index, str(error))
        return config

    def _refuse(self, index: int, message: str) -> NoReturn:
        """Point a trial's own complaint, ``field=value: …``, at the line that the value came from."""
        named = re.match(r"(\w+)=", message)
        name = named.group(1) if named else ""
        places = [("methods", index, name), ("grid", name), ("seeds",) if name == "seed" else ("base", name)]
        place = next((p for p in places if p in self.lines), ("methods", index))
        self.lines.fail(place, f"{message} (in the trials of '{self.methods[index].get('label')}')")


def _methods(values: dict[str, Any], base: dict[str, Any], lines: Lines) -> list[dict[str, Any]]:
    given = values.get("methods", [base["method"]] if "method" in base else None)
    if not isinstance(given, list) or not given:
        lines.fail(("methods",), "a sweep needs 'methods:', a list such as [lora, offprincipal]")
    if "methods" in values and "method" in base:
        lines.fail(("base", "method"), "method stands here beside 'methods:' at the top; keep 'methods:'")
    entries: list[dict[str, Any]] = []
    for index, item in enumerate(given):
        where = ("methods", index)
        entry = {"method": item} if isinstance(item, str) else _mapping(item, where, lines)
        _known(entry, [*FIELDS, *_SHORT], where, lines, "a method's entry", dotted=True)
        for short, name in _SHORT.items():
            if short in entry and name in entry:
                lines.fail((*where, short), f"'{short}' is short for '{name}'; keep one of them")
            lines.also((*where, short), (*where, name))
        entry = {_SHORT.get(name, name): value for name, value in entry.items()}
        _placed(entry, ("seed", "threads"), where, lines)
        for name in ("method", "label"):
            if isinstance(entry.get(name), bool):
                lines.fail((*where, name), f"YAML reads on, off, yes and no as true or false; quote the {name}")
            if not isinstance(entry.get(name, ""), str):
                lines.fail((*where, name), f"{name} is one name; another method is another entry of 'methods:'")
        if not entry.get("method"):
            lines.fail(where, "an entry of 'methods:' needs 'method'")
        entry["label"] = entry.get("label") or entry["method"]
        if any(entry["label"] == other["label"] for other in entries):
            lines.fail(where, f"two entries are called '{entry['label']}'; give each a 'label' of its own")
        entries.append(entry)
    return entries


def _entry_axes(entry: dict[str, Any], where: tuple[Any, ...]) -> Iterable[Axis]:
    for name, value in entry.items():
        place = (*where, name)
        if name in MAPPINGS and isinstance(value, dict):
            for key, item in value.items():
                yield f"{name}.{key}", item if isinstance(item, list) else [item], (*place, key)
        elif isinstance(value, list) and (name != "target_modules" or any(isinstance(item, list) for item in value)):
            yield name, value, place
        else:
            yield name, [value], place


def _grid(given: Any, lines: Lines) -> dict[str, list[Any]]:
    grid = _mapping(given, ("grid",), lines)
    _known(grid, FIELDS, ("grid",), lines, "a trial", dotted=True)
    _placed(grid, tuple(_ELSEWHERE), ("grid",), lines)
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            lines.fail(("grid", name), f"{values!r}: a grid lists the values to try, such as {name}: [{values}]")
        _no_repeats(values, ("grid", name), lines)
    return grid


def _resources(given: Any, lines: Lines) -> Resources:
    values = _mapping(given, ("resources",), lines)
    _known(values, [f.name for f in dataclasses.fields(Resources)], ("resources",), lines, "'resources:'")
    for name in ("cpus", "gpus"):
        value = values.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            lines.fail(("resources", name), f"{name}={value!r}: it is a number of at least 0")
        if name == "gpus" and value > 1 and value != int(value):
            lines.fail(("resources", name), f"gpus={value!r}: above 1 it is a whole number")
    if (flags := values.get("accelerate")) is not None:
        where = ("resources", "accelerate")
        flags = _mapping(flags, where, lines)
        count = flags.get("num_processes")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            lines.fail(where, f"num_processes={count!r}: accelerate needs the number of processes, at least 1")
        if flags.get("cpu") and count > 1 and "mpirun_hostfile" not in flags:
            lines.fail(where, "with 'cpu' accelerate starts one process only (several need MPI); leave 'cpu' out")
        for name, value in flags.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", str(name)) or not isinstance(value, (str, int, float, bool)):
                lines.fail((*where, name), f"{name}: {value!r} is no flag of 'accelerate launch' with its value")
    return Resources(**values)


def _placed(values: dict[str, Any], names: tuple[str, ...], where: tuple[Any, ...], lines: Lines) -> None:
    for name in names:
        if name in values:
            lines.fail((*where, name), f"{name} does not belong here; it is set with {_ELSEWHERE[name]}")


def _known(
    values: dict[str, Any], known: Iterable[str], where: tuple[Any, ...], lines: Lines, owner: str, dotted: bool = False
) -> None:
    known = list(known)
    for name in values:
        outer, dot, key = str(name).partition(".")
        if name in known or (dotted and dot and key and outer in MAPPINGS):
            continue
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        lines.fail((*where, name), f"unknown '{name}' of {owner}{hint}; it knows {', '.join(known)}")


def _mapping(value: Any, where: tuple[Any, ...], lines: Lines) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        name = ".".join(map(str, where)) or "a sweep"
        lines.fail(where, f"{name} is a mapping of names to values, not {type(value).__name__}")
    return value


def _count(name: str, value: Any, least: int, lines: Lines) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        lines.fail((name,), f"{name}={value!r}: it is a whole number of at least {least}")
    return value


def _no_repeats(values: list[Any], where: tuple[Any, ...], lines: Lines) -> None:
    seen: set[str] = set()
    for value in values:
        try:
            plain = float(value) if not isinstance(value, bool) else value  # 1e-4 is text in YAML, 0.0001 a number
        except (TypeError, ValueError):
            plain = value
        if repr(plain) in seen:
            lines.fail(where, f"{value!r} is listed twice; the same trial would run twice")
        seen.add(repr(plain))
