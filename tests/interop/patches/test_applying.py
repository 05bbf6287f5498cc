"""What apply writes, what it leaves as it is, and where."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from interop.patches.twins import (
    LAYOUTS,
    State,
    changed,
    hash_of,
    listing,
    load,
    next_state,
    same,
    split,
    write,
)
from offprincipal_peft.interop.sparse_patch import (
    PatchInfo,
    apply_patch,
    file,
    make_anchor,
    make_patch,
    states,
)

Run = tuple[list[State], list[PatchInfo]]


# -- what is written --------------------------------------------------------------------------------------------------


def test_headers_and_metadata_stay_to_the_byte(run: Run, tmp_path: Path) -> None:
    found, infos = run
    target = write(tmp_path / "t", found[0], "file")
    header, data = split(target)
    header["__metadata__"]["notes"] = "ü 你"
    text = json.dumps(header, indent=1, ensure_ascii=False).encode() + b"   "  # not as this package would write it
    target.write_bytes(len(text).to_bytes(8, "little") + text + data)
    os.chmod(target, 0o640)
    apply_patch(target, infos[0].path)
    raw = target.read_bytes()
    assert raw[: 8 + len(text)] == len(text).to_bytes(8, "little") + text
    assert same(load(target), found[1]) and target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_patches_are_one_after_the_other(layout: str, run: Run, tmp_path: Path) -> None:
    found, infos = run
    target = write(tmp_path / "t", found[0], layout)
    done = apply_patch(target, *(info.path for info in infos))
    assert same(load(target), found[3])
    assert (done.path, done.step, done.state) == (target, 3, hash_of(found[3]))
    assert done.entries == sum(info.count for info in infos)


def test_shards_that_do_not_change_are_not_written(run: Run, tmp_path: Path) -> None:
    found, _ = run
    later = next_state(found[0], 7, ("a.weight",))  # in the first shard
    target = write(tmp_path / "t", found[0], "sharded")
    patch = make_patch(target, write(tmp_path / "later", later, "single"), tmp_path / "p.safetensors")
    before = {p.name: p.stat().st_ino for p in target.iterdir()}
    assert apply_patch(target, patch.path).files == 1
    after = {p.name: p.stat().st_ino for p in target.iterdir()}
    fresh = f"model-00001-of-00003.{patch.result[:8]}.safetensors"
    assert set(after) == (set(before) - {"model-00001-of-00003.safetensors"}) | {fresh}
    kept = set(before) & set(after) - {"model.safetensors.index.json"}
    assert all(after[name] == before[name] for name in kept) and same(load(target), later)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["kept"] == "as it is" and list(index["weight_map"]) == list(found[0])


def test_names_of_shards_do_not_grow(run: Run, tmp_path: Path) -> None:
    found, infos = run
    target = write(tmp_path / "t", found[0], "sharded")
    for info in infos:
        apply_patch(target, info.path)
    names = [p.name for p in target.glob("*.safetensors")]
    assert all(name.count(".") <= 2 for name in names) and len(names) == 3 and same(load(target), found[3])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_leaves_the_target(layout: str, run: Run, tmp_path: Path) -> None:
    found, infos = run
    (tmp_path / "here").mkdir()
    target = write(tmp_path / "here/t", found[0], layout)
    if layout != "file":
        (target / "tokenizer.json").write_text("{}")
        (target / "consolidated.safetensors").write_bytes(b"the state before, in another form")
        (target / "pytorch_model.bin").write_bytes(b"likewise")
        (target / ".hidden").write_bytes(b"left over")
    before = listing(target)
    out = tmp_path / "made" / ("new.safetensors" if layout == "file" else "new")
    done = apply_patch(target, infos[0].path, infos[1].path, out=out)
    assert listing(target) == before and done.path == out and done.state == hash_of(found[2])
    assert same(load(out), found[2])
    if layout != "file":
        beside = {p.name for p in out.iterdir()} - {p.name for p in out.glob("model*")}
        assert beside == {"config.json", "tokenizer.json"}
        assert {p.name for p in out.glob("model*")} == {p.name for p in target.glob("model*")}
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".")]


def test_a_copy_from_an_index(run: Run, tmp_path: Path) -> None:
    found, infos = run
    target = write(tmp_path / "t", found[0], "sharded")
    apply_patch(target / "model.safetensors.index.json", infos[0].path, out=tmp_path / "out")
    assert same(load(tmp_path / "out"), found[1]) and same(load(target), found[0])
    apply_patch(target / "model.safetensors.index.json", infos[0].path)
    assert same(load(target), found[1])


def test_a_full_patch_stands_for_any_state_before_it(run: Run, tmp_path: Path) -> None:
    found, infos = run
    anchor = make_anchor(tmp_path / "made/2.safetensors", tmp_path / "patches/a.safetensors", step=2)
    target = write(tmp_path / "t", next_state(found[0], 77), "sharded")
    apply_patch(target, anchor.path, infos[2].path)
    assert same(load(target), found[3])
    apply_patch(target, infos[0].path, infos[1].path, anchor.path)  # what lies before it is not needed
    assert same(load(target), found[2])


def test_a_symlink_is_replaced_and_what_it_names_stays(run: Run, tmp_path: Path) -> None:
    """As Hugging Face's cache lays folders out: blobs that several snapshots share."""
    found, infos = run
    blob = write(tmp_path / "blob", found[0], "file")
    content = blob.read_bytes()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model.safetensors").symlink_to(blob)
    apply_patch(tmp_path / "snapshot", infos[0].path)
    assert blob.read_bytes() == content and same(load(tmp_path / "snapshot"), found[1])


