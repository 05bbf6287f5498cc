"""Patches that are made from two checkpoints, against those made by hand."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from interop.patches.twins import (
    DTYPES,
    LAYOUTS,
    State,
    bytes_by_entry,
    changed,
    copy,
    differences,
    draw,
    hash_of,
    load,
    model_state,
    next_state,
    patched,
    same,
    signed,
    split,
    write,
)
from offprincipal_peft.audit import CheckpointError
from offprincipal_peft.interop.sparse_patch import (
    PatchError,
    PatchFile,
    PatchInfo,
    apply_patch,
    file,
    make_anchor,
    make_patch,
    states,
)
from offprincipal_peft.interop.sparse_patch.making import differing


def check(base: State, tuned: State, tmp_path: Path, layouts: tuple[str, str] = ("file", "file")) -> PatchInfo:
    """Make, compare with the twin, apply in place, compare the target."""
    before, after = write(tmp_path / "base", base, layouts[0]), write(tmp_path / "tuned", tuned, layouts[1])
    info = make_patch(before, after, tmp_path / "patch.safetensors")
    found, expected = load_file(info.path), differences(base, tuned)
    assert set(found) == {f"{name}.{part}" for name in expected for part in ("indices", "values")}
    for name, (positions, values) in expected.items():
        assert found[f"{name}.indices"].dtype == torch.int32
        assert torch.equal(found[f"{name}.indices"].long(), positions)
        assert same({"v": found[f"{name}.values"]}, {"v": values})
    assert same(patched(base, found), tuned)
    assert info.entries == {name: len(values) for name, (_, values) in expected.items()}
    assert info.shapes == {name: tuple(tuned[name].shape) for name in expected}
    assert (info.base, info.result) == (hash_of(base), hash_of(tuned))
    assert info.total == sum(t.numel() for t in base.values())
    assert apply_patch(before, info.path).state == info.result
    assert same(load(before), tuned)
    return info


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    base = {"x": draw(dtype, (41, 3), 0), "y": draw(dtype, (5,), 1)}
    check(base, {"x": changed(base["x"], 17, 2), "y": base["y"]}, tmp_path)


@pytest.mark.parametrize("before", LAYOUTS)
@pytest.mark.parametrize("after", LAYOUTS)
def test_folders_and_files_in_any_pair(before: str, after: str, tmp_path: Path) -> None:
    base = model_state()
    check(base, next_state(base, 5), tmp_path, (before, after))


def bits(*values: int) -> torch.Tensor:
    return torch.tensor([struct.unpack("<i", struct.pack("<I", v))[0] for v in values], dtype=torch.int32)


def test_zeros_of_both_signs_nan_payloads_and_infinities(tmp_path: Path) -> None:
    #           0 -> -0     NaN -> other NaN   NaN stays   inf -> -inf  inf stays   -0 stays    signalling NaN arrives
    before = bits(0, 0x7FC00000, 0x7FC00001, 0x7F800000, 0x7F800000, 0x80000000, 0)
    after = bits(0x80000000, 0x7FC00001, 0x7FC00001, 0xFF800000, 0x7F800000, 0x80000000, 0x7F800001)
    info = check({"x": before.view(torch.float32)}, {"x": after.view(torch.float32)}, tmp_path)
    assert load_file(info.path)["x.indices"].tolist() == [0, 1, 3, 6]
    assert torch.equal(load_file(info.path)["x.values"].view(torch.int32), after[[0, 1, 3, 6]])


@pytest.mark.parametrize("block", [1 << 21, 2])
def test_bytes_of_a_bool_that_are_neither_0_nor_1(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "BLOCK", block)
    monkeypatch.setattr(file, "_LEAST", block)
    monkeypatch.setattr(states, "BLOCK", 2 * block)
    before = torch.tensor([0, 1, 1, 1, 2, 255], dtype=torch.uint8).view(torch.bool)
    after = torch.tensor([0, 1, 2, 0, 1, 255], dtype=torch.uint8).view(torch.bool)
    info = check({"x": before}, {"x": after}, tmp_path)
    assert load_file(info.path)["x.values"].view(torch.uint8).tolist() == [2, 0, 1]


@pytest.mark.parametrize("count", [0, 1, 9, 301], ids=["nothing", "one entry", "few", "everything"])
def test_how_many_entries_changed(count: int, tmp_path: Path) -> None:
    base = model_state()
    info = check(base, base | {"e.long": changed(base["e.long"], count, 1)}, tmp_path)
    assert info.count == count and info.density == pytest.approx(count / info.total)


def test_scalars_and_every_entry_of_every_tensor(tmp_path: Path) -> None:
    base = model_state()
    info = check(base, {name: changed(value, value.numel(), 3) for name, value in base.items()}, tmp_path)
    assert info.entries["b.scale"] == 1 and "d.empty" not in info.entries and info.density == 1


def test_tensors_longer_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "BLOCK", 16)
    monkeypatch.setattr(file, "_LEAST", 5)
    monkeypatch.setattr(states, "BLOCK", 16)
    base = model_state()
    for i, count in enumerate((0, 3, 150, 301)):
        root = tmp_path / str(i)
        root.mkdir()
        check(base, base | {"e.long": changed(base["e.long"], count, i)}, root, ("sharded", "single"))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_over_several_blocks(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in parts that are no blocks, which are joined."""
    monkeypatch.setattr(file, "BLOCK", 7)
    monkeypatch.setattr(file, "_LEAST", 7)
    monkeypatch.setattr(states, "BLOCK", 16)
    base = {"x": draw(dtype, (99,), 0)}
    check(base, {"x": changed(base["x"], 80, 2)}, tmp_path)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_comparing_eight_bytes_at_once(itemsize: int) -> None:
    dtype = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    for size in (0, 1, 7, 8, 9, 63, 64, 65, 500):
        base = draw(dtype, (size,), size)
        for count in {0, min(1, size), min(3, size), size // 2, size}:
            other = changed(base, count, count)
            expected = (bytes_by_entry(base) != bytes_by_entry(other)).any(1).nonzero().view(-1)
            assert torch.equal(differing(base, other), expected), (size, count)
    for at in range(490, 500):  # the last word, and what is behind it
        base = draw(dtype, (499,), 1)
        other = copy(base)
        bytes_by_entry(other)[at:, 0] ^= 1
        assert differing(base, other).tolist() == list(range(at, 499))


def test_positions_of_a_tensor_with_many_entries_are_int64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "WIDE", 300)
    base = model_state()
    tuned = next_state(base, 1, ("a.weight", "c.cube", "e.long"))  # 407, 105 and 301 entries
    before, after = write(tmp_path / "base", base, "file"), write(tmp_path / "tuned", tuned, "file")
    info = make_patch(before, after, tmp_path / "p.safetensors")
    found = load_file(info.path)
    wide = {name for name in info.entries if found[f"{name}.indices"].dtype == torch.int64}
    assert wide == {"a.weight", "e.long"} and found["c.cube.indices"].dtype == torch.int32
    apply_patch(before, info.path)
    assert same(load(before), tuned)


