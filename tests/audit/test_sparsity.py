"""The streamed count of changed weights, on one thread and on several."""

import json
import math
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from audit.pairs import draw, model
from offprincipal_peft.audit import CheckpointError, Rename, bf16_sparsity, open_checkpoint, sparsity
from offprincipal_peft.geometry import count_changed


def hard_values(count: int, seed: int) -> Tensor:
    """fp32: small steps around common values, both zeros, subnormals, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, 65504.0, 3.4e38, math.inf, -math.inf, math.nan])
    values = torch.randn(count, generator=torch.Generator().manual_seed(7))
    values *= 1 + 0.004 * torch.randn(count, generator=generator)
    picked = torch.rand(count, generator=generator) < 0.3
    return torch.where(picked, special[torch.randint(len(special), (count,), generator=generator)], values)


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("entries", [sparsity._ENTRIES, 1000])  # one block; several with ragged ends
def test_counts_are_those_of_the_definition(tmp_path, monkeypatch, entries):
    monkeypatch.setattr(sparsity, "_ENTRIES", entries)
    base, tuned = {}, {}
    for dtype in FLOATS:
        for what, clean in (("hard", False), ("finite", True)):
            before, after = hard_values(3007, 1), hard_values(3007, 2)
            if clean:  # zeros of both signs stay: the path of integers
                before, after = (x.nan_to_num(0.5, 0.5, -0.5).clamp(-9, 9) for x in (before, after))
            base[f"{what}.{dtype}"], tuned[f"{what}.{dtype}"] = before.to(dtype), after.to(dtype)
    base["same"] = tuned["same"] = draw(50, 3)
    for side, bits in ((base, (0x7FC0, 0x7FC0, 0x7F80, -128)), (tuned, (0x7FC1, -1, 0x7F80, 0x7F80))):
        side["nan"] = torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16)  # two NaN are one, whatever their bits
    result = bf16_sparsity(model(tmp_path / "base", base), model(tmp_path / "tuned", tuned))
    assert [tensor.name for tensor in result.tensors] == list(open_checkpoint(tmp_path / "base").tensors)
    for tensor in result.tensors:
        before, after = base[tensor.name], tuned[tensor.name]
        assert (tensor.entries, tensor.changed) == (before.numel(), count_changed(before, after)), tensor.name
        assert tensor.nan == (int(before.isnan().sum()), int(after.isnan().sum()))
        assert tensor.inf == (int(before.isinf().sum()), int(after.isinf().sum()))
        assert tensor.sparsity == 1 - tensor.changed / tensor.entries
    assert set(result.nonfinite) == {"nan"} | {f"hard.{dtype}" for dtype in FLOATS}
    assert result.changed == sum(count_changed(base[name], tuned[name]) for name in base)
    assert result.entries == 8 * 3007 + 150 + 4 and result.sparsity == 1 - result.changed / result.entries
    changed = {tensor.name: tensor.changed for tensor in result.tensors}
    assert (changed["same"], changed["nan"]) == (0, 1)


@pytest.mark.parametrize("changed", [0, 1, 65_537, 600_003])
def test_counters_of_16_bits_add_up(changed):
    before, after = torch.zeros(600_003).bfloat16(), torch.zeros(600_003).bfloat16()
    after[:changed] = 1.0
    assert sparsity._count_finite(before, after) == changed


def test_counters_are_filled_and_one_word_more_would_overflow_them(monkeypatch):
    for words, fits in ((sparsity._WORDS, True), (sparsity._WORDS + 1, False)):
        monkeypatch.setattr(sparsity, "_WORDS", words)
        before, after = torch.zeros(4 * words).bfloat16(), torch.ones(4 * words).bfloat16()
        assert (sparsity._count_finite(before, after) == 4 * words) is fits


@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16])
def test_saving_in_a_coarser_dtype_changes_nothing(tmp_path, coarse):
    weight = draw(200, 100, dtype=torch.float32)
    for name, tensor in (("fine", weight), ("coarse", weight.to(coarse))):
        model(tmp_path / name, {"w": tensor})
    result = bf16_sparsity(tmp_path / "fine", str(tmp_path / "coarse"))  # paths are opened and closed
    assert result.changed == 0 and "stored values are compared in" in result.tensors[0].note
    if coarse == torch.float16:  # rounded each for itself, the fp16 file's own rounding crosses bf16's edges
        assert count_changed(weight, weight.half()) > 0.02 * weight.numel()  # observed 0.063


def test_what_was_skipped_and_renamed_is_in_the_result_and_progress_is_told(tmp_path):
    base = model(tmp_path / "base", {"w": draw(6), "gone": draw(2), "none": draw(0)})
    tuned = model(tmp_path / "tuned", {"module.w": draw(6, seed=1), "module.none": draw(0)})
    seen: list[tuple[int, int]] = []
    result = bf16_sparsity(base, tuned, progress=lambda done, total: seen.append((done, total)))
    assert [(skip.name, skip.reason) for skip in result.skipped] == [("gone", "missing in tuned")]
    assert result.rename == Rename(tuned="module.")
    assert seen[-1] == (24, 24)
    counts = {tensor.name: tensor for tensor in result.tensors}
    assert counts["w"].changed == 6 and math.isnan(counts["none"].sparsity)
    assert base.read("w").shape == (6,)  # a checkpoint that was given stays open
    with pytest.raises(CheckpointError, match=re.escape("absent does not exist; give a model's folder")):
        bf16_sparsity(base, tmp_path / "absent")


@pytest.fixture
def many_blocks(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Two checkpoints of many blocks each, in two shards, and two cores to count them on."""
    monkeypatch.setattr(sparsity, "_ENTRIES", 16 * 7)
    monkeypatch.setattr(sparsity, "_cores", lambda: 2)
    for folder, seed in ((tmp_path / "base", 0), (tmp_path / "tuned", 1)):
        folder.mkdir()
        places = {f"w{i}": f"model-{i % 2}.safetensors" for i in range(5)}
        for shard in set(places.values()):
            names = [name for name, place in places.items() if place == shard]
            tensors = {n: draw(40 + int(n[1]), 30, seed=3 * int(n[1]) + seed * (int(n[1]) % 2)) for n in names}
            save_file(tensors, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return tmp_path / "base", tmp_path / "tuned"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_count_what_one_counts(many_blocks, monkeypatch, threads):
    monkeypatch.setattr(sparsity, "_THREADS", threads)
    monkeypatch.setattr(sparsity, "_cores", lambda: 4)
    workers = set()
    add = sparsity._Tally.add
    monkeypatch.setattr(sparsity._Tally, "add", lambda *given: (workers.add(threading.get_ident()), add(*given))[1])
    seen: list[tuple[int, int, int]] = []
    result = bf16_sparsity(*many_blocks, progress=lambda done, total: seen.append((done, total, threading.get_ident())))
    with open_checkpoint(many_blocks[0]) as base, open_checkpoint(many_blocks[1]) as tuned:
        assert [(tensor.name, tensor.changed) for tensor in result.tensors] == [
            (name, count_changed(base.read(name), tuned.read(name))) for name in base.tensors
        ]
    assert 1 <= len(workers) <= threads and threading.get_ident() in workers
    assert {thread for *_, thread in seen} == {threading.get_ident()}
    assert [done for done, *_ in seen] == sorted({done for done, *_ in seen}) and seen[-1][0] == seen[-1][1]


def test_a_thread_that_fails_ends_the_count(many_blocks, monkeypatch):
    main = threading.get_ident()
    add, counted = sparsity._Tally.add, []

    def failing(self, block):
        if threading.get_ident() != main:
            raise CheckpointError("became shorter")
        counted.append(block.start)
        time.sleep(0.01)
        add(self, block)

    monkeypatch.setattr(sparsity._Tally, "add", failing)
    with pytest.raises(CheckpointError, match="became shorter"):
        bf16_sparsity(*many_blocks)
    assert len(counted) < 15  # of about 33: the others stop early; seen: 1
