"""What an audit found, as data: one entry for each weight, in it one for each tuned checkpoint, and a summary.

Everything is a plain number, string or list, so that :func:`storing.to_json` loses nothing but the maps' tensors,
which become base64. A figure that was not asked for, or that the weight does not have, is None; ``notes`` says why.
Angles are in radians, norms in the units of the weights, shares and rates in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

FORMAT = "offprincipal-audit/1"
COUNTED = "entries are counted only"  # how the note on a weight begins whose spectrum was not asked for


@dataclass(frozen=True)
class Overlap:
    """The share of the changed entries that lie on a mask, and the mask's own density: what chance gives."""

    value: float
    baseline: float


@dataclass(frozen=True)
class Matched:
    """Changes on and off the principal mask among entries of the same magnitude, over 64 quantile bins of |W0|.

    ``coverage``: the share of the principal entries that have a partner. Rates are shares of changed entries, energies
    mean squared changes. ``error``: the standard error of log(rate / other_rate) if every entry changed independently
    of the others; entries that move together (rows, low rank) make it too small. None where a rate is 0.
    """

    rate: float
    other_rate: float
    energy: float
    other_energy: float
    coverage: float
    error: float | None = None


@dataclass(frozen=True)
class Share:
    """A share of ||dW||_F^2, and what it would be without directions.

    ``random``: for an update of independent entries of one size. ``sizes``: for the update itself with random signs,
    exactly: what the sizes of its entries alone give.
    """

    value: float
    random: float
    sizes: float


@dataclass(frozen=True)
class Stripes:
    """Shares of changed entries by row or column. ``random_std``: of independent changes at the same density.

    ``profile``: means over at most 128 runs of neighbours, in order. ``energy``: the coefficient of variation of the
    rows' (columns') squared change, and ``random_energy`` that of the same entries in random places.
    """

    mean: float
    std: float
    random_std: float
    least: float
    most: float
    energy: float
    random_energy: float
    profile: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Inequality:
    """``left <= right``; ``tolerance`` is what rounding can have added. ``asymptotic``: to first order only."""

    left: float
    right: float
    tolerance: float = 0.0
    asymptotic: bool = False


@dataclass(frozen=True)
class Spectrum:
    """Singular values before and after. ``shift``: NSS, ||s+ - s||_2 / ||s||_2; ``largest``: max |s+ - s|.

    ``change_norm``: ||dW||_2. ``stable_rank``: ||dW||_F^2 / ||dW||_2^2. ``error``: the stated error of ``shift``, 0 in
    exact mode. ``before`` and ``shifts``: s and s+ - s, thinned to at most 128 values, at ``positions`` (from 0).
    """

    shift: float
    largest: float
    change_norm: float
    stable_rank: float
    error: float
    positions: list[int] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    shifts: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Angles:
    """Principal angles between the top-k singular subspaces, ascending, k each; ``error``: stated, of each angle.

    ``wedin``: the paper's bound on the sine of the largest, first order; ``wedin_always``: the double-angle form, which
    holds for every update. ``gap``: sigma_k - sigma_(k+1) of the base.
    """

    k: int
    output: list[float]
    input: list[float]
    error: float
    gap: float
    wedin: Inequality
    wedin_always: Inequality


@dataclass(frozen=True)
class Map:
    """Density of changed entries in a grid of equal cells over the matrix, uint8 (rows, columns): 255 is every entry.

    ``row_heads``, ``column_heads``: where attention heads begin and end, in the matrix' rows and columns; empty where
    the rows (columns) are not those of heads.
    """

    density: Tensor
    row_heads: list[int] = field(default_factory=list)
    column_heads: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Magnitudes:
    """How often entries changed, by |W0|: at most 64 quantile bins, ascending. ``size``: the bin's mean |W0|.

    ``entries``: what the bins hold, much the same but where many entries are of one size (a pruned weight's zeros).
    ``rate``: the share of them that changed; ``principal_rate``: of those on the principal mask, None in a bin that has
    none of them, and None for all where there was no mask.
    """

    size: list[float]
    entries: list[int]
    rate: list[float]
    principal_rate: list[float | None] | None