def test_the_file_is_as_it_is_documented(tmp_path: Path) -> None:
    base = model_state()
    tuned = next_state(base, 3, ("f.codes", "g.wide", "a.weight"))
    before, after = write(tmp_path / "base", base, "single"), write(tmp_path / "tuned", tuned, "single")
    info = make_patch(before, after, tmp_path / "p.safetensors", step=9, base_step=7)
    with safe_open(info.path, "pt") as opened:
        metadata = opened.metadata()
        ordered = sorted(opened.keys())
    assert metadata == {
        "format": "pt",
        "patch": "offprincipal-sparse-patch",
        "version": "1",
        "kind": "sparse",
        "step": "9",
        "base_step": "7",
        "base": hash_of(base),
        "result": hash_of(tuned),
        "digest": info.digest,
        "indices_of": "",
        "total": str(info.total),
        "shapes": json.dumps([list(base[n].shape) for n in sorted(info.shapes)], separators=(",", ":")),
    }
    assert ordered == sorted(f"{n}.{what}" for n in info.shapes for what in ("indices", "values"))
    header, data = split(info.path)
    assert header["g.wide.values"]["data_offsets"][0] % 8, "no case of misaligned fp64 values"
    assert signed(header, data) == info.path.read_bytes()  # the documented digest
    assert same(patched(base, load_file(info.path)), tuned)


