"""The split master over every exponent against an fp64 oracle; stochastic rounding by its mean and by counting."""

import pytest
import torch
from torch import Tensor

from offprincipal_peft.geometry.precision import join_master, round_stochastically, split_master

LOW_BITS = (0, 1, 2, 0x1234, 0x4000, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xC000, 0xFFFE, 0xFFFF)
REPLICAS = 100_000


def _fp32(*bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def _every_exponent() -> Tensor:
    """All 2^16 signs, exponents and upper mantissas, each with the low halves where rounding turns; NaNs too."""
    high = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    return (high + torch.tensor(LOW_BITS)).to(torch.int32).view(torch.float32)


def _neighbours(value: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 values next to ``value``, towards zero and away from it, in fp64; past the largest comes 2^128."""
    toward = value.view(torch.int32) & ~0xFFFF
    away = (toward + 0x10000).view(torch.float32).double()
    away = torch.where(away.isinf(), torch.copysign(torch.tensor(2.0**128, dtype=torch.float64), away), away)
    return toward.view(torch.float32).double(), away


def _nearest(value: Tensor) -> Tensor:  # finite -> fp64
    toward, away = _neighbours(value)
    down = (value.double() - toward).abs() < (away - value.double()).abs()
    return torch.where(down, toward, away)


def _round_half_even(value: Tensor) -> tuple[Tensor, Tensor]:
    """The broken variant: torch's own rounding, and the low half before it is cut to int16."""
    high = value.to(torch.bfloat16)
    return high, value.view(torch.int32).to(torch.int64) - (high.view(torch.int16).to(torch.int64) << 16)


class TestSplitMaster:
    def test_round_trip_over_every_exponent(self) -> None:
        value = _every_exponent()
        high, low = split_master(value)
        assert (high.dtype, low.dtype, high.shape, low.shape) == (
            torch.bfloat16,
            torch.int16,
            value.shape,
            value.shape,
        )
        assert torch.equal(join_master(high, low).view(torch.int32), value.view(torch.int32))

    def test_round_trip_of_random_bits(self) -> None:
        value = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), dtype=torch.int64).to(torch.int32).view(torch.float32)
        assert torch.equal(join_master(*split_master(value)).view(torch.int32), value.view(torch.int32))

    def test_the_weight_is_the_nearest_bf16_ties_away(self) -> None:
        value = _every_exponent()
        value = value[value.isfinite()]
        expected = _nearest(value)
        high = split_master(value)[0].double()
        overflow = expected.abs() == 2.0**128
        assert torch.equal(high[~overflow], expected[~overflow])
        assert torch.equal(high[overflow], expected[overflow] * torch.inf)
        assert torch.equal(high.signbit(), value.signbit())
        assert int(overflow.sum()) == 12  # both signs of the largest upper half, low halves 0x8000 and above
        assert bool(high.abs()[value.abs() >= 2.0**-126].ge(2.0**-126).all())

    def test_differs_from_torch_at_every_second_tie_only(self) -> None:
        value = _every_exponent()
        value = value[value.isfinite()]
        ours, torchs = split_master(value)[0], value.to(torch.bfloat16)
        bits = value.view(torch.int32)
        tie_to_even_is_down = ((bits & 0xFFFF) == 0x8000) & (((bits >> 16) & 1) == 0)
        assert torch.equal(ours.view(torch.int16) != torchs.view(torch.int16), tie_to_even_is_down)
        assert int(tie_to_even_is_down.sum()) == 255 * 2 * 64  # finite exponents, signs, even upper mantissas

    @pytest.mark.parametrize("bits", [0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000, 0x00008000, 0x00018000])
    def test_ties_go_away_and_take_the_lowest_int16(self, bits: int) -> None:
        high, low = split_master(_fp32(bits))
        assert high.view(torch.int16).item() & 0xFFFF == (bits + 0x8000) >> 16
        assert low.item() == -32768

    def test_round_half_even_overflows_int16(self) -> None:
        """Why the tie rule: the low half of torch's rounding is 32768 where a tie rounds down to even."""
        value = _fp32(0x3F808000, 0xBF808000, 0x3F818000, 0x3F800001)
        high, wide = _round_half_even(value)
        assert wide.tolist() == [32768, 32768, -32768, 1]
        broken = join_master(high, wide.to(torch.int16))
        assert (broken == value).tolist() == [False, False, True, True]
        assert (value[0].item(), broken[0].item()) == (
            1 + 2.0**-8,
            1 - 2.0**-9,
        )  # the other side of 1: a bf16 step lost

    @pytest.mark.parametrize(
        ("bits", "high"),
        [
            (0x00000000, 0x0000),
            (0x80000000, 0x8000),
            (0x00000001, 0x0000),  # the smallest subnormals, of either sign, keep their sign in a zero weight
            (0x80000001, 0x8000),
            (0x007FFFFF, 0x0080),  # the largest subnormal rounds to the smallest normal
            (0x7F800000, 0x7F80),
            (0xFF800000, 0xFF80),
            (0x7F7F7FFF, 0x7F7F),  # the last value that still rounds to the largest bf16
            (0x7F7F8000, 0x7F80),
            (0x7F7FFFFF, 0x7F80),
            (0xFF7FFFFF, 0xFF80),
            (0x7FC00000, 0x7FC0),  # the NaNs that arithmetic makes stay NaN
            (0xFFC00000, 0xFFC0),
        ],
    )
    def test_special_values(self, bits: int, high: int) -> None:
        weight, low = split_master(_fp32(bits))
        assert weight.view(torch.int16).item() & 0xFFFF == high
        assert join_master(weight, low).view(torch.int32).item() & 0xFFFFFFFF == bits

    @pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 3, 4)])
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        value = torch.randn(shape)
        high, low = split_master(value)
        assert high.shape == low.shape == shape
        assert torch.equal(join_master(high, low), value)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int32], ids=str)
    def test_other_dtypes_are_refused(self, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=f"float32 value, got {dtype}"):
            split_master(torch.ones(2, dtype=dtype))
        with pytest.raises(TypeError, match=f"float32 value, got {dtype}"):
            round_stochastically(torch.ones(2, dtype=dtype))

    def test_join_refuses_other_dtypes_and_swapped_halves(self) -> None:
        high, low = split_master(torch.randn(3))
        for arguments in [(low, high), (high.float(), low), (high, low.int()), (high.half(), low)]:
            with pytest.raises(TypeError, match="bfloat16 weight and an int16 low half, got"):
                join_master(*arguments)


