"""The audit itself: weight by weight, each tuned checkpoint against the base, nothing held longer than it is needed."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..geometry.spectral_change import SpectralBase
from . import names
from .checkpoints import Checkpoint, open_checkpoint
from .counts import Counts, Entrywise, squared_norm
from .entrywise import compare
from .headers import CheckpointError
from .memory import release_free_memory
from .pairing import Matched, Pairing, iterate, pair
from .patterns import MOST, Patterns
from .reference import Reference
from .results import COUNTED, AuditReport, Change, Settings, Source, WeightAudit
from .spectral import directions, spectral
from .summary import fast_error, judge
from .tiles import ENTRIES

# What can be asked for, in the order of the report. Each names fields of results.Change and results.WeightAudit.
PROBES = {
    "sparsity": "entries that changed in bf16 and in the stored dtype, ||dW||",
    "magnitude": "overlap with the low-magnitude mask, how often entries changed by |W|",
    "principal": "overlap with the principal mask, and its control matched in magnitude",
    "subspace": "the share of dW inside the principal subspaces, and what its entries' sizes alone give",
    "spectrum": "singular values before and after",
    "angles": "principal angles of the top-k subspaces, and Wedin's bound beside them",
    "bounds": "the inequalities of Weyl, Mirsky and Ky Fan with both sides",
    "stripes": "changed entries by row and column, update maps with head boundaries",
    "consensus": "whether several tuned checkpoints changed the same entries",
}
_ENTRYWISE = {
    "magnitude": ("low", "magnitudes"),
    "principal": ("principal", "matched", "magnitudes"),
    "subspace": ("shares",),
    "stripes": ("stripes", "map"),
}
_SPECTRAL = ("principal", "subspace", "spectrum", "angles", "bounds")
_MOVING = ("spectrum", "angles", "bounds")  # that look at the tuned weight's spectrum as well
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, the weight's name


class AuditError(ValueError):
    """A request that cannot be carried out; the message says what was asked and what is possible."""


def audit(
    base: Checkpoint | str | Path,
    *tuned: Checkpoint | str | Path,
    probes: Sequence[str] | None = None,
    layers: Sequence[str] = (),
    rank: int | float = 1 / 16,
    mode: str = "fast",
    device: str | torch.device = "cpu",
    principal_density: float = 0.5,
    low_density: float = 0.5859,
    labels: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """What training did to the weights of ``base``: all of the paper's probes for each of ``tuned``.

    Memory: about 16 bytes for each entry of the largest tensor (exact mode: and 8 fp32 copies of the largest matrix
    that is decomposed), however many shards and models there are.

    Args:
        base, tuned: open checkpoints, or what :func:`open_checkpoint` opens; one to 30 tuned ones.
        probes: names of :data:`PROBES`; all by default ("consensus" where there are several tuned checkpoints).
        layers: regular expressions searched for in the base's names; a weight that one of them matches is audited.
            All by default, where embeddings and output heads have their entries counted and no spectrum; a pattern
            that names one has it decomposed too.
        rank: k of the principal subspaces and the principal mask, or a fraction of min(shape).
        mode: "fast", whose errors are stated with each figure and which falls back to exact SVDs where they would pass
            1 %, or "exact": fp64 SVDs.
        device: where matrices are decomposed, for instance "cuda".
        principal_density, low_density: of the masks M_princ and M_low.
        labels: names of the tuned checkpoints in the report; their folders' names by default.
        progress: called after each weight.

    Raises:
        CheckpointError: a checkpoint that cannot be read, a pattern that matches nothing, nothing left to compare.
        AuditError: an unknown probe, mode or device, a rank or density out of range, labels that do not fit.
    """
    started = time.perf_counter()
    chosen = _checked(probes, rank, mode, principal_density, low_density, len(tuned))
    settings = Settings(chosen, mode, rank, tuple(layers), str(device), principal_density, low_density)
    place = _device(device)
    with ExitStack() as stack:
        sides = [
            side if isinstance(side, Checkpoint) else stack.enter_context(open_checkpoint(side))
            for side in (base, *tuned)
        ]
        pairing = pair(*sides)
        sources = _sources(sides, pairing, labels)
        weights = _weights(_Work(settings, pairing, sides[0].config, place), _selected(pairing, layers), progress)
    skipped = [(skip.name, skip.reason) for skip in pairing.skipped]
    draft = AuditReport(settings, sources, weights, skipped, [], fast_error(weights, mode), 0.0)
    verdicts = [judge(draft, i) for i in range(len(tuned))]
    return dataclasses.replace(draft, verdicts=verdicts, seconds=time.perf_counter() - started)


def _weights(work: _Work, selected: Sequence[Matched], progress: Progress | None) -> list[WeightAudit]:
    weights, done, total = [], 0, sum(match.nbytes for match in selected)
    for match in selected:
        weights.append(work.weight(match))
        done += match.nbytes
        if progress is not None:
            progress(done, total, match.name)
    return weights


def _checked(
    probes: Sequence[str] | None, rank: int | float, mode: str, principal: float, low: float, count: int
) -> tuple[str, ...]:
    if isinstance(probes, str):
        raise AuditError(f"probes must be a sequence of names, got the string {probes!r}")
    unknown = [name for name in probes or () if name not in PROBES]
    if unknown:
        raise AuditError(f"unknown probe {unknown[0]!r}; the probes are {', '.join(PROBES)}")
    if mode not in ("fast", "exact"):
        raise AuditError(f"mode must be 'fast' or 'exact', got {mode!r}")
    if isinstance(rank, bool) or not (rank >= 1 if isinstance(rank, int) else 0.0 < rank < 1.0):
        raise AuditError(f"rank must be a number of directions (an int from 1) or a fraction in (0, 1), got {rank!r}")
    for name, value in (("principal_density", principal), ("low_density", low)):
        if not 0.0 < value < 1.0:
            raise AuditError(f"{name} must lie in (0, 1), got {value!r}")
    chosen = tuple(name for name in PROBES if probes is None or name in probes)
    if count < 2:
        if probes is not None and "consensus" in chosen:
            raise AuditError("the probe 'consensus' compares tuned checkpoints with each other; give two or more")
        chosen = tuple(name for name in chosen if name != "consensus")
    if count > MOST and "consensus" in chosen:
        raise AuditError(f"the probe 'consensus' takes {MOST} tuned checkpoints at most, got {count}; leave it out")
    if not chosen:
        raise AuditError(f"no probe is left; the probes are {', '.join(PROBES)}")
    return chosen


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise AuditError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return place


def _selected(pairing: Pairing, layers: Sequence[str]) -> list[Matched]:
    if isinstance(layers, str):
        raise AuditError(f"layers must be a sequence of regular expressions, got the string {layers!r}")
    if not layers:
        return list(pairing.matched)
    found: dict[str, Matched] = {}
    for pattern in layers:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise AuditError(f"layers: {pattern!r} is no regular expression ({error})") from None
        hits = [match for match in pairing.matched if expression.search(match.name)]
        if not hits:
            some = ", ".join(match.name for match in pairing.matched[:3])
            skipped = next((skip for skip in pairing.skipped if expression.search(skip.name)), None)
            why = f"; {skipped.name} was skipped: {skipped.reason}" if skipped else ""
            raise CheckpointError(
                f"layers: {pattern!r} matches none of the compared weights, for instance {some}{why}."
            )
        found |= {match.name: match for match in hits}
    return [match for match in pairing.matched if match.name in found]


def _sources(sides: Sequence[Checkpoint], pairing: Pairing, labels: Sequence[str] | None) -> list[Source]:
    given = (
        list(labels)
        if labels is not None
        else [side.path.stem if side.path.is_file() else side.path.name for side in sides[1:]]
    )
    if len(given) != len(sides) - 1 or len(set(given)) != len(given):
        if labels is not None:
            raise AuditError(f"labels: {len(sides) - 1} different names are needed, got {list(labels)}")
        given = [f"{name or 'tuned'} ({i})" for i, name in enumerate(given, 1)]
    renames = ["", *(str(rename) for rename in pairing.renames)]
    return [
        Source(label, str(side.path), len(side.tensors), side.nbytes, rename)
        for label, side, rename in zip(["base", *given], sides, renames, strict=True)
    ]


class _Work:
    """One audit's way through the weights."""

    def __init__(self, settings: Settings, pairing: Pairing, config: Any, device: torch.device) -> None:
        self.settings, self.pairing, self.config, self.device = settings, pairing, config, device
        self.probes = set(settings.probes)
        self.wanted = {field for probe in self.probes for field in _ENTRYWISE.get(probe, ())}

    def weight(self, match: Matched) -> WeightAudit:
        notes = [match.note] if match.note else []
        reason = self._unfit(match)
        if reason:
            notes += [reason] if self.probes & set(_ENTRYWISE) | self.probes & set(_SPECTRAL) else []
            norm, changes, agreement = self._streamed(match)
        else:
            norm, changes, agreement = self._matrix(match, notes)
        where = names.place(match.name)
        return WeightAudit(
            match.name,
            where.kind,
            where.layer,
            match.shape,
            [info.stored for info in match.infos],
            match.infos[0].numel,
            norm,
            changes,
            agreement,
            notes,
        )

    def _unfit(self, match: Matched) -> str:
        """Why only the entries of a tensor are counted; empty for a matrix."""
        if len(match.shape) != 2 or min(match.shape) < 2:
            return f"{COUNTED}: its shape {match.shape} is that of no matrix"
        named = any(re.search(pattern, match.name) for pattern in self.settings.layers)
        if names.is_embedding(match.name) and not named:
            return f"{COUNTED}: an embedding or output head (name it in layers to have it decomposed)"
        return ""

    def _patterns(self, match: Matched) -> Patterns | None:
        count = len(match.infos) - 1
        return Patterns(match.shape, count, self.device) if "consensus" in self.probes else None

    def _streamed(self, match: Matched) -> tuple[float, list[Change], Any]:
        """Counts alone, a few blocks in memory."""
        patterns = self._patterns(match)
        counts, squares = [Counts(match.common(i)) for i in range(len(match.infos) - 1)], 0.0
        for block in iterate(dataclasses.replace(self.pairing, matched=(match,)), ENTRIES, flat=True, reuse=True):
            base, *tuned = (tensor.to(self.device) for tensor in block.tensors)
            squares += squared_norm(base)
            for i, (count, side) in enumerate(zip(counts, tuned, strict=True)):
                count.add(base, side, patterns=patterns, index=i, start=block.start)
        changes = [_change(count.result(), {}, []) for count in counts]
        return squares**0.5, changes, patterns.agreement() if patterns else None

    def _matrix(self, match: Matched, notes: list[str]) -> tuple[float, list[Change], Any]:
        base = self.pairing.checkpoints[0].read(match.infos[0].name).to(self.device)
        norm, patterns = squared_norm(base) ** 0.5, self._patterns(match)
        heads = names.heads(match.name, match.shape, self.config)
        spectrum = self._spectrum(match, base, notes)
        release_free_memory()
        reference = Reference(
            base,
            spectrum.top if spectrum is not None and self.probes & {"principal", "subspace"} else None,
            wanted=self.wanted,
            principal_density=self.settings.principal_density,
            low_density=self.settings.low_density,
            heads=heads,
        )
        release_free_memory()
        changes = []
        for i, (info, side) in enumerate(zip(match.infos[1:], self.pairing.checkpoints[1:], strict=True)):
            tuned = side.read(info.name).to(self.device)
            entries = compare(reference, tuned, common=match.common(i), patterns=patterns, index=i)
            if i == len(match.infos) - 2:  # the last one: the spectra need its memory
                del reference
                release_free_memory()
            fields: dict[str, Any] = {}
            said = []
            if any(entries.nonfinite):
                said.append("NaN or infinite entries: counted, nothing else is computed")
            elif spectrum is not None and self.probes & set(_MOVING):
                fields = spectral(spectrum, tuned, entries.norm, self.probes)
            changes.append(_change(entries, fields, said))
            del tuned
            release_free_memory()
        return norm, changes, patterns.agreement(heads) if patterns else None

    def _spectrum(self, match: Matched, base: torch.Tensor, notes: list[str]) -> SpectralBase | None:
        if not self.probes & set(_SPECTRAL):
            return None
        k = directions(self.settings.rank, (match.shape[0], match.shape[1]))
        if k is None:
            notes.append(f"no spectral figures: k = {self.settings.rank} directions are all of {match.shape}")
            return None
        if not bool(base.isfinite().all()) or not bool(base.any()):
            notes.append("no spectral figures: the base's weight is zero or not finite")
            return None
        method: Any = self.settings.mode
        return SpectralBase(base, k, method=method, name=match.name)


def _change(entries: Entrywise, fields: dict[str, Any], notes: list[str]) -> Change:
    known = {f.name: getattr(entries, f.name) for f in dataclasses.fields(Entrywise)}
    return Change(**known, **fields, notes=notes)