def test_a_values_patch(tmp_path: Path) -> None:
    base = model_state()
    first = next_state(base, 1)
    second = {name: value.clone() for name, value in first.items()}
    at = differences(base, first)
    bytes_by_entry(second["a.weight"])[at["a.weight"][0][::2], 0] ^= 4  # a part of the positions
    paths = [write(tmp_path / n, s, "single") for n, s in (("base", base), ("first", first), ("second", second))]
    known = make_patch(paths[0], paths[1], tmp_path / "p1.safetensors")
    info = make_patch(
        paths[1], paths[2], tmp_path / "p2.safetensors", step=2, base_step=1, positions=tmp_path / "p1.safetensors"
    )
    assert (info.kind, info.indices_of, info.entries) == ("values", known.digest, known.entries)
    assert set(load_file(info.path)) == {f"{name}.values" for name in known.entries}
    for name, (positions, _) in at.items():
        expected = bytes_by_entry(second[name])[positions].reshape(-1).view(second[name].dtype)
        assert same({"v": load_file(info.path)[f"{name}.values"]}, {"v": expected})
    assert apply_patch(paths[1], info.path).entries == known.count  # its positions lie in the same folder
    assert same(load(paths[1]), second)
    assert apply_patch(paths[0], known.path, info.path).state == info.result
    assert same(load(paths[0]), second)


def test_values_whose_positions_lie_elsewhere(tmp_path: Path) -> None:
    base = model_state()
    first, second = next_state(base, 1), next_state(base, 1)
    second["f.codes"] = changed(base["f.codes"], 12, 99)
    for name, state in (("base", base), ("first", first), ("second", second)):
        write(tmp_path / name, state, "file")
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    base_file, first_file = tmp_path / "base.safetensors", tmp_path / "first.safetensors"
    known = make_patch(base_file, first_file, tmp_path / "here/p1.safetensors")
    with pytest.raises(PatchError, match=r"f\.codes changed at entries that are not among the given positions"):
        make_patch(
            first_file, tmp_path / "second.safetensors", tmp_path / "there/p2.safetensors", step=2, base_step=1,
            positions=known.path,
        )  # fmt: skip
    values = make_patch(base_file, first_file, tmp_path / "there/v.safetensors", positions=known.path)
    with pytest.raises(PatchError, match=rf"holds values alone; the patch with digest {known.digest}"):
        apply_patch(base_file, values.path)
    with PatchFile(values.path) as alone, pytest.raises(PatchError, match="Put it into the same folder"):
        alone.entries("f.codes")
    assert same(load(base_file), base)
    copied = tmp_path / "there/other-name.safetensors"
    copied.write_bytes(known.path.read_bytes())
    apply_patch(base_file, values.path)
    assert same(load(base_file), first)


def test_a_tensor_without_positions_must_not_change(tmp_path: Path) -> None:
    base = model_state()
    for name, state in (("base", base), ("a", next_state(base, 1)), ("b", next_state(base, 1, ("e.long",)))):
        write(tmp_path / name, state, "file")
    known = make_patch(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "p.safetensors")
    with pytest.raises(PatchError, match=r"e\.long changed and .*p\.safetensors has no positions for it"):
        make_patch(
            tmp_path / "base.safetensors", tmp_path / "b.safetensors", tmp_path / "v.safetensors", positions=known.path
        )
    assert not (tmp_path / "v.safetensors").exists()
    raw = known.path.read_bytes()
    known.path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(PatchError, match=r"p\.safetensors is damaged"):
        make_patch(
            tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "v.safetensors", positions=known.path
        )
    anchor = make_anchor(tmp_path / "base.safetensors", tmp_path / "anchor.safetensors")
    with pytest.raises(PatchError, match=r"is a full patch and holds no positions; give a sparse one"):
        make_patch(
            tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "v.safetensors", positions=anchor.path
        )


