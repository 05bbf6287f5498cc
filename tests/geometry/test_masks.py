"""Masks against brute force: exact counts, deterministic ties, structures, the magnitude-matched pair."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from offprincipal_peft.geometry import masks
from offprincipal_peft.geometry.masks import (
    BLOCK,
    Mask,
    MaskOptions,
    OverlapReport,
    Structure,
    build_mask,
    expand_units,
    ks_distance,
    principal_score,
    randomized_principal_score,
    unit_means,
)
from offprincipal_peft.geometry.selection import select

STRUCTURES: tuple[Structure, ...] = ("element", "row", "column", "block")


def _weight(d_out: int = 150, d_in: int = 200, dtype: torch.dtype = torch.float32) -> Tensor:
    gauss = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(gauss, full_matrices=False)
    return (0.1 * (U * (1 + torch.arange(len(S))) ** -0.5) @ Vh).to(dtype)


def _brute_force(score: Tensor, count: int, largest: bool) -> Tensor:
    order = torch.sort(score.flatten().double(), stable=True, descending=largest).indices
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(score.shape)


SCORES = {
    "spread": torch.rand(3000),
    "bf16 ties": torch.rand(3000).bfloat16().float(),
    "three values": torch.randint(0, 3, (3000,)).float(),
    "zeros": torch.zeros(50),
    "signed zeros": torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0]),
    "tiny": torch.rand(400) * 1e-42,
    "huge": torch.tensor([3e38, 1.0, torch.inf, 3e38, torch.inf]),
    "one": torch.ones(1),
    "matrix": torch.rand(30, 40),
}


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("name", SCORES)
def test_select_is_a_stable_sort_cut_at_the_count(name: str, largest: bool) -> None:
    score = SCORES[name]
    n = score.numel()
    for count in {0, 1, n // 3, n // 2, n - 1, n}:
        assert torch.equal(select(score, count, largest=largest), _brute_force(score, count, largest))


def test_select_refuses() -> None:
    with pytest.raises(ValueError, match="5 of 4 entries"):
        select(torch.rand(4), 5, largest=True)
    with pytest.raises(ValueError, match="2 negative or NaN"):
        select(torch.tensor([1.0, -1.0, torch.nan]), 1, largest=True)


def test_principal_score_is_the_rank_k_reconstruction() -> None:
    for shape in ((150, 200), (200, 150)):
        weight = _weight(*shape)
        U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        truth = ((U[:, :9] * S[:9]) @ Vh[:9]).abs()
        torch.testing.assert_close(principal_score(weight, 9).double(), truth, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_atoms_against_brute_force(structure: Structure, dtype: torch.dtype) -> None:
    weight = _weight(dtype=dtype)
    options = MaskOptions(
        principal_rank=10, principal_density=0.3, low_density=0.4, random_density=0.25, structure=structure
    )
    principal = unit_means(principal_score(weight, 10), structure)
    low = unit_means(weight.abs(), structure)
    n = low.numel()
    expected = {
        "principal": _brute_force(principal, round(0.3 * n), True),
        "low": _brute_force(low, round(0.4 * n), False),
    }
    expected["safe"] = expected["low"] | ~expected["principal"]
    expected["~principal & low"] = ~expected["principal"] & expected["low"]
    for expression, units in expected.items():
        mask = build_mask(weight, expression, options)
        assert torch.equal(mask.units, units), expression
        assert torch.equal(mask.entries, expand_units(units, (150, 200), structure))
    assert int(build_mask(weight, "random", options).units.sum()) == round(0.25 * n)


def test_structured_means_against_loops() -> None:
    values = torch.rand(150, 200)
    blocks = unit_means(values, "block")
    assert blocks.shape == (3, 4)  # ragged: 150 = 64 + 64 + 22, 200 = 3 * 64 + 8
    for i in range(3):
        for j in range(4):
            part = values[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            torch.testing.assert_close(blocks[i, j], part.mean())
    torch.testing.assert_close(unit_means(values, "row"), values.mean(1))
    torch.testing.assert_close(unit_means(values, "column"), values.mean(0))


def test_a_fraction_of_the_rank() -> None:
    weight = _weight()
    half = build_mask(weight, "principal", MaskOptions(principal_rank=0.1))
    assert torch.equal(half.entries, build_mask(weight, "principal", MaskOptions(principal_rank=15)).entries)


class TestRandom:
    def test_same_seed_same_mask_and_not_the_global_generator(self) -> None:
        weight = _weight()
        torch.manual_seed(1)
        first = build_mask(weight, "random", name="a")
        torch.manual_seed(2)
        assert torch.equal(first.entries, build_mask(weight, "random", name="a").entries)

    def test_layers_seeds_and_places_in_an_expression_differ(self) -> None:
        weight = _weight()
        masks = [
            build_mask(weight, "random", MaskOptions(random_density=0.5), name="a"),
            build_mask(weight, "random", MaskOptions(random_density=0.5), name="b"),
            build_mask(weight, "random", MaskOptions(random_density=0.5, seed=1), name="a"),
            build_mask(weight, "random(principal)", MaskOptions(random_density=0.5), name="a"),
        ]
        for i, one in enumerate(masks):
            for other in masks[:i]:
                overlap = float((one.entries & other.entries).sum()) / one.entries.sum()
                assert 0.48 < overlap < 0.52  # independent draws of a half share a half

    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_random_of_x_has_the_density_of_x(self, structure: Structure) -> None:
        options = MaskOptions(structure=structure)
        weight = _weight()
        x = build_mask(weight, "safe", options)
        assert int(build_mask(weight, "random(safe)", options).units.sum()) == int(x.units.sum())


class TestMatchedPair:
    def _pair(self, weight: Tensor, x: str = "principal") -> tuple[Mask, Mask, Mask]:
        options = MaskOptions(principal_rank=10, principal_density=0.4)
        return tuple(build_mask(weight, e, options) for e in (x, f"matched({x})", f"thinned({x})"))  # type: ignore[return-value]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_one_lies_outside_x_the_other_inside_and_magnitudes_agree(self, dtype: torch.dtype) -> None:
        weight = _weight(dtype=dtype)
        x, matched, thinned = self._pair(weight)
        assert not bool((matched.entries & x.entries).any())
        assert not bool((thinned.entries & ~x.entries).any())
        assert int(matched.entries.sum()) == int(thinned.entries.sum())
        magnitude = weight.abs().float()
        distance = ks_distance(magnitude[matched.entries], magnitude[thinned.entries])
        assert distance <= 0.02  # seen 0.0033
        (report,) = matched.reports
        assert report.ks_distance == distance
        assert report.coverage == int(matched.entries.sum()) / int(x.entries.sum())

    def test_without_matching_the_magnitudes_differ(self) -> None:
        """What the pair is for: x and its complement are told apart by magnitude alone."""
        weight = _weight()
        x, _, _ = self._pair(weight)
        assert ks_distance(weight.abs()[x.entries], weight.abs()[~x.entries]) > 0.2  # seen 0.316

    def test_a_pair_that_covers_too_little_is_refused(self) -> None:
        weight = _weight()
        with pytest.raises(ValueError, match=r"layer \(weight 150 x 200\).*covers \d.*%.*under 20%"):
            build_mask(weight, "matched(~low)", name="layer")

    def test_drawn_at_random_within_a_bin(self) -> None:
        weight = torch.ones(100, 100)  # one bin: any entry will do
        options = MaskOptions(low_density=0.3)
        matched = build_mask(weight, "matched(low)", options)
        assert int(matched.entries.sum()) == 3000
        rows = matched.entries.sum(1)[31:].float()
        assert rows.std() > 2  # seen 4.49: a cut by index would fill rows instead


class TestRefusals:
    @pytest.mark.parametrize(
        ("expression", "options", "words"),
        [
            ("low & ~low", MaskOptions(), r"layer \(weight 150 x 200\).*selects no element"),
            ("low | ~low", MaskOptions(), r"layer \(weight 150 x 200\).*selects every element"),
            ("random", MaskOptions(random_density=1e-6), "selects no element of 30000"),
            ("low", MaskOptions(low_density=1.0), r"low_density must lie in \(0, 1\)"),
            ("low", MaskOptions(principal_density=float("nan")), "principal_density"),
            ("principal", MaskOptions(principal_rank=151), "k = 151, which must lie in 1 to 150"),
            ("principal", MaskOptions(structure="diagonal"), "structure must be"),  # type: ignore[arg-type]
            ("principle", MaskOptions(), "position 1: unknown mask"),
        ],
    )
    def test_options(self, expression: str, options: MaskOptions, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            build_mask(_weight(), expression, options, name="layer")

    def test_weights(self) -> None:
        with pytest.raises(ValueError, match=r"layer: a mask needs a 2-D weight, got shape \(2, 3, 4\)"):
            build_mask(torch.rand(2, 3, 4), "low", name="layer")
        weight = _weight()
        weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"layer .*NaN"):
            build_mask(weight, "low", name="layer")


def test_ks_distance_of_known_samples() -> None:
    assert ks_distance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])) == 0.0
    assert ks_distance(torch.tensor([1.0, 2.0]), torch.tensor([3.0])) == 1.0
    assert ks_distance(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.5, 3.5])) == 0.5
    with pytest.raises(ValueError, match="empty"):
        ks_distance(torch.empty(0), torch.ones(1))


SPECTRA = {
    "power law": (1 + torch.arange(256, dtype=torch.float64)) ** -0.7,
    "two decades": torch.logspace(0, -2, 256, dtype=torch.float64),
    "Gaussian": None,
}


def _of_spectrum(name: str) -> Tensor:
    gauss = torch.randn(256, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(gauss)
    spectrum = SPECTRA[name]
    return (0.1 * (U * (S / S[0] if spectrum is None else spectrum)) @ Vh).float()


class TestRandomizedPrincipal:
    RANDOMIZED = MaskOptions(principal_rank=16, principal_method="randomized")

    # the error of the score and the mask's overlap, both as seen: 3e-4 and 0.9999, 0.009 and 0.993, 0.21 and 0.79
    @pytest.mark.parametrize(
        ("spectrum", "error", "low", "high"),
        [("power law", 1e-3, 0.999, 1.0), ("two decades", 0.02, 0.985, 0.9999), ("Gaussian", 0.3, 0.7, 0.9)],
    )
    def test_as_close_as_the_spectrum_decays(self, spectrum: str, error: float, low: float, high: float) -> None:
        weight = _of_spectrum(spectrum)
        exact, found = principal_score(weight, 16), randomized_principal_score(weight, 16)
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) <= error
        (report,) = build_mask(weight, "principal", self.RANDOMIZED).reports
        assert isinstance(report, OverlapReport)
        assert low <= report.jaccard <= high

    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_the_report_is_the_overlap_of_the_two_masks(self, structure: Structure) -> None:
        weight = _of_spectrum("Gaussian")
        options = MaskOptions(principal_rank=16, principal_density=0.4, structure=structure)
        found = build_mask(weight, "principal", replace(options, principal_method="randomized"))
        exact = build_mask(weight, "principal", options)
        one, other = ({tuple(u) for u in m.units.nonzero().tolist()} for m in (found, exact))
        assert found.reports == [OverlapReport(16, len(one & other) / len(one | other))]
        assert exact.reports == []
        assert len(one) == len(other) == round(0.4 * found.units.numel())

    @pytest.mark.parametrize("shape", [(150, 200), (200, 150)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_exact_at_a_rank_that_the_probes_span(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """2k probes of a matrix of rank k, and as many probes as there are columns."""
        low_rank = (_weight(shape[0], 7) @ _weight(7, shape[1])).to(torch.float32)
        torch.testing.assert_close(
            randomized_principal_score(low_rank, 7), low_rank.abs(), rtol=0, atol=1e-6 * float(low_rank.abs().max())
        )
        weight = _weight(*shape, dtype=dtype)
        all_of_it = randomized_principal_score(weight, 150)
        torch.testing.assert_close(all_of_it, weight.abs().float(), rtol=0, atol=1e-6)

    def test_without_the_comparison_nothing_is_decomposed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = _of_spectrum("power law")
        compared = build_mask(weight, "principal & ~low", self.RANDOMIZED)

        def refuse(*arguments: object, **options: object) -> Tensor:
            raise AssertionError("decomposed")

        monkeypatch.setattr(masks, "principal_score", refuse)
        alone = build_mask(weight, "principal & ~low", replace(self.RANDOMIZED, compare_with_exact=False))
        assert alone.reports == []
        assert torch.equal(alone.entries, compared.entries)
        with pytest.raises(AssertionError, match="decomposed"):  # the patch is where the exact score is computed
            build_mask(weight, "principal & ~low", self.RANDOMIZED)

    def test_the_seed_and_the_layer_decide_and_not_the_global_generator(self) -> None:
        weight = _of_spectrum("Gaussian")
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = build_mask(weight, "principal", self.RANDOMIZED, name="a").entries
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert torch.equal(first, build_mask(weight, "principal", self.RANDOMIZED, name="a").entries)
        assert not torch.equal(first, build_mask(weight, "principal", self.RANDOMIZED, name="b").entries)
        other = replace(self.RANDOMIZED, seed=1)
        assert not torch.equal(first, build_mask(weight, "principal", other, name="a").entries)

    def test_refusals(self) -> None:
        weight = _weight()
        for k in (0, -1, 151):
            with pytest.raises(ValueError, match=f"1 to 150 for a \\(150, 200\\) weight, got {k}"):
                randomized_principal_score(weight, k)
        with pytest.raises(ValueError, match="principal_method must be 'exact' or 'randomized', got 'quick'"):
            build_mask(weight, "principal", MaskOptions(principal_method="quick"))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="k = 151, which must lie in 1 to 150"):
            build_mask(weight, "principal", replace(self.RANDOMIZED, principal_rank=151))