# beside each: z of the mean of 100,000 replicas with seed 0, as observed
VALUES = {
    "positive": 1.00293,  # -0.98
    "negative": -0.33379,  # 1.20
    "subnormal": 1.2e-40,  # -1.79
    "negative subnormal": -3e-41,  # 1.76
    "below a binade's edge": 1.9985,  # -0.01
    "above a binade's edge": -2.0031,  # 2.67
    "smallest normal": 1.1754943e-38 * (1 - 2**-9),  # -0.75
    "weight": 0.0200123,  # 0.64
}


def _z(rounded: Tensor, value: Tensor) -> float:
    """How many standard errors of unbiased rounding the mean lies from the value."""
    toward, away = _neighbours(value)
    share = (value.double() - toward) / (away - toward)
    deviation = (share * (1 - share)).sqrt() * (away - toward).abs()
    return float((rounded.double().mean() - value.double()) / (deviation / rounded.numel() ** 0.5))


class TestStochasticRounding:
    @pytest.mark.parametrize("name", VALUES)
    def test_unbiased_between_the_two_neighbours(self, name: str) -> None:
        value = torch.tensor(VALUES[name])
        rounded = round_stochastically(value.repeat(REPLICAS), torch.Generator().manual_seed(0))
        assert rounded.dtype == torch.bfloat16
        assert set(rounded.double().unique().tolist()) == {x.item() for x in _neighbours(value)}
        assert abs(_z(rounded, value)) <= 4

    @pytest.mark.parametrize("name", VALUES)
    def test_cutting_and_nearest_rounding_fail_the_same_test(self, name: str) -> None:
        value = torch.tensor(VALUES[name]).repeat(REPLICAS)
        cut = (value.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
        assert abs(_z(cut, value[0])) > 50  # seen 138 and more
        assert abs(_z(value.to(torch.bfloat16), value[0])) > 50  # seen 138 and more

    def test_exactly_as_many_draws_round_away_as_the_low_bits_say(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every 16-bit number drawn once: no bias is left, not even one in 65536."""
        monkeypatch.setattr(torch, "randint", lambda low, high, shape, **_: torch.arange(low, high, dtype=torch.int32))
        for bits in (0x3F800001, 0x3F808000, 0x3FFFFFFF, 0xBF801234, 0x0000ABCD, 0x007FFFFF, 0x80000001):
            value = _fp32(bits).repeat(1 << 16)
            rounded = round_stochastically(value)
            assert int((rounded.float() != _neighbours(value)[0]).sum()) == bits & 0xFFFF

    def test_bf16_values_and_non_finite_ones_stay(self) -> None:
        value = (torch.arange(1 << 16, dtype=torch.int32) << 16).view(torch.float32)
        rounded = round_stochastically(value)
        exact = ~value.isnan()
        assert torch.equal(rounded.view(torch.int16)[exact], value.to(torch.bfloat16).view(torch.int16)[exact])
        assert bool(rounded[~exact].isnan().all())
        odd = round_stochastically(_fp32(0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00001).repeat(1000))
        assert bool(odd.isnan().all())  # any NaN: with noise added to its bits it would be a zero or an infinity

    def test_the_generator_decides_and_the_global_one_is_left_alone(self) -> None:
        value = torch.randn(1000)
        torch.manual_seed(3)
        state = torch.get_rng_state()
        first = round_stochastically(value, torch.Generator().manual_seed(1))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first, round_stochastically(value, torch.Generator().manual_seed(1)))
        assert not torch.equal(first, round_stochastically(value, torch.Generator().manual_seed(2)))
        default = round_stochastically(value)
        torch.manual_seed(3)
        assert torch.equal(default, round_stochastically(value))