def test_values_at_the_positions_of_another_model_are_refused(tmp_path: Path) -> None:
    base = model_state()
    for name, state in (("base", base), ("a", next_state(base, 1))):
        write(tmp_path / name, state, "file")
    known = make_patch(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "p.safetensors")
    other = {"a.weight": base["a.weight"].reshape(11, 37)}
    for name, value in (("x", other), ("y", {"a.weight": changed(other["a.weight"], 3, 1)})):
        write(tmp_path / name, value, "file")
    with pytest.raises(PatchError, match=r"has positions for a\.weight \(37, 11\), which .* does not hold"):
        make_patch(
            tmp_path / "x.safetensors", tmp_path / "y.safetensors", tmp_path / "v.safetensors", positions=known.path
        )


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("a.weight"), r"lacks a\.weight, which .* holds; a patch neither adds nor removes"),
        (lambda s: s.update({"new": torch.zeros(3)}), "base.* lacks new, which .*tuned"),
        (lambda s: s.update({"a.weight": s["a.weight"].float()}), r"a\.weight is BF16 \(37, 11\) in .* and F32"),
        (lambda s: s.update({"a.weight": s["a.weight"].T.contiguous()}), r"BF16 \(37, 11\) in .* and BF16 \(11, 37\)"),
    ],
    ids=["missing", "extra", "dtype", "shape"],
)
def test_checkpoints_that_do_not_match(change, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, tuned = model_state(), model_state()
    change(tuned)
    before, after = write(tmp_path / "base", base, "file"), write(tmp_path / "tuned", tuned, "file")
    with pytest.raises(PatchError, match=message):
        make_patch(before, after, tmp_path / "p.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "tuned.safetensors"]


def test_targets_in_the_way_and_wrong_numbers(tmp_path: Path) -> None:
    base = model_state()
    before, after = write(tmp_path / "base", base, "file"), write(tmp_path / "tuned", next_state(base, 1), "file")
    patch = tmp_path / "p.safetensors"
    make_patch(before, after, patch)
    with pytest.raises(PatchError, match="exists; give another name, or overwrite"):
        make_patch(before, after, patch)
    assert make_patch(before, after, patch, step=4, overwrite=True).step == 4
    content = after.read_bytes()
    with pytest.raises(PatchError, match="exists and is no patch; only a patch is overwritten"):
        make_patch(before, after, after, overwrite=True)
    assert after.read_bytes() == content
    with pytest.raises(PatchError, match="holds the positions that the new patch needs"):
        make_patch(before, after, tmp_path / "." / "p.safetensors", positions=patch, overwrite=True)
    with pytest.raises(PatchError, match=r"give a name that ends with \.safetensors"):
        make_patch(before, after, tmp_path / "p.bin")
    with pytest.raises(PatchError, match="there is no folder"):
        make_patch(before, after, tmp_path / "no/p.safetensors")
    for step, base_step in ((0, 0), (1, 1), (1, -1)):
        with pytest.raises(PatchError, match="must come after base_step"):
            make_patch(before, after, tmp_path / "q.safetensors", step=step, base_step=base_step)
    with pytest.raises(PatchError, match="step must not be negative"):
        make_anchor(before, tmp_path / "q.safetensors", step=-1)
    with pytest.raises(CheckpointError, match="does not exist"):
        make_patch(tmp_path / "nothing", after, tmp_path / "q.safetensors")


def test_a_patch_that_was_not_finished_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = model_state()
    before, after = write(tmp_path / "base", base, "file"), write(tmp_path / "tuned", next_state(base, 1), "file")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for make in (lambda out: make_patch(before, after, out), lambda out: make_anchor(before, out)):
        with pytest.raises(PatchError, match="No space left on device"):
            make(tmp_path / "p.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "tuned.safetensors"]
