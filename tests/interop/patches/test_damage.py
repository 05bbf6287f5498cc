"""One flipped byte anywhere in a patch of any kind is found before anything is written."""

import random
from pathlib import Path

import pytest

from interop.patches.twins import State, bytes_by_entry, copy, differences, listing, load, model_state, next_state, same
from interop.patches.twins import write as save
from offprincipal_peft import cli
from offprincipal_peft.audit import CheckpointError
from offprincipal_peft.interop.sparse_patch import (
    PatchChain,
    PatchError,
    apply_patch,
    make_anchor,
    make_patch,
    verify_patch,
)

KINDS = ("sparse", "values", "full", "positions")
FLIPS = 50  # of each kind: 200 in all


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path], State, State]:
    """A folder of one state, a patch of each kind that leads from it to the next, and both states."""
    root = tmp_path_factory.mktemp("damage")
    base = model_state()
    tuned = next_state(base, 1)
    later = {name: copy(value) for name, value in tuned.items()}
    positions, _ = differences(base, tuned)["f.codes"]
    bytes_by_entry(later["f.codes"])[positions] ^= 8
    paths = [save(root / name, s, "file") for name, s in (("base", base), ("tuned", tuned), ("later", later))]
    patches = {}
    for kind in KINDS:
        (root / kind).mkdir()
        patches[kind] = root / kind / "patch-00000001.safetensors"
    sparse = make_patch(paths[0], paths[1], patches["sparse"])
    make_anchor(paths[1], patches["full"], step=1)
    (root / "values/positions.safetensors").write_bytes(sparse.path.read_bytes())
    make_patch(paths[0], paths[1], patches["values"], positions=sparse.path)
    patches["positions"].write_bytes(patches["values"].read_bytes())  # here the file beside it is damaged
    (root / "positions/positions.safetensors").write_bytes(sparse.path.read_bytes())
    target = save(root / "target", base, "sharded")
    return target, patches, base, tuned


def flip(raw: bytes, draw: random.Random) -> tuple[bytes, int]:
    at = draw.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ draw.randrange(1, 256)]) + raw[at + 1 :], at


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_refused(kind: str, made: tuple[Path, dict[str, Path], State, State]) -> None:
    target, patches, _, _ = made
    patch = patches[kind]
    damaged = patch.with_name("positions.safetensors") if kind == "positions" else patch
    raw, before, draw = damaged.read_bytes(), listing(target), random.Random(kind)
    places = set()
    try:
        for _ in range(FLIPS):
            content, at = flip(raw, draw)
            places.add(at)
            damaged.write_bytes(content)
            with pytest.raises((PatchError, CheckpointError)):
                apply_patch(target, patch)
            with pytest.raises((PatchError, CheckpointError)):
                verify_patch(patch)
    finally:
        damaged.write_bytes(raw)
    assert listing(target) == before and len(places) > FLIPS // 2
    assert verify_patch(patch).step == 1


def test_every_byte_of_a_header_and_of_the_data(made: tuple[Path, dict[str, Path], State, State]) -> None:
    """Each byte once: no place in the file is left out of the digest."""
    patch = made[1]["values"]
    raw, draw = patch.read_bytes(), random.Random(0)
    try:
        for at in range(len(raw)):
            patch.write_bytes(raw[:at] + bytes([raw[at] ^ draw.randrange(1, 256)]) + raw[at + 1 :])
            with pytest.raises((PatchError, CheckpointError)):
                verify_patch(patch)
    finally:
        patch.write_bytes(raw)


def test_on_the_command_line(
    made: tuple[Path, dict[str, Path], State, State], capsys: pytest.CaptureFixture[str]
) -> None:
    target, patches, _, _ = made
    raw, before, draw = patches["sparse"].read_bytes(), listing(target), random.Random("cli")
    try:
        for _ in range(4):
            patches["sparse"].write_bytes(flip(raw, draw)[0])
            for words in (("apply", target, patches["sparse"]), ("verify", patches["sparse"])):
                assert cli.main(["patch", *map(str, words)]) == cli.MISTAKE
                assert capsys.readouterr().err.startswith(f"error: {patches['sparse']}")
    finally:
        patches["sparse"].write_bytes(raw)
    assert listing(target) == before


def test_a_damaged_patch_in_the_middle_of_a_chain(made: tuple[Path, dict[str, Path], State, State]) -> None:
    """What would be skipped as another file, or as not needed, is told too."""
    _, patches, _, _ = made
    chain = PatchChain.read(patches["sparse"].parent)
    raw = patches["sparse"].read_bytes()
    try:
        patches["sparse"].write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        with pytest.raises(PatchError, match="is damaged"):
            chain.verify()
    finally:
        patches["sparse"].write_bytes(raw)


def test_the_undamaged_ones_apply(made: tuple[Path, dict[str, Path], State, State], tmp_path: Path) -> None:
    _, patches, base, tuned = made
    for kind, patch in patches.items():
        target = save(tmp_path / kind, base, "sharded")
        apply_patch(target, patch)
        assert same(load(target), tuned)
