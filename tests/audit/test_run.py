"""The library call: figures against whole-matrix twins, fast against exact, what is asked for and what is left out."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from audit.dense import changed_mask, close, common_of, pair, slow_counts, slow_low, slow_matched
from audit.test_storing import same
from offprincipal_peft.audit import AuditError, AuditReport, Change, audit, run, to_json
from offprincipal_peft.audit.results import Overlap
from offprincipal_peft.geometry import bounds, drift, energy_shares
from offprincipal_peft.geometry.masks import MaskOptions, build_mask
from offprincipal_peft.geometry.subspace import principal_angles

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAME = "model.layers.0.mlp.up_proj.weight"
SHAPES = {"tall": (96, 48), "wide": (48, 96), "square": (64, 64)}


def model(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def sharded(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """One shard for each tensor, the last name first."""
    folder.mkdir(parents=True)
    places = {name: f"shard-{i}.safetensors" for i, name in enumerate(sorted(tensors, reverse=True))}
    for name, file in places.items():
        save_file({name: tensors[name].contiguous()}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def one(tmp_path: Path, base: Tensor, *tuned: Tensor, **options: Any) -> AuditReport:
    """One weight in every checkpoint."""
    sides = [model(tmp_path / f"side{i}", {NAME: side}) for i, side in enumerate((base, *tuned))]
    return audit(*sides, **options)


def change(report: AuditReport) -> Change:
    assert len(report.weights) == 1
    return report.weights[0].changes[0]


def plain(report: AuditReport) -> dict[str, Any]:
    """As JSON, without what differs from run to run and from folder to folder."""
    return to_json(dataclasses.replace(report, seconds=0.0, sources=[]))


# ---- against whole-matrix twins


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32), (F64, F32), (F16, BF16)], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_figures_are_those_of_whole_matrices(
    tmp_path: Path, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], mode: str
) -> None:
    base, tuned = pair(shape, dtypes)
    report = one(tmp_path, base, tuned, mode=mode, rank=5, principal_density=0.4, low_density=0.3)
    found, k = change(report), 5
    assert (found.changed, found.stored_changed) == slow_counts(base, tuned)[:2]
    assert (found.norm, found.largest) == pytest.approx(slow_counts(base, tuned)[2:], rel=1e-6)  # fp32 differences
    assert report.weights[0].norm == pytest.approx(float(base.double().norm()), rel=1e-12)
    flags = changed_mask(base, tuned)
    close(found.low, slow_low(base, flags, 0.3))
    mask = build_mask(base.float(), "principal", MaskOptions(principal_rank=k, principal_density=0.4)).entries
    on = Overlap(float((flags & mask).sum() / flags.sum()), float(mask.double().mean()))
    tolerance = 0.0 if mode == "exact" else 2 / int(flags.sum())  # fp32 can swap two entries at the mask's edge
    assert found.principal is not None and abs(found.principal.value - on.value) <= tolerance + 1e-7
    assert found.principal.baseline == pytest.approx(on.baseline)
    if found.principal.value == on.value:
        close(found.matched, slow_matched(base, tuned, mask), rel=1e-6)
    U, _, Vh = torch.linalg.svd(base.double(), full_matrices=False)
    X, _, Yh = torch.linalg.svd(tuned.double(), full_matrices=False)
    shares = energy_shares(tuned.double() - base.double(), U[:, :k], Vh[:k].T)
    for name, value in shares._asdict().items():
        assert getattr(found, name).value == pytest.approx(value, rel=1e-4)  # 2e-5 observed
    for side, turned in (("output", (U[:, :k], X[:, :k])), ("input", (Vh[:k].T, Yh[:k].T))):
        assert found.angles is not None
        expected = principal_angles(*turned)
        assert (torch.tensor(getattr(found.angles, side)) - expected).abs().max() <= max(
            0.01 * float(expected.max()), 1e-6
        )
    for ratios, stripes in (
        (drift.row_update_ratios(flags), found.rows),
        (drift.column_update_ratios(flags), found.columns),
    ):
        assert stripes is not None
        assert (stripes.least, stripes.most) == (float(ratios.min()), float(ratios.max()))
        assert (stripes.mean, stripes.std) == pytest.approx((float(ratios.mean()), float(ratios.std(correction=0))))


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_spectra_and_bounds_are_those_of_two_svds(tmp_path: Path, shape: tuple[int, int], mode: str) -> None:
    base, tuned = pair(shape, (F32, F32), share=1.0)
    found, k = change(one(tmp_path, base, tuned, mode=mode, rank=4)), 4
    assert found.spectrum is not None and found.angles is not None
    spectra = bounds.pair_spectra(base, tuned, k)
    shift = drift.normalized_spectral_shift(spectra.base, spectra.tuned)
    rel = 1e-10 if mode == "exact" else 0.01
    assert found.spectrum.shift == pytest.approx(shift, rel=rel, abs=1e-6)
    assert abs(found.spectrum.shift - shift) <= found.spectrum.error + 1e-12  # what fast mode states of itself
    rank = drift.stable_rank(spectra.update)
    assert found.spectrum.stable_rank == pytest.approx(rank, rel=3e-3)  # 1.1e-3 observed: the norm in bf16
    assert found.spectrum.before == pytest.approx(spectra.base.tolist(), rel=1e-3)
    assert found.spectrum.positions == list(range(min(shape)))
    wedin = bounds.wedin(base, tuned, k, spectra=spectra)
    expected = {
        "weyl": bounds.weyl(base, tuned, spectra=spectra),
        "mirsky": bounds.mirsky(base, tuned, spectra=spectra),
        "ky_fan": bounds.ky_fan(base, tuned, k, spectra=spectra).paper,
    }
    pairs = [(found.bounds[name], bound) for name, bound in expected.items()]
    pairs += [(found.angles.wedin, wedin.paper), (found.angles.wedin_always, wedin.double_angle)]
    for inequality, bound in pairs:
        assert inequality.left == pytest.approx(bound.left, rel=max(rel, 1e-6), abs=1e-6)
        assert inequality.right == pytest.approx(bound.right, rel=max(rel, 1e-6), abs=1e-6)
        assert inequality.asymptotic is bound.asymptotic
        assert inequality.asymptotic or inequality.left <= inequality.right + inequality.tolerance
    assert found.angles.gap == pytest.approx(wedin.gap, rel=max(rel, 1e-6))
    assert found.angles.k == k == len(found.angles.output) == len(found.angles.input)


@pytest.mark.parametrize("size", [1e-5, 1e-3, 0.3])
def test_fast_is_exact_within_one_per_cent_and_what_it_states(tmp_path: Path, size: float) -> None:
    weights, tuned = {}, {}
    for i, shape in enumerate(((160, 96), (96, 160), (128, 128))):
        base, other = pair(shape, (F32, F32), share=1.0, seed=i)
        name = f"model.layers.{i}.mlp.up_proj.weight"
        weights[name], tuned[name] = base, base + (other - base) * (size * base.norm() / (other - base).norm())
    sides = model(tmp_path / "base", weights), model(tmp_path / "tuned", tuned)
    fast, exact = (audit(*sides, mode=mode) for mode in ("fast", "exact"))
    for one_of, other in zip(fast.weights, exact.weights, strict=True):
        a, b = one_of.changes[0], other.changes[0]
        assert a.spectrum and b.spectrum and a.angles and b.angles and b.route == "exact"
        assert abs(a.spectrum.shift - b.spectrum.shift) <= max(0.01 * b.spectrum.shift, 1e-6)
        assert abs(a.spectrum.shift - b.spectrum.shift) <= a.spectrum.error + 1e-12
        worst = max(
            abs(x - y)
            for side in ("output", "input")
            for x, y in zip(getattr(a.angles, side), getattr(b.angles, side), strict=True)
        )
        print(f"{size:g} {a.route}: shift {abs(a.spectrum.shift / b.spectrum.shift - 1):.1e}, angles {worst:.1e}")
        assert worst <= max(0.01 * max(b.angles.output[-1], b.angles.input[-1]), 1e-6)
        assert worst <= a.angles.error + 1e-9
        assert (a.changed, a.norm, a.rows) == (b.changed, b.norm, b.rows)
    assert exact.error.startswith("Exact mode") and exact.weights[0].changes[0].spectrum.error == 0.0  # type: ignore[union-attr]


# ---- several files, several models


def tensors(dtype: torch.dtype = BF16, seed: int = 0, kinds: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    before, after = {}, {}
    for i in range(kinds):
        name = f"model.layers.{i}.mlp.up_proj.weight"
        before[name], after[name] = pair((48, 32), (dtype, dtype), seed=seed + i)
    return before | {"model.norm.weight": torch.ones(32)}, after | {"model.norm.weight": torch.full((32,), 1.5)}


def test_shards_are_as_one_file(tmp_path: Path) -> None:
    before, after = tensors()
    whole = audit(model(tmp_path / "b", before), model(tmp_path / "t", after))
    parts = audit(sharded(tmp_path / "bs", before), sharded(tmp_path / "ts", after))
    mixed = audit(model(tmp_path / "b", before), sharded(tmp_path / "ts2", after))
    key = lambda weight: weight.name  # noqa: E731
    for other in (parts, mixed):
        assert same(sorted(other.weights, key=key), sorted(whole.weights, key=key))
        assert other.verdicts == whole.verdicts or other is parts  # sums in another order may differ in a last digit


def test_the_same_twice(tmp_path: Path) -> None:
    before, after = tensors()
    sides = model(tmp_path / "b", before), model(tmp_path / "t", after)
    assert plain(audit(*sides)) == plain(audit(*sides))
    assert plain(audit(*sides)) != plain(audit(*sides, rank=3))


def test_several_tuned_checkpoints_in_their_order(tmp_path: Path) -> None:
    base = tensors()[0]
    others = [tensors()[1], base, {n: (t * 1.5 if t.ndim == 2 else t) for n, t in base.items()}]
    # the norm changed in the first alone
    folders = [model(tmp_path / name / "final", side) for name, side in zip("abc", others, strict=True)]
    root = model(tmp_path / "base", base)
    report = audit(root, *folders, rank=4)
    assert [source.label for source in report.sources] == ["base", "final (1)", "final (2)", "final (3)"]
    assert [source.path for source in report.sources[1:]] == [str(folder) for folder in folders]
    named = audit(root, *folders, rank=4, labels=["x", "y", "z"])
    assert [source.label for source in named.sources] == ["base", "x", "y", "z"]
    for i, folder in enumerate(folders):
        alone = audit(root, folder, rank=4)
        assert alone.verdicts[0] == report.verdicts[i]
        assert same([w.changes[0] for w in alone.weights], [w.changes[i] for w in report.weights])
        assert all(weight.agreement is None for weight in alone.weights)
    found = {weight.name: weight for weight in report.weights}
    for name in (name for name in base if "up_proj" in name):
        masks = [changed_mask(base[name], side[name]) for side in others]
        expected, agreement = drift.consensus(masks), found[name].agreement
        assert agreement is not None and agreement.frequencies == list(expected.frequencies)
        assert (agreement.jaccard, agreement.baseline) == pytest.approx((expected.jaccard, expected.baseline))
        assert [p[:2] for p in agreement.pairs] == [(0, 1), (0, 2), (1, 2)]
    norm = found["model.norm.weight"].agreement
    assert norm is not None and norm.map is None and [p[:3] for p in norm.pairs] == [(0, 1, 0.0), (0, 2, 0.0)]


def test_labels_must_fit(tmp_path: Path) -> None:
    before, after = tensors()
    sides = model(tmp_path / "b", before), model(tmp_path / "t", after), model(tmp_path / "u", after)
    for labels in (["one"], ["a", "a"], ["a", "b", "c"]):
        with pytest.raises(AuditError, match="labels: 2 different names are needed"):
            audit(*sides, labels=labels)
    file = audit(sides[0], sides[1] / "model.safetensors")
    assert file.sources[1].label == "model"


def test_progress_is_told_in_bytes_until_all_is_done(tmp_path: Path) -> None:
    before, after = tensors()
    told: list[tuple[int, int, str]] = []
    report = audit(model(tmp_path / "b", before), model(tmp_path / "t", after), progress=lambda *x: told.append(x))
    assert [name for _, _, name in told] == [weight.name for weight in report.weights]
    total = sum(tensor.nbytes for side in (before, after) for tensor in side.values())
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1][0] == total and {of for _, of, _ in told} == {total}


# ---- what is asked for

GIVES = {
    "sparsity": set(),
    "magnitude": {"low", "magnitudes"},
    "principal": {"principal", "matched", "magnitudes"},
    "subspace": {"output", "input", "both"},
    "spectrum": {"spectrum"},
    "angles": {"angles"},
    "bounds": {"bounds"},
    "stripes": {"rows", "columns", "map"},
    "consensus": set(),
}
COUNTED = {"changed", "stored_changed", "norm", "largest", "nonfinite", "route", "notes"}


def test_every_probe_is_known_here() -> None:
    assert list(GIVES) == list(run.PROBES)


@pytest.mark.parametrize("probe", GIVES)
def test_a_probe_gives_its_fields_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: str) -> None:
    made: list[str] = []
    real = run.SpectralBase
    monkeypatch.setattr(run, "SpectralBase", lambda *a, **k: made.append("base") or real(*a, **k))
    moved = real.change
    monkeypatch.setattr(real, "change", lambda *a: made.append("change") or moved(*a))
    base, tuned = pair((48, 32))
    report = one(tmp_path, base, tuned, base, probes=[probe])
    found = change(report)
    filled = {f.name for f in dataclasses.fields(Change) if f.name not in COUNTED and getattr(found, f.name)}
    assert filled == GIVES[probe]
    assert (report.weights[0].agreement is not None) == (probe == "consensus")
    assert report.settings.probes == (probe,)
    assert made == {
        **{name: ["base"] for name in ("principal", "subspace")},
        **{name: ["base", "change", "change"] for name in ("spectrum", "angles", "bounds")},
    }.get(probe, [])
    assert report.verdicts[0].density == "sparse"
    assert (report.verdicts[0].direction != "unknown") == (probe == "subspace")
    assert (report.verdicts[0].stripes != "unknown") == (probe == "stripes")


def test_layers_select_weights_and_name_embeddings(tmp_path: Path) -> None:
    before, after = tensors()
    embedding = pair((64, 32))
    sides = [
        model(tmp_path / n, side | {"model.embed_tokens.weight": e, "lm_head.weight": e + 1})
        for n, side, e in zip("bt", (before, after), embedding, strict=True)
    ]
    whole = {weight.name: weight for weight in audit(*sides).weights}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert whole[name].changes[0].spectrum is None and whole[name].changes[0].changed
        assert "an embedding or output head (name it in layers" in whole[name].notes[0]
    some = audit(*sides, layers=[r"layers\.(0|2)\.", "embed_tokens"])
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"]
    assert sorted(weight.name for weight in some.weights) == names
    found = {weight.name: weight for weight in some.weights}["model.embed_tokens.weight"]
    assert found.changes[0].spectrum is not None and not found.notes
    assert (found.changes[0].changed, found.norm) == (whole[found.name].changes[0].changed, whole[found.name].norm)


@pytest.mark.parametrize(("rank", "k"), [(1, 1), (7, 7), (31, 31), (0.25, 8), (0.001, 1), (0.99, 31)])
def test_rank_is_a_count_or_a_fraction(tmp_path: Path, rank: float, k: int) -> None:
    found = change(one(tmp_path, *pair((48, 32)), rank=rank))
    assert found.angles is not None and found.angles.k == k


@pytest.mark.parametrize("rank", [32, 500])
def test_a_rank_that_is_the_whole_space_is_noted(tmp_path: Path, rank: int) -> None:
    report = one(tmp_path, *pair((48, 32)), rank=rank)
    found = change(report)
    assert found.angles is None and found.spectrum is None and found.low is not None
    assert report.weights[0].notes == [f"no spectral figures: k = {rank} directions are all of (48, 32)"]


# ---- odd tensors


def test_what_is_no_matrix_is_counted_alone(tmp_path: Path) -> None:
    shapes = {"vector": (5,), "scalar": (), "cube": (3, 4, 5), "row": (1, 6), "column": (6, 1), "empty": (0, 4)}
    base = {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in tuned.values():
        tensor.view(-1)[:1] = 3.0
    report = audit(model(tmp_path / "b", base), model(tmp_path / "t", tuned))
    found = {weight.kind: weight for weight in report.weights}
    assert set(found) == set(shapes)
    for kind, shape in shapes.items():
        assert found[kind].shape == shape and found[kind].entries == math.prod(shape)
        assert found[kind].changes[0].changed == (kind != "empty")
        assert found[kind].changes[0].norm == (0.0 if kind == "empty" else 2.0)
        assert found[kind].notes == [f"entries are counted only: its shape {shape} is that of no matrix"]


def test_equal_checkpoints(tmp_path: Path) -> None:
    base, _ = tensors()
    report = audit(model(tmp_path / "b", base), model(tmp_path / "t", base))
    assert report.verdicts[0].sentences == ["No entry of any compared weight changed."]
    for weight in report.weights:
        found = weight.changes[0]
        assert (found.changed, found.norm, found.low, found.output) == (0, 0.0, None, None)
        assert weight.kind == "norm" or (found.spectrum is not None and found.spectrum.shift == 0.0 and not found.notes)


def test_zero_weights(tmp_path: Path) -> None:
    base, tuned = pair((48, 32))
    report = one(tmp_path / "a", torch.zeros_like(base), tuned)
    assert report.weights[0].notes == ["no spectral figures: the base's weight is zero or not finite"]
    assert change(report).changed == int((tuned != 0).sum()) and change(report).spectrum is None
    gone = change(one(tmp_path / "b", base, torch.zeros_like(base)))
    assert gone.spectrum is not None and gone.spectrum.shift == pytest.approx(1.0, rel=0.01)  # 0.9994 observed
    assert gone.norm == pytest.approx(float(base.double().norm()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_entries_that_are_not_finite(tmp_path: Path, side: int, value: float) -> None:
    weights = [tensor.clone() for tensor in pair((48, 32))]
    weights[side][3, 4] = value
    report = one(tmp_path, *weights, mode="exact")
    found = change(report)
    assert found.nonfinite == (1 - side, side) and found.spectrum is None and found.low is None
    assert found.notes == ["NaN or infinite entries: counted, nothing else is computed"]
    assert math.isfinite(found.norm) and found.changed > 0
    json.dumps(to_json(report), allow_nan=False)


def test_a_broken_weight_leaves_the_others_their_figures(tmp_path: Path) -> None:
    before, after = tensors()
    broken = after | {NAME: torch.full_like(after[NAME], math.nan)}
    sides = model(tmp_path / "b", before), model(tmp_path / "t", after), model(tmp_path / "n", broken)
    report, alone = audit(*sides), audit(*sides[:2])
    assert {w.name for w in report.weights if w.changes[1].spectrum is None} == {NAME, "model.norm.weight"}
    assert same([w.changes[0] for w in report.weights], [w.changes[0] for w in alone.weights])


@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, BF16), (F16, F64), (F64, BF16), (F16, BF16)], ids=str)
def test_mixed_dtypes_are_noted(tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    base, tuned = pair((48, 32), dtypes)
    report = one(tmp_path, base, tuned)
    common = str(common_of(base, tuned)).removeprefix("torch.")
    assert len(report.weights[0].notes) == 1 and f"stored values are compared in {common}" in report.weights[0].notes[0]
    assert (change(report).changed, change(report).stored_changed) == slow_counts(base, tuned)[:2]


@pytest.mark.parametrize("shape", [(16, 32), (64,)], ids=["matrix", "vector"])
def test_figures_of_a_checkpoint_do_not_depend_on_those_beside_it(tmp_path: Path, shape: tuple[int, ...]) -> None:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    tuned = base * (1 + 1e-5)  # below bf16's step: stored in fp32, lost in bf16
    paths = [model(tmp_path / name, {"w": w}) for name, w in (("base", base), ("tuned", tuned), ("half", base.half()))]
    alone = audit(paths[0], paths[1], probes=["sparsity"]).weights[0].changes[0]
    beside = audit(*paths, probes=["sparsity"]).weights[0].changes[0]
    assert alone == beside
    assert alone.stored_changed == base.numel() > alone.changed
