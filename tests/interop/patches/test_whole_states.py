"""Anchors, content hashes, codes that torch has no dtype for, progress."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from interop.patches.twins import (
    DTYPES,
    LAYOUTS,
    bytes_by_entry,
    hash_of,
    model_state,
    next_state,
    same,
    write,
)
from offprincipal_peft.audit import open_checkpoint
from offprincipal_peft.interop.sparse_patch import (
    PatchError,
    apply_patch,
    checkpoint_hash,
    hash_tensor,
    make_anchor,
    make_patch,
    state_hash,
)
from offprincipal_peft.interop.sparse_patch.content import TensorMark


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_anchor_holds_the_state(layout: str, tmp_path: Path) -> None:
    state = model_state()
    info = make_anchor(write(tmp_path / "m", state, layout), tmp_path / "anchor.safetensors", step=3)
    assert same(load_file(info.path), state)
    assert (info.kind, info.step, info.base, info.result) == ("full", 3, None, hash_of(state))
    assert info.entries == {name: value.numel() for name, value in state.items()}


def test_hashes_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    state = model_state()
    for layout in LAYOUTS:
        with open_checkpoint(write(tmp_path / layout, state, layout)) as opened:
            assert checkpoint_hash(opened) == hash_of(state)
    marks = {
        n: TensorMark({v: k for k, v in DTYPES.items()}[t.dtype], tuple(t.shape), hash_tensor(t))
        for n, t in state.items()
    }
    assert state_hash(marks) == hash_of(state)
    view = state["a.weight"].T
    assert hash_tensor(view) == hash_tensor(view.contiguous()) != hash_tensor(state["a.weight"])
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    assert hash_tensor(numbers.conj()) == hash_tensor(torch.tensor([1 - 2j, 3 + 4j]))


def with_codes(path: Path, codes: bytes) -> Path:
    """A file with 4-bit codes, which torch has no dtype for, beside bf16 weights."""
    weight = torch.arange(8, dtype=torch.bfloat16)
    data = bytes(bytes_by_entry(weight).view(-1).tolist())
    header = {
        "codes": {"dtype": "F4", "shape": [2 * len(codes)], "data_offsets": [0, len(codes)]},
        "w": {"dtype": "BF16", "shape": [8], "data_offsets": [len(codes), len(codes) + 16]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + codes + data)
    return path


def test_codes_that_torch_cannot_hold_may_lie_beside_what_changes(tmp_path: Path) -> None:
    before = with_codes(tmp_path / "base.safetensors", b"\x12\x34\x56")
    raw = bytearray(before.read_bytes())
    raw[-1] ^= 1
    after = tmp_path / "tuned.safetensors"
    after.write_bytes(raw)
    info = make_patch(before, after, tmp_path / "p.safetensors")
    assert info.entries == {"w": 1}
    apply_patch(before, info.path)
    assert before.read_bytes() == bytes(raw)
    with pytest.raises(PatchError, match=r"codes changed and is stored as F4, which torch cannot hold"):
        make_patch(with_codes(tmp_path / "other.safetensors", b"\x12\x34\x57"), after, tmp_path / "q.safetensors")
    with pytest.raises(PatchError, match="codes is stored as F4, which torch cannot hold; anchors need it"):
        make_anchor(after, tmp_path / "q.safetensors")


def test_progress_counts_bytes_to_the_end(tmp_path: Path) -> None:
    base = model_state()
    before, after = write(tmp_path / "base", base, "sharded"), write(tmp_path / "tuned", next_state(base, 1), "file")
    size = sum(t.nbytes for t in base.values())
    for total, call in (
        (2 * size, lambda p: make_patch(before, after, tmp_path / "p.safetensors", progress=p)),
        (size, lambda p: make_anchor(before, tmp_path / "a.safetensors", progress=p)),
        (size, lambda p: apply_patch(before, tmp_path / "p.safetensors", progress=p)),
    ):
        seen: list[tuple[int, int]] = []
        call(lambda done, of, seen=seen: seen.append((done, of)))
        assert seen[-1] == (total, total) and [d for d, _ in seen] == sorted({d for d, _ in seen})
