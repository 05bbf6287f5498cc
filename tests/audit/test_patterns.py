"""Agreement of several tuned checkpoints from one bit each, against the dense masks' consensus."""

import itertools

import pytest
import torch
from torch import Tensor

from offprincipal_peft.audit import patterns as patterns_module
from offprincipal_peft.audit import tiles as tiles_module
from offprincipal_peft.audit.patterns import MOST, Patterns
from offprincipal_peft.geometry import consensus

SHAPES = ((23, 31), (1, 40), (40, 1), (700,), (5, 6, 7))


def masks(count: int, shape: tuple[int, ...], density: float = 0.4) -> list[Tensor]:
    """Masks that agree more than chance, of different densities."""
    shared = torch.rand(shape)
    return [(shared + torch.rand(shape)) / 2 < density * (0.7 + 0.6 * i / count) for i in range(count)]


def filled(found: list[Tensor], block: int = 100) -> Patterns:
    patterns = Patterns(found[0].shape, len(found))
    for index, mask in enumerate(found):
        for start in range(0, mask.numel(), block):
            patterns.mark(index, start, mask.view(-1)[start : start + block].float())
    return patterns


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 8, 9, 15, 16, 17, MOST])
def test_equals_the_consensus_of_the_masks_exactly(count: int, shape: tuple[int, ...]) -> None:
    found = masks(count, shape)
    expected, agreement = consensus(found), filled(found).agreement()
    assert agreement is not None
    assert agreement.pairs == [tuple(each) for each in expected.pairs]
    assert (agreement.jaccard, agreement.baseline) == (expected.jaccard, expected.baseline)
    assert agreement.frequencies == list(expected.frequencies)
    assert agreement.expected == list(expected.baseline_frequencies)
    assert agreement.jaccard > agreement.baseline
    assert (agreement.map is None) == (len(shape) != 2)


@pytest.mark.parametrize("count", [2, 8, 15, MOST])
@pytest.mark.parametrize("entries", [16, 100, 1 << 18])
def test_both_routes_and_any_chunk_agree(count: int, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = masks(count, (23, 31))
    whole = filled(found).agreement()
    monkeypatch.setattr(patterns_module, "ENTRIES", entries)
    monkeypatch.setattr(tiles_module, "ENTRIES", entries)
    for most in (0, 16):
        monkeypatch.setattr(patterns_module, "_HISTOGRAM", most)
        other = filled(found).agreement()
        assert whole is not None and other is not None and whole.map is not None and other.map is not None
        assert torch.equal(whole.map.density, other.map.density)
        assert (whole.pairs, whole.frequencies, whole.expected) == (other.pairs, other.frequencies, other.expected)


@pytest.mark.parametrize(("count", "size"), [(2, 1), (8, 1), (9, 2), (15, 2), (16, 4), (MOST, 4)])
def test_bytes_of_an_entry(count: int, size: int) -> None:
    assert Patterns((3, 5), count).codes.nbytes == 15 * size


def test_the_map_is_of_what_every_checkpoint_changed() -> None:
    found = masks(3, (23, 31), density=0.8)
    heads = ([0, 23], [0, 10, 31])
    agreement = filled(found).agreement(heads, map_cells=4)
    everyone = consensus(found).intersection
    assert bool(everyone.any()) and agreement is not None and agreement.map is not None
    assert (agreement.map.row_heads, agreement.map.column_heads) == heads
    assert agreement.map.density.shape == (4, 4)
    for i, j in itertools.product(range(4), range(4)):
        cell = everyone[i * 23 // 4 : (i + 1) * 23 // 4, j * 31 // 4 : (j + 1) * 31 // 4]
        assert int(agreement.map.density[i, j]) == round(255 * int(cell.sum()) / cell.numel())


def test_a_pair_that_changed_nothing_is_left_out() -> None:
    found = masks(2, (10, 10))
    none = torch.zeros(10, 10, dtype=torch.bool)
    agreement = filled([none, found[0], none, found[1]]).agreement()
    assert agreement is not None
    assert [pair[:2] for pair in agreement.pairs] == [(0, 1), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert [pair[2:] for pair in agreement.pairs if pair[:2] != (1, 3)] == [(0.0, 0.0)] * 4
    assert agreement.pairs[3][2:] == tuple(consensus(found).pairs[0])[2:]
    assert sum(agreement.frequencies) == 100 and len(agreement.frequencies) == len(agreement.expected) == 5
    assert filled([none, none]).agreement() is None


def test_marking_twice_changes_nothing() -> None:
    found = masks(3, (10, 10))
    patterns = filled(found)
    codes = patterns.codes.clone()
    patterns.mark(1, 0, found[1].float())
    assert torch.equal(patterns.codes, codes)


def test_an_empty_weight_has_no_agreement() -> None:
    assert Patterns((0, 4), 2).agreement() is None


def test_refuses_counts_that_have_no_bits() -> None:
    for count in (0, 1, MOST + 1):
        with pytest.raises(ValueError, match=f"2 to 30 tuned checkpoints, got {count}"):
            Patterns((2, 2), count)