@dataclass(frozen=True)
class Entrywise:
    """What is a sum over the entries of one weight, of one tuned checkpoint against the base.

    ``changed``: entries whose bf16 value is another (the paper's Definition 2.1). ``stored_changed``: entries that
    differ in the coarser of the dtypes they are stored in. ``norm``, ``largest``: ||dW||_F and max |dW| of the stored
    values in fp32. ``nonfinite``: NaN and infinite entries, base and tuned; ``norm`` and ``largest`` leave them out,
    and all below is None.
    """

    changed: int
    stored_changed: int
    norm: float
    largest: float
    nonfinite: tuple[int, int] = (0, 0)
    low: Overlap | None = None
    principal: Overlap | None = None
    matched: Matched | None = None
    magnitudes: Magnitudes | None = None
    output: Share | None = None
    input: Share | None = None
    both: Share | None = None
    rows: Stripes | None = None
    columns: Stripes | None = None
    map: Map | None = None


@dataclass(frozen=True)
class Change(Entrywise):
    """One weight of one tuned checkpoint against the base."""

    spectrum: Spectrum | None = None
    angles: Angles | None = None
    bounds: dict[str, Inequality] = field(default_factory=dict)  # "weyl", "mirsky", "ky_fan"
    route: str = ""  # "fast", "exact", or why a fast answer was computed again exactly
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Agreement:
    """Changed entries of several tuned checkpoints: mean Jaccard index over the pairs and that of independent masks.

    ``frequencies``: entries changed by exactly 0, 1, … n of them; ``expected``: the same for independent masks.
    """

    jaccard: float
    baseline: float
    pairs: list[tuple[int, int, float, float]]  # first, second (positions), jaccard, baseline
    frequencies: list[int]
    expected: list[float]
    map: Map | None = None  # density of the entries that every one changed


@dataclass(frozen=True)
class WeightAudit:
    """One weight of the base. ``kind``: the module's name ("q_proj"); ``layer``: its index, None outside the stack."""

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    stored: list[str]  # dtypes as in the files, base first
    entries: int
    norm: float  # ||W0||_F
    changes: list[Change]
    agreement: Agreement | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """What the summary says of one tuned checkpoint: one word for each question, and the sentences with the numbers.

    The words, in the order of the fields (``"unknown"`` where the probes that answer it did not run):
    ``"none" | "sparse" | "between" | "dense"``; ``"all" | "part" | "none"`` (of the stored changes, visible in bf16);
    ``"principal" | "off-principal" | "no preference"``; ``"explained" | "not explained" | "no overlap"`` (whether
    magnitude alone accounts for what is seen on the principal mask); ``"rows" | "columns" | "both" | "no"``.
    """

    density: str
    visible: str
    direction: str
    magnitude: str
    stripes: str
    sentences: list[str]


@dataclass(frozen=True)
class Source:
    """A checkpoint of the audit. ``rename``: what its names lost to meet the base's; empty for the base."""

    label: str
    path: str
    tensors: int
    nbytes: int
    rename: str = ""


@dataclass(frozen=True)
class Settings:
    """What was asked for. ``rank``: k, or a fraction of min(shape). Densities are those of the masks."""

    probes: tuple[str, ...]
    mode: str
    rank: int | float
    layers: tuple[str, ...]
    device: str
    principal_density: float
    low_density: float
    seed: int = 0


@dataclass(frozen=True)
class AuditReport:
    """The whole audit; ``skipped``: (name, reason) of what was not compared, ``error``: fast mode's error in words."""

    settings: Settings
    sources: list[Source]  # base first
    weights: list[WeightAudit]
    skipped: list[tuple[str, str]]
    verdicts: list[Verdict]  # one for each tuned checkpoint
    error: str
    seconds: float