def test_an_index_in_a_folder_with_subfolders_and_odd_names(run: Run, tmp_path: Path) -> None:
    """Shards of the same name in two folders, a name that ends like this package's, and one that is taken."""
    found, _ = run
    target = tmp_path / "t"
    later = {name: changed(value, 1, 3) if value.numel() else value for name, value in found[0].items()}
    taken = f"x.{hash_of(later)[:8]}.safetensors"
    places = ["one/x.safetensors", "two/x.safetensors", "x.0badcafe.safetensors", "./y.safetensors", "x.safetensors"]
    for folder in (target / "one", target / "two"):
        folder.mkdir(parents=True)
    (target / taken).write_bytes(b"someone else's")
    weight_map = {name: places[i % len(places)] for i, name in enumerate(found[0])}
    for place in places:
        save_file({n: found[0][n] for n, p in weight_map.items() if p == place}, target / place)
    index = target / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    patch = make_patch(target, write(tmp_path / "later", later, "file"), tmp_path / "p.safetensors")
    assert apply_patch(target, patch.path, out=tmp_path / "copy").files == 5
    assert same(load(tmp_path / "copy"), later) and (tmp_path / "copy/one/x.safetensors").is_file()
    assert apply_patch(target, patch.path).files == 4  # one shard holds an empty tensor alone
    assert same(load(target), later) and (target / taken).read_bytes() == b"someone else's"
    assert len(list(target.rglob("*.safetensors"))) == 6 and len(set(json.loads(index.read_text())["weight_map"])) == 7


def test_the_index_that_is_read_is_the_one_that_is_written(run: Run, tmp_path: Path) -> None:
    found, infos = run
    for layout in ("single", "sharded"):
        target = write(tmp_path / layout, found[0], layout)
        other = target / "a-first.safetensors.index.json"
        other.write_text('{"weight_map": {"x": "a-1.safetensors", "y": "a-2.safetensors"}}')
        apply_patch(target, infos[0].path)
        assert same(load(target), found[1])
        assert other.read_text() == '{"weight_map": {"x": "a-1.safetensors", "y": "a-2.safetensors"}}'


def test_an_index_of_one_file(run: Run, tmp_path: Path) -> None:
    found, infos = run
    target = write(tmp_path / "t", found[0], "single")
    index = target / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(found[0], "model.safetensors")}))
    before = set(listing(target))
    apply_patch(target, infos[0].path)
    assert set(listing(target)) == before and same(load(target), found[1])


def test_a_patch_that_changes_nothing(run: Run, tmp_path: Path) -> None:
    """The new shards would have the old ones' names."""
    found, infos = run
    target = write(tmp_path / "t", found[0], "sharded")
    apply_patch(target, infos[0].path)
    names = sorted(listing(target))
    idle = make_patch(
        target, target, tmp_path / "patches/idle.safetensors", step=2, base_step=1, positions=infos[0].path
    )
    assert idle.kind == "values" and idle.base == idle.result and idle.count == infos[0].count
    for _ in range(2):
        apply_patch(target, idle.path)
        assert same(load(target), found[1]) and len(listing(target)) == len(names)
    empty = make_patch(target, target, tmp_path / "empty.safetensors")
    assert empty.count == 0 and apply_patch(target, empty.path).files == 0
    assert same(load(target), found[1])


def test_more_patches_than_a_process_may_have_files_open(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "BLOCK", 64)
    monkeypatch.setattr(file, "_LEAST", 7)
    monkeypatch.setattr(states, "BLOCK", 64)
    state = {"x": torch.arange(200, dtype=torch.int64)}
    paths = [write(tmp_path / "made" / "n0", state, "file")]
    target, patches = write(tmp_path / "t", state, "file"), []
    for step in range(1, 101):
        state = {"x": changed(state["x"], 20, step)}
        paths.append(write(tmp_path / "made" / f"n{step}", state, "file"))
        out = tmp_path / f"patches/n{step}.safetensors"
        patches.append(make_patch(paths[-2], paths[-1], out, step=step, base_step=step - 1).path)
    used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, hard))
    try:
        apply_patch(target, *patches)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert same(load(target), state)
