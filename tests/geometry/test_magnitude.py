"""Figures from histograms of magnitudes against sorted entries, every permutation, and simulated draws."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from offprincipal_peft.geometry.magnitude import (
    FINITE_KEYS,
    KEYS,
    crossing,
    key_magnitudes,
    lowest_keys,
    magnitude_keys,
    matched_rates,
    quantile_bins,
    random_places_variation,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _histogram(keys: Tensor, length: int) -> Tensor:
    return torch.bincount(keys, minlength=length)


SAMPLES = {
    "spread": torch.randint(0, 900, (3000,)),
    "few values": torch.randint(0, 3, (700,)),
    "one value": torch.full((70,), 5),
    "fewer than bins": torch.tensor([4, 1, 9]),
    "one entry": torch.tensor([7]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_are_the_rounded_magnitudes_in_order(dtype: torch.dtype) -> None:
    weight = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.3, -1e-5, 6e4, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    keys = magnitude_keys(weight)
    assert keys.dtype == torch.int16 and int(keys.min()) == 0 and int(keys.max()) < KEYS
    finite = weight.isfinite()
    assert torch.equal(key_magnitudes()[keys[finite].int()], weight[finite].float().bfloat16().abs().double())
    assert keys[7] == keys[8] == FINITE_KEYS and keys[9] > FINITE_KEYS


def test_every_finite_key_has_its_magnitude_and_they_ascend() -> None:
    sizes = key_magnitudes()
    assert sizes.shape == (FINITE_KEYS,) and bool((sizes.diff() > 0).all()) and bool(sizes.isfinite().all())
    assert torch.equal(magnitude_keys(-sizes).int(), torch.arange(FINITE_KEYS, dtype=torch.int32))


class TestQuantileBins:
    @pytest.mark.parametrize("name", SAMPLES)
    @pytest.mark.parametrize("bins", [1, 2, 64])
    def test_as_the_edges_of_sorted_entries(self, name: str, bins: int) -> None:
        """The rule of the matched masks: edge i is the entry at i * n // bins, reached edges are counted."""
        keys = SAMPLES[name]
        ordered = sorted(keys.tolist())
        edges = [ordered[i * len(ordered) // bins] for i in range(1, bins)]
        found = quantile_bins(_histogram(keys, 1000), bins)
        assert found.tolist() == [sum(edge <= key for edge in edges) for key in range(1000)]

    def test_bins_of_distinct_entries_are_of_one_size(self) -> None:
        bins = quantile_bins(torch.ones(6400, dtype=torch.int64))
        assert torch.bincount(bins).tolist() == [100] * 64


class TestLowestKeys:
    @pytest.mark.parametrize("name", SAMPLES)
    @pytest.mark.parametrize("fraction", [0.01, 0.31, 0.5859, 0.99])
    def test_expectation_over_the_order_of_equal_entries(self, name: str, fraction: float) -> None:
        """Each key's share of the lowest positions of the sorted entries."""
        keys = SAMPLES[name]
        wanted = round(fraction * keys.numel())
        lowest = lowest_keys(_histogram(keys, 1000), fraction)
        taken = _histogram(keys.sort().values[:wanted], 1000)
        assert lowest.entries == wanted
        assert torch.equal(lowest.shares, taken / _histogram(keys, 1000).clamp(min=1).double())

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, math.nan])
    def test_refuses_no_fraction(self, fraction: float) -> None:
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            lowest_keys(torch.ones(4, dtype=torch.int64), fraction)


