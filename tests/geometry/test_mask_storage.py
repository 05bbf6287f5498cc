"""Masks as bits and as positions, every way a stored mask can be wrong, and the fingerprint of a weight."""

import pytest
import torch
from torch import Tensor

from offprincipal_peft.geometry import mask_storage
from offprincipal_peft.geometry.mask_storage import fingerprint, pack_units, unpack_units

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}


def _units(shape: tuple[int, ...], count: int, seed: int = 0) -> Tensor:
    total = torch.Size(shape).numel()
    units = torch.zeros(total, dtype=torch.bool)
    units[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]] = True
    return units.view(shape)


def _by_hand(units: Tensor) -> list[int]:
    """Bits, written down without any tensor arithmetic."""
    flat = units.flatten().tolist()
    return [sum(1 << i for i, bit in enumerate(flat[start : start + 8]) if bit) for start in range(0, len(flat), 8)]


class TestPacking:
    @pytest.mark.parametrize("shape", [(64,), (1000,), (1001,), (4097,), (37, 29), (64, 64), (1, 333), (9,), (2,)])
    def test_round_trip_in_the_smaller_of_both_forms(self, shape: tuple[int, ...]) -> None:
        total = torch.Size(shape).numel()
        edge = -(-total // 8) // 4  # positions take 4 bytes each
        wanted = {1, edge - 1, edge, edge + 1, total // 64, total // 20, total // 2, total - 1}
        seen = set()
        for count in sorted(c for c in wanted if 0 < c < total):
            units = _units(shape, count)
            packed = pack_units(units)
            bits, positions = -(-total // 8), 4 * count
            assert packed.nbytes == min(bits, positions)
            assert packed.dtype == (torch.int32 if positions < bits else torch.uint8)  # a draw goes to the bits
            expected = units.flatten().nonzero().squeeze(1).tolist() if positions < bits else _by_hand(units)
            assert packed.tolist() == expected
            assert torch.equal(unpack_units(packed, shape), units)
            seen.add(packed.dtype)
        assert seen == ({torch.uint8, torch.int32} if total >= 64 else {torch.uint8})

    @pytest.mark.parametrize("position", [0, 1, 7, 8, 9, 15, 16, 18])
    def test_each_unit_alone_in_the_bits(self, position: int) -> None:
        """19 units: bits even for one unit, since 3 bytes are fewer than 4."""
        units = torch.zeros(19, dtype=torch.bool)
        units[position] = True
        packed = pack_units(units)
        assert packed.tolist() == _by_hand(units)
        assert torch.equal(unpack_units(packed, (19,)), units)
        assert torch.equal(unpack_units(pack_units(~units), (19,)), ~units)

    def test_the_units_may_be_a_view(self) -> None:
        for count in (3, 900):
            units = _units((40, 50), count).T
            assert not units.is_contiguous()
            assert torch.equal(unpack_units(pack_units(units), (50, 40)), units)

    def test_more_units_than_int32_can_name(self) -> None:
        """Refused before a position wraps; the mask is an expanded view, so that it takes no memory."""
        wide = torch.iinfo(torch.int32).max + 2

        class Sparse:
            def reshape(self, _: int) -> "Sparse":
                return self

            def sum(self) -> int:
                return 1

            def numel(self) -> int:
                return wide

        with pytest.raises(ValueError, match=f"{wide} units cannot be named by int32 positions"):
            pack_units(Sparse())  # type: ignore[arg-type]


def _bits(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def _positions(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "one past the end": (_positions(3, 20), r"1 mask positions lie outside 0 to 19 \(first: 20\)"),
    "negative": (_positions(-1, 3, -7), r"2 mask positions lie outside 0 to 19 \(first: -1\)"),
    "extremes": (_positions(-(2**31), 2**31 - 1), r"2 mask positions lie outside 0 to 19 \(first: -2147483648\)"),
    "unsorted": (_positions(1, 5, 4), r"mask positions are not sorted: entry 2 is 4 after 5"),
    "duplicated": (_positions(1, 5, 5, 4), r"mask positions are duplicated: entry 2 is 5 after 5"),
    "duplicated alone": (_positions(1, 5, 5, 6), r"mask positions are duplicated: entry 2 is 5 after 5"),
    "no positions": (_positions(), r"names 0 of 20 units; at least one must be trained and one frozen"),
    "all positions": (_positions(*range(20)), r"names 20 of 20 units; at least one must be trained and one frozen"),
    "too few bytes": (_bits(1, 1), r"a mask of 20 units takes 3 bytes of bits, got 2"),
    "too many bytes": (_bits(1, 1, 1, 0), r"a mask of 20 units takes 3 bytes of bits, got 4"),
    "no bytes": (_bits(), r"a mask of 20 units takes 3 bytes of bits, got 0"),
    "first pad bit": (_bits(1, 1, 0x10), r"the mask has bits set past its 20 units"),
    "last pad bit": (_bits(1, 1, 0x80), r"the mask has bits set past its 20 units"),
    "no bit": (_bits(0, 0, 0), r"names 0 of 20 units"),
    "all bits": (_bits(0xFF, 0xFF, 0x0F), r"names 20 of 20 units"),
    "matrix": (_bits(1, 1, 1).view(1, 3), r"uint8 bits or int32 positions, got torch.uint8 of shape \(1, 3\)"),
    "scalar": (torch.tensor(1, dtype=torch.int32), r"got torch.int32 of shape \(\)"),
    "int64": (torch.tensor([1, 2]), r"uint8 bits or int32 positions, got torch.int64 of shape \(2,\)"),
    "bool": (torch.ones(20, dtype=torch.bool), r"got torch.bool of shape \(20,\)"),
    "float": (torch.ones(3), r"got torch.float32 of shape \(3,\)"),
}


class TestUntrustedMasks:
    @pytest.mark.parametrize("shape", [(20,), (4, 5)])
    @pytest.mark.parametrize("name", BAD)
    def test_refused_with_the_reason(self, name: str, shape: tuple[int, ...]) -> None:
        packed, words = BAD[name]
        with pytest.raises(ValueError, match=words):
            unpack_units(packed, shape)

    def test_just_inside_the_limits(self) -> None:
        assert unpack_units(_positions(0, 19), (4, 5)).flatten().nonzero().flatten().tolist() == [0, 19]
        assert int(unpack_units(_positions(*range(19)), (20,)).sum()) == 19
        assert int(unpack_units(_bits(0xFF, 0xFF, 0x07), (20,)).sum()) == 19
        assert unpack_units(_bits(0, 0, 0x08), (20,)).nonzero().item() == 19

    def test_a_reader_that_trusts_would_train_other_entries(self) -> None:
        """What the guards are for: torch itself takes a negative position without a word."""
        units = torch.zeros(20, dtype=torch.bool)
        units[_positions(-1, 3).to(torch.int64)] = True
        assert units.nonzero().flatten().tolist() == [3, 19]


def _identity(weight: Tensor) -> bytes:
    found = fingerprint(weight)
    assert (found.dtype, found.shape) == (torch.uint8, (16,))
    return bytes(found.tolist())


class TestFingerprint:
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("shape", [(7, 5), (1, 1), (3, 3), (4, 8), (1, 3)])
    def test_every_single_entry_counts(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        weight = torch.randn(shape).to(dtype)
        before = _identity(weight)
        bits = 8 * dtype.itemsize
        for position in range(weight.numel()):
            for bit in (0, bits // 2, bits - 2, bits - 1):  # the last is the sign
                other = weight.clone()
                flipped = 1 << bit if bit < bits - 1 else -(1 << bit)
                other.view(INTEGERS[dtype]).view(-1)[position] ^= flipped
                assert _identity(other) != before, (position, bit)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_swapped_entries_shape_and_dtype(self, dtype: torch.dtype) -> None:
        weight = torch.randn(12, 10).to(dtype)
        flat = [weight.clone().view(-1) for _ in range(40)]
        for i, other in enumerate(flat):  # neighbours in a word and words apart
            j = (i + 1 + 4 * (i % 5)) % weight.numel()
            other[i], other[j] = weight.view(-1)[j], weight.view(-1)[i]
        others = [x.view(12, 10) for x in flat] + [weight.view(10, 12), weight.view(120, 1), weight.T, weight.view(-1)]
        assert len({_identity(x) for x in [weight, *others]}) == 1 + len(others)
        assert _identity(weight.view(INTEGERS[dtype])) != _identity(weight)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_equal_for_equal_bytes_however_they_lie(self, dtype: torch.dtype) -> None:
        weight = torch.randn(9, 7).to(dtype)
        assert _identity(weight) == _identity(weight.clone())
        assert _identity(weight) == _identity(torch.nn.Parameter(weight.clone()))
        assert _identity(weight) == _identity(weight.T.contiguous().T)
        padded = torch.zeros(9, 20, dtype=dtype)
        padded[:, 3:10] = weight
        assert _identity(weight) == _identity(padded[:, 3:10])
        assert not padded[:, 3:10].is_contiguous()

    def test_signed_zeros_and_nans_are_told_apart_by_their_bits(self) -> None:
        zeros = torch.zeros(4, 4)
        assert _identity(zeros) != _identity(-zeros)
        nan = torch.full((3, 3), torch.nan)
        assert _identity(nan) == _identity(nan.clone())

    def test_matrices_of_more_than_one_part(self) -> None:
        """Two megabytes in bf16: single entries on both sides of the first seam, and words that swap across it."""
        weight = torch.randn(1025, 1025).bfloat16()
        seam = 4 * mask_storage._WORDS
        assert weight.numel() > seam
        seen = {_identity(weight)}
        places = [0, 1, seam - 1, seam, seam + 1, weight.numel() - 2, weight.numel() - 1, 777_777]
        for place in places:
            other = weight.clone()
            other.view(torch.int16).view(-1)[place] ^= 1
            seen.add(_identity(other))
        swapped = weight.clone().view(-1)  # words with the same factor in different parts
        swapped[:4], swapped[seam : seam + 4] = weight.view(-1)[seam : seam + 4], weight.view(-1)[:4]
        seen.add(_identity(swapped.view(weight.shape)))
        assert len(seen) == 2 + len(places)

    def test_an_unweighted_sum_would_miss_swapped_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The swap test fails on the broken variant; so does a change of a high bit under even factors."""
        weight = torch.randn(4, 4, dtype=torch.float64)
        monkeypatch.setattr(mask_storage, "_odd_weights", lambda device: torch.ones(2, 16, dtype=torch.int64))
        assert _identity(weight) == _identity(weight.flip(0))
        monkeypatch.setattr(mask_storage, "_odd_weights", lambda device: torch.full((2, 16), 2))
        negated = weight.clone()
        negated[1, 2] *= -1
        assert _identity(weight) == _identity(negated)

    def test_stays_what_it_was(self) -> None:
        """Saved adapters carry it: a change here orphans them all."""
        weight = torch.arange(35, dtype=torch.float32).view(5, 7)
        assert _identity(weight).hex() == "0874a7438a87b43b788e7800ab2f215d"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_a_contiguous_part_of_a_larger_buffer(self, dtype: torch.dtype) -> None:
        buffer = torch.randn(4, 3).to(dtype)
        assert _identity(buffer[1:]) == _identity(buffer[1:].clone())

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_two_changed_signs(self, dtype: torch.dtype) -> None:
        """A negated column or a pair of entries: what a model with the other sign convention has."""
        weight = torch.randn(64, 64).to(dtype)
        others = [weight.clone(), weight.clone()]
        others[0][:, 3] *= -1
        others[1][5, 3::8] *= -1
        assert all(_identity(other) != _identity(weight) for other in others)
