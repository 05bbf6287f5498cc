"""What apply refuses, each time with the target's folder as it was."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from interop.patches.twins import (
    State,
    changed,
    craft,
    join,
    listing,
    load,
    same,
    split,
    write,
)
from offprincipal_peft.audit import CheckpointError
from offprincipal_peft.interop.sparse_patch import (
    PatchError,
    PatchInfo,
    apply_patch,
    make_anchor,
    make_patch,
    verify_patch,
)

ANOTHER = "another model, another step, or changed files"
Run = tuple[list[State], list[PatchInfo]]


def refused(target: Path, *patches: Path, match: str, kind: type[Exception] = PatchError, **options: Any) -> None:
    before = listing(target)
    with pytest.raises(kind, match=match):
        apply_patch(target, *patches, **options)
    assert listing(target) == before


@pytest.mark.parametrize("layout", ["file", "sharded"])
def test_wrong_states_and_orders(layout: str, run: Run, tmp_path: Path) -> None:
    found, (first, second, third) = run
    target = write(tmp_path / "t", found[0], layout)
    refused(target, second.path, match=r"is not what .*2\.safetensors was made for: its state is .* needs")
    refused(
        target, first.path, third.path, match="goes from step 2 to 3 .* ends at step 1: a patch between them is mis"
    )
    refused(
        target,
        second.path,
        first.path,
        match="goes from step 0 to 1 and does not follow .*which ends at step 2: wrong order",
    )
    refused(target, first.path, first.path, match="does not follow")
    apply_patch(target, first.path)
    refused(target, first.path, match="it is at step 1 already, where they lead")
    refused(target, first.path, second.path, match="it is at step 1 already; give the later patches alone")
    apply_patch(target, second.path)
    assert same(load(target), found[2])


Change = Callable[[State], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("a.weight"), r"changes a\.weight, which .* does not hold"),
        (lambda s: s.pop("e.long"), "was made for a model of 982 entries; .* has 681"),
        (lambda s: s.update({"new": torch.zeros(3)}), "was made for a model of 982 entries; .* has 985"),
        (lambda s: s.update({"a.weight": s["a.weight"].to(torch.float16)}), r"has a\.weight as BF16 .* as F16 "),
        (lambda s: s.update({"a.weight": s["a.weight"].T.contiguous()}), r"BF16 \(37, 11\), .* as BF16 \(11, 37\)"),
        (
            lambda s: s.update({"e.long": s["e.long"].to(torch.float16)}),
            ANOTHER,
        ),
        (lambda s: s.update({"z.long": s.pop("e.long")}), ANOTHER),
        (lambda s: s.update({"e.long": changed(s["e.long"], 1, 5)}), ANOTHER),
    ],
    ids=["lacks", "lacks other", "more", "dtype", "shape", "other dtype", "other name", "one bit"],
)
def test_other_models(change: Change, message: str, run: Run, tmp_path: Path) -> None:
    found, infos = run
    assert infos[0].total == 982
    state = dict(found[0])
    change(state)
    refused(write(tmp_path / "t", state, "sharded"), infos[0].path, match=message)
    if "e.long" in state:
        anchor = make_anchor(tmp_path / "made/1.safetensors", tmp_path / "patches/a.safetensors", step=1)
        if "one bit" not in os.environ["PYTEST_CURRENT_TEST"]:  # which an anchor is there to mend
            refused(tmp_path / "t", anchor.path, match="changes .*which|was made for|lacks tensors")


def test_files_that_are_no_patches(run: Run, tmp_path: Path) -> None:
    found, (first, *_) = run
    target = write(tmp_path / "t", found[0], "sharded")
    raw = first.path.read_bytes()
    bad = tmp_path / "made/bad.safetensors"
    for size in (0, 5, 8, 200, len(raw) - 1, len(raw) // 2):
        bad.write_bytes(raw[:size])
        refused(target, bad, match="bytes; a safetensors file begins|is cut short|header is not JSON")
    bad.write_bytes(raw + b"\0")
    refused(target, bad, match="bytes after its last tensor")
    refused(target, tmp_path / "made/1.safetensors", match="is a safetensors file but no patch")
    refused(target, tmp_path / "nothing.safetensors", match="is no file; give a patch")
    refused(target, tmp_path / "patches", match="is no file; give a patch")
    refused(target, match="give at least one patch")
    bad.write_bytes(b"\x80\x04pickle" + bytes(100))
    refused(target, bad, match="a pickle, which is never opened here")


def no_position(header: dict[str, Any], data: bytearray, name: str, values: list[int]) -> None:
    begin, end = header[f"{name}.indices"]["data_offsets"]
    found = torch.frombuffer(data, dtype=torch.int32)[begin // 4 : end // 4]
    for at, value in enumerate(values):
        found[at] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, d: no_position(h, d, "a.weight", [5, 5]), "positions of a.weight do not ascend"),
        (lambda h, d: no_position(h, d, "a.weight", [5, 4]), "positions of a.weight do not ascend"),
        (lambda h, d: no_position(h, d, "a.weight", [-1]), "positions of a.weight do not ascend"),
        (lambda h, d: no_position(h, d, "c.cube", [0] * 9 + [105]), "do not ascend|reach 105 and the tensor has 105"),
        (lambda h, d: d.__setitem__(-1, d[-1] ^ 1), "should lead to the state .* and leads to"),
        (lambda h, d: h["__metadata__"].update(version="2"), "has version '2' of the patch format; .* reads '1'"),
        (lambda h, d: h["__metadata__"].update(kind="dense"), "its kind is 'dense'; sparse, values or full is known"),
        (lambda h, d: h["__metadata__"].pop("total"), "its metadata lack total"),
        (lambda h, d: h["__metadata__"].update(total="many"), "its total 'many' is no whole number"),
        (lambda h, d: h["__metadata__"].update(step="0"), "it goes from step 0 to 0, which is not later"),
        (lambda h, d: h["__metadata__"].update(base=""), "a sparse patch needs base"),
        (lambda h, d: h["__metadata__"].update(base_step=""), "a sparse patch needs base_step"),
        (lambda h, d: h["__metadata__"].update(indices_of="0" * 32), "a sparse patch has no indices_of"),
        (lambda h, d: h["__metadata__"].update(result="X" * 32), "its result 'X+' is no hash of 32 hex digits"),
        (lambda h, d: h["__metadata__"].update(result="0" * 32), "should lead to the state 0+ and leads to"),
        (lambda h, d: h["__metadata__"].update(base="0" * 32), ANOTHER),
        (lambda h, d: h["__metadata__"].update(shapes="[]"), "its metadata should list the shapes of"),
        (lambda h, d: h["__metadata__"].update(shapes="[1]"), "is damaged, or no patch of this package"),
        (lambda h, d: h["__metadata__"].update(shapes="[" * 100_000), "is damaged, or no patch of this package"),
        (lambda h, d: h["__metadata__"].update(patch="other"), "no patch: its metadata do not say"),
        (lambda h, d: h["c.cube.indices"].update(dtype="U32"), "c.cube.indices should be torch.int32 of shape"),
        (lambda h, d: h["c.cube.values"].update(dtype="U16"), r"has c\.cube as U16 .* as F16"),
        (
            lambda h, d: h.update({"c.cube.valu": h.pop("c.cube.values")}),
            "should list the shapes of|it has no 1-D c.cube.values",
        ),
    ],
)
def test_patches_with_a_right_digest_and_wrong_content(
    change: Callable[[dict[str, Any], bytearray], Any], message: str, run: Run, tmp_path: Path
) -> None:
    found, infos = run
    target = write(tmp_path / "t", found[0], "sharded")
    refused(target, craft(infos[0].path, change), match=message)


def test_a_position_that_is_out_of_range(run: Run, tmp_path: Path) -> None:
    found, infos = run

    def last(header: dict[str, Any], data: bytearray) -> None:
        _, end = header["c.cube.indices"]["data_offsets"]
        torch.frombuffer(data, dtype=torch.int32)[end // 4 - 1] = 105

    refused(
        write(tmp_path / "t", found[0], "file"), craft(infos[0].path, last), match="reach 105 and the tensor has 105"
    )
    with pytest.raises(PatchError, match="reach 105 and the tensor has 105"):
        verify_patch(infos[0].path)


def test_values_that_name_no_positions(run: Run, tmp_path: Path) -> None:
    """Digests are right, and what they lead to is not: a full patch, fewer entries."""
    found, infos = run
    target = write(tmp_path / "t", found[0], "file")
    values = make_patch(
        tmp_path / "made/0.safetensors", tmp_path / "made/1.safetensors", tmp_path / "patches/v.safetensors",
        positions=infos[0].path,
    )  # fmt: skip
    anchor = make_anchor(tmp_path / "made/1.safetensors", tmp_path / "patches/a.safetensors", step=1)
    raw = values.path.read_bytes()
    for wrong, message in (
        (anchor.digest, r"needs the positions of the sparse patch with digest .*a\.safetensors is full"),
        (infos[1].digest, "has 12 values and not the entries of its positions"),
        ("", "a values patch needs indices_of"),
    ):
        values.path.write_bytes(raw)
        if wrong == infos[1].digest:
            infos[1].path.write_bytes(infos[0].path.read_bytes())
            craft(infos[1].path, shorten)
            wrong = split(infos[1].path)[0]["__metadata__"]["digest"]
        craft(values.path, lambda h, d, wrong=wrong: h["__metadata__"].update(indices_of=wrong))
        refused(target, values.path, match=message)
    infos[0].path.write_bytes(flipped(infos[0].path.read_bytes()))  # a damaged copy of the positions
    values.path.write_bytes(raw)
    refused(target, values.path, match="is damaged: its bytes do not have the digest")


def flipped(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


def shorten(header: dict[str, Any], data: bytearray) -> None:
    """Drop f.codes: the last in dtype, and so in the file."""
    kept = {k: v for k, v in header.items() if k not in ("f.codes.indices", "f.codes.values")}
    tensors = {k: v for k, v in kept.items() if k != "__metadata__"}
    raw, place = bytearray(), 0
    for entry in tensors.values():
        begin, end = entry["data_offsets"]
        raw += data[begin:end]
        entry["data_offsets"] = [place, place + end - begin]
        place += end - begin
    names = sorted(key.removesuffix(".values") for key in header if key.endswith(".values"))
    shapes = json.loads(header["__metadata__"]["shapes"])
    shapes.pop(names.index("f.codes"))
    header["__metadata__"]["shapes"] = json.dumps(shapes)
    header.pop("f.codes.indices")
    header.pop("f.codes.values")
    data[:] = raw


def test_outs_in_the_way_and_targets_that_are_not_there(run: Run, tmp_path: Path) -> None:
    found, (first, *_) = run
    folder, single = write(tmp_path / "t", found[0], "sharded"), write(tmp_path / "t", found[0], "file")
    refused(folder, first.path, match="exists; give the name of a new folder", out=tmp_path / "made")
    refused(single, first.path, match="exists; give the name of a new file", out=tmp_path / "made/0.safetensors")
    refused(single, first.path, match=r"a weights file's name ends with \.safetensors", out=tmp_path / "new")
    refused(single, first.path, match="there is no folder", out=tmp_path / "no/new.safetensors")
    second = run[1][1]
    refused(folder, second.path, match="Nothing was changed", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError, match="does not exist"):
        apply_patch(tmp_path / "nothing", first.path)
    with pytest.raises(CheckpointError, match="does not exist"):
        apply_patch(tmp_path / "no/folder", first.path)


def test_a_patch_is_no_target(run: Run, tmp_path: Path) -> None:
    """An anchor that is changed in place would state another content than it holds."""
    _, (first, *_) = run
    anchor = make_anchor(tmp_path / "made/0.safetensors", tmp_path / "patches/a.safetensors")
    refused(anchor.path, first.path, match="is a patch and not a checkpoint to change")
    (tmp_path / "chain").mkdir()
    anchor.path.rename(tmp_path / "chain/anchor-00000000.safetensors")
    refused(tmp_path / "chain", first.path, match="is a patch and not a checkpoint to change")  # order of arguments


def test_crafting_is_what_the_package_reads(run: Run) -> None:
    """The helper of these tests: a crafted patch without a change is the patch."""
    _, infos = run
    raw = infos[0].path.read_bytes()
    assert craft(infos[0].path, lambda h, d: None).read_bytes() == raw
    header, data = split(infos[0].path)
    header["__metadata__"]["total"] = "1"
    infos[0].path.write_bytes(join(header, data))
    with pytest.raises(PatchError, match="do not have the digest"):
        verify_patch(infos[0].path)
    with safe_open(infos[0].path, "pt") as opened:
        assert opened.metadata()["total"] == "1"