class TestMatchedRates:
    ENTRIES = torch.tensor([[400, 1000], [900, 300], [0, 50], [70, 0]])

    def _drawn(self, changed: list[list[int]]) -> tuple[float, float]:
        """The pair's rates, averaged over draws of n_b entries from each side of each bin."""
        generator = torch.Generator().manual_seed(0)
        sums = [0.0, 0.0]
        pairs = torch.minimum(self.ENTRIES[:, 0], self.ENTRIES[:, 1]).tolist()
        for _ in range(300):
            for side in (0, 1):
                for n, count, hits in zip(pairs, self.ENTRIES[:, side].tolist(), changed, strict=True):
                    sums[side] += int((torch.randperm(count, generator=generator)[:n] < hits[side]).sum())
        return sums[0] / 300 / sum(pairs), sums[1] / 300 / sum(pairs)

    def test_is_the_mean_over_drawn_pairs(self) -> None:
        changed = [[100, 700], [450, 60], [0, 20], [70, 0]]
        found = matched_rates(self.ENTRIES, torch.tensor(changed), torch.zeros(4, 2))
        assert found is not None
        drawn = self._drawn(changed)
        assert found.rate == pytest.approx(drawn[0], abs=2e-3)  # 2.9e-5 seen
        assert found.other_rate == pytest.approx(drawn[1], abs=2e-3)  # 5.4e-4 seen
        assert found.rate == pytest.approx((400 * 0.25 + 300 * 0.5) / 700, rel=1e-12)
        assert found.coverage == pytest.approx(700 / 1370, rel=1e-12)

    def test_energies_are_means_with_the_same_weights(self) -> None:
        energies = torch.tensor([[4.0, 30.0], [27.0, 6.0], [0.0, 9.0], [1.0, 0.0]], dtype=torch.float64)
        found = matched_rates(self.ENTRIES, torch.zeros(4, 2), energies)
        assert found is not None
        assert found.energy == pytest.approx((400 * 0.01 + 300 * 0.03) / 700, rel=1e-12)
        assert found.other_energy == pytest.approx((400 * 0.03 + 300 * 0.02) / 700, rel=1e-12)

    def test_the_error_is_the_spread_over_independent_changes(self) -> None:
        generator = torch.Generator().manual_seed(1)
        p = torch.tensor([[0.3, 0.5], [0.6, 0.2], [0.1, 0.4], [0.2, 0.7]])
        logs, errors = [], []
        for _ in range(1500):
            changed = torch.binomial(self.ENTRIES.float(), p, generator=generator)
            found = matched_rates(self.ENTRIES, changed, torch.zeros(4, 2))
            assert found is not None and found.error is not None
            logs.append(math.log(found.rate / found.other_rate))
            errors.append(found.error)
        spread = float(torch.tensor(logs, dtype=torch.float64).std())
        assert sum(errors) / len(errors) == pytest.approx(
            spread, rel=0.06
        )  # 3.7 % seen; the spread's own error is 1.8 %

    def test_without_changes_or_partners(self) -> None:
        none = matched_rates(self.ENTRIES, torch.zeros(4, 2), torch.zeros(4, 2))
        assert none is not None and (none.rate, none.other_rate, none.error) == (0.0, 0.0, None)
        everything = matched_rates(self.ENTRIES, self.ENTRIES, torch.zeros(4, 2))
        assert everything is not None and everything.rate == pytest.approx(1) and everything.error == 0.0
        assert matched_rates(torch.tensor([[3, 0], [0, 9]]), torch.zeros(2, 2), torch.zeros(2, 2)) is None


class TestRandomPlaces:
    @pytest.mark.parametrize("shape", [(2, 3), (3, 2), (1, 6), (6, 1)])
    def test_exact_over_every_permutation(self, shape: tuple[int, int]) -> None:
        values = [0.0, 0.0, 1.0, 2.5, 0.1, 7.0]
        squares = []
        for order in itertools.permutations(values):
            sums = torch.tensor(order, dtype=torch.float64).view(shape).sum(dim=1)
            squares.append(float((sums.std(correction=0) / sums.mean()) ** 2))
        expected = math.sqrt(sum(squares) / len(squares))
        found = random_places_variation(sum(values), sum(v * v for v in values), 6, shape[1])
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)

    def test_simulated_rows_and_columns(self) -> None:
        values = torch.randn(40, 25, dtype=torch.float64).square() * (torch.rand(40, 25) < 0.2)
        for dim, taken in ((1, 25), (0, 40)):
            seen = []
            for _ in range(200):
                sums = values.view(-1)[torch.randperm(1000)].view(40, 25).sum(dim=dim)
                seen.append(float((sums.std(correction=0) / sums.mean()) ** 2))
            found = random_places_variation(float(values.sum()), float(values.square().sum()), 1000, taken)
            assert found == pytest.approx(math.sqrt(sum(seen) / 200), rel=0.05)  # 1.0 % and 0.2 % seen

    def test_nothing_to_spread(self) -> None:
        assert random_places_variation(0.0, 0.0, 10, 5) == 0.0
        assert random_places_variation(3.0, 9.0, 1, 1) == 0.0
        assert random_places_variation(10.0, 10.0, 10, 5) == 0.0


def test_crossing_is_where_the_count_is_reached_from_the_top() -> None:
    histogram = torch.tensor([5, 0, 3, 0, 2, 0])
    entries = [4, 4, 2, 2, 2, 0, 0, 0, 0, 0]
    for count in range(1, 11):
        found = crossing(histogram, count)
        assert found.bin == entries[count - 1]
        assert found.above == sum(entry > found.bin for entry in entries)
        assert found.inside == entries.count(found.bin)
