"""Weighted sums of sparse adapters: the sum of the dense updates, on the union of their masks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from grpo import kl_per_step, trainer_for
from helpers import assert_same_base, base_bytes, relative_error
from lifecycle import assert_same_tensors, logits, tiny, train, trainable
from offprincipal_peft.tuners.principal_sparse.model import PrincipalSparseModel
from quantized import quantized
from sparse_models import (
    BLOCKS,
    SOME,
    STORED,
    STRUCTURES,
    deltas,
    masked,
    names,
    packed_values,
    restored_bytes,
    sparse_config,
    sparse_layers,
    train_masked,
)

Parts = list[tuple[str, float]]
MASKS = {"mask": "low", "low_density": 0.3}, {"mask": "principal", "low_density": 0.3}
DENSE = {"mask": "~principal", "principal_density": 0.3}, {"mask": "low & principal", "principal_density": 0.3}


def two(
    first: dict[str, Any] | None = None,
    second: dict[str, Any] | None = None,
    base: Callable[[], Any] = tiny,
    **common: Any,
) -> PeftModel:
    """Trained adapters "default" and "two"; by default with masks that overlap in part."""
    host = get_peft_model(base(), sparse_config(**MASKS[0] | common | (first or {})))
    train_masked(host, 2)
    host.add_adapter("two", sparse_config(**MASKS[1] | common | (second or {})))
    host.set_adapter("two")
    train_masked(host, 2)
    return host


def dense(host: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Updates as they are stored, fp64, by layer, read from the entries that a saved adapter names."""
    found = {}
    for name, layer in sparse_layers(host).items():
        if adapter not in layer.princsparse_delta:
            continue
        delta = layer.delta(adapter)
        values = delta.values().double()
        if delta.precision != "fp32":
            values = values - delta.layout.compress(delta.original()).double()
        update = torch.zeros(layer.stored_shape, dtype=torch.float64)
        update[delta.layout.mask()] = in_matrix_order(delta, values)
        found[name] = update
    assert found
    return found


def in_matrix_order(delta: Any, values: Tensor) -> Tensor:
    """Packed values (count,) as boolean indexing takes them: row by row of the matrix."""
    numbers = torch.arange(delta.layout.shape[0] * delta.layout.shape[1], dtype=torch.float64).view(delta.layout.shape)
    positions = delta.layout.compress(delta.layout.gather(numbers))
    return values[positions.argsort()]


def masks(host: PeftModel, adapter: str) -> dict[str, Tensor]:
    layers = sparse_layers(host).items()
    return {n: layer.delta(adapter).layout.mask() for n, layer in layers if adapter in layer.princsparse_delta}


def worst(host: PeftModel, adapter: str, parts: Parts) -> float:
    """The largest difference from the sum, relative to the largest entry. Masks must be the unions."""
    got, want, union = dense(host, adapter), {}, {}
    for part, weight in parts:
        for name, update in dense(host, part).items():
            want[name] = want.get(name, 0) + weight * update
            union[name] = union.get(name, False) | masks(host, part)[name]
    assert got.keys() == want.keys()
    for name, mask in masks(host, adapter).items():
        assert torch.equal(mask, union[name]), name
    return max(((got[n] - want[n]).abs().max() / want[n].abs().max().clamp_min(1e-12)).item() for n in want)


def add(host: PeftModel, parts: Parts, name: str = "sum", **options: Any) -> None:
    host.add_weighted_adapter([a for a, _ in parts], [w for _, w in parts], name, **options)


PARTS: Parts = [("default", 0.7), ("two", -0.4)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_and_orientation(structure, family, tmp_path):
    sizes = dict(BLOCKS) if structure == "block" else {}
    if family == "gpt2":
        sizes.pop("intermediate", None)

    def base() -> Any:
        return tiny(family, **sizes)

    host = two(base=base, structure=structure)
    before = restored_bytes(host)
    add(host, PARTS)
    assert worst(host, "sum", PARTS) < 1e-6  # seen 9.3e-8
    host.set_adapter("sum")
    want = logits(host)
    host.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "sum")), want)
    host.merge_adapter(["sum"])
    assert torch.equal(logits(host), want)
    host.unmerge_adapter()
    assert_same_base(before, restored_bytes(host))


@pytest.mark.parametrize(("dtype", "precision"), STORED, ids=names)
@pytest.mark.parametrize("packing", ["packed", "dense"])
def test_every_precision_and_packing(packing, dtype, precision, tmp_path):
    def base() -> Any:
        return tiny(dtype=dtype)

    host = two(base=base, precision=precision, packing=packing)
    add(host, PARTS)
    # seen 8.0e-8, 4.3e-7 (of a weight and its update in one fp32 value), 3.5e-2 (bf16 weights)
    bar = {"fp32": 1e-6, "split": 5e-6}.get(precision, 0.2)
    assert worst(host, "sum", PARTS) < bar
    assert {delta.precision for delta in deltas(host, "sum").values()} == {precision}
    host.set_adapter("sum")
    want = logits(host)
    host.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(base(), tmp_path / "sum", is_trainable=True)
    assert torch.equal(logits(loaded), want)
    train(loaded, 1, by=masked(loaded))
    assert_same_base(base_bytes(base()), restored_bytes(host))


@pytest.mark.parametrize("precision", ["bf16", "bf16-stochastic"])
def test_a_sum_in_bf16_weights_is_rounded_to_nearest(precision):
    host = two(base=lambda: tiny(dtype=torch.bfloat16), precision=precision)
    add(host, PARTS)
    with host.disable_adapter():
        original = {name: layer.stored_matrix().double().clone() for name, layer in sparse_layers(host).items()}
    parts = [dense(host, name) for name, _ in PARTS]
    for name, delta in deltas(host, "sum").items():
        wanted = original[name] + sum(w * part[name] for (_, w), part in zip(PARTS, parts, strict=True))
        held = (original[name] + dense(host, "sum")[name])[delta.layout.mask()]
        nearest = wanted[delta.layout.mask()].float().bfloat16().double()
        assert (held != nearest).float().mean() < 0.01  # rounded twice, through fp32; seen 2.4e-3


@pytest.mark.parametrize("packing", ["auto", "dense", "packed"])
def test_masks_of_most_entries(packing):
    host = two(*DENSE, packing=packing)
    add(host, PARTS)
    assert worst(host, "sum", PARTS) < 1e-6
    densities = [report.density for report in host.base_model.mask_reports["sum"].values()]
    assert all(0.7 < density < 0.8 for density in densities)
    kinds = {type(delta.layout).__name__ for delta in deltas(host, "sum").values()}
    assert kinds == {"ElementLayout"} if packing == "packed" else "ElementLayout" not in kinds


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_on_a_quantised_base(kind, tmp_path):
    host = two(base=lambda: quantized(kind))
    before = base_bytes(host)
    add(host, PARTS)
    assert worst(host, "sum", PARTS) < 1e-6
    host.set_adapter("sum")
    want = logits(host.train())
    host.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(quantized(kind), tmp_path / "sum").train()), want)
    host.merge_adapter(["sum"])
    assert relative_error(logits(host), want) < 1e-5  # seen 4.9e-7
    host.unmerge_adapter()
    assert_same_base(before, base_bytes(host))


# -- which layers and how many -----------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "overlap": ({"target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["up_proj", "down_proj"]}),
    "disjoint": ({"target_modules": ["q_proj"]}, {"target_modules": ["down_proj"]}),
    "patterns": ({"target_modules": r".*0.*q_proj"}, {"target_modules": r".*(q|v)_proj"}),
    "other transformer layers": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    ),
    "the first leaves some out": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        {"target_modules": ["v_proj"]},
    ),
}


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reversed"])
@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_differ(case, reverse, tmp_path):
    host = two(*TARGETS[case])
    parts = PARTS[::-1] if reverse else PARTS
    add(host, parts)
    assert worst(host, "sum", parts) < 1e-6
    host.set_adapter("sum")
    want = logits(host)
    host.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path / "sum")), want)


def test_a_mask_of_another_union_is_evaluated_and_not_taken_over():
    """On a layer that one part alone adapts the sum has that part's mask, not the expression that its config names."""
    host = two({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "v_proj"]})
    add(host, PARTS)
    host.add_adapter("fresh", sparse_config(**MASKS[0] | {"mask": host.peft_config["sum"].mask}))
    other = get_peft_model(tiny(), sparse_config(**MASKS[0] | {"mask": host.peft_config["sum"].mask}))
    for name, mask in masks(other, "default").items():
        assert torch.equal(masks(host, "fresh")[name], mask), name


@pytest.mark.parametrize(
    "parts",
    [
        [("default", -2.5)],
        [("two", 0.0)],
        [("default", 1), ("two", 0), ("three", -1)],
        [("default", 1.0), ("default", 2.0)],
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_one_and_three_adapters_and_one_twice(kind, parts):
    host = two()
    host.add_adapter("three", sparse_config(**MASKS[0] | {"mask": "random(low)"}))
    host.set_adapter("three")
    train(host, 1)
    add(host, parts, combination_type=kind)
    assert worst(host, "sum", parts) < 1e-6


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "svd": ((PARTS, {"combination_type": "svd"}), {}, "combination_type='svd'.*union.*combination_type='linear'"),
    "ties": ((PARTS, {"combination_type": "ties"}), {}, "combination_type='ties'"),
    "unknown": (([("nobody", 1.0)], {}), {}, "nobody does not exist; the model has default, two"),
    "infinite": (([("two", float("inf"))], {}), {}, "finite numbers, got inf"),
    "taken": ((PARTS, {"name": "two"}), {}, "'two' exists already"),
    "densities": ((PARTS, {}), {"low_density": 0.2}, "low_density=0.3 and 0.2.*merge_and_unload"),
    "seed": ((PARTS, {}), {"seed": 3}, "seed=0 and 3"),
    "structure": ((PARTS, {}), {"structure": "row"}, "structure='element' and 'row'"),
    "everything": ((PARTS, {}), {"mask": "~low"}, "q_proj: the masks of adapters default, two cover every entry"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(case):
    (parts, options), second, words = REFUSED[case]
    host = two(second=second)
    want, values = logits(host), packed_values(host, "two")
    with pytest.raises(ValueError, match=words):
        add(host, parts, **options)
    assert list(host.peft_config) == ["default", "two"]
    assert all(set(layer.princsparse_delta) == {"default", "two"} for layer in sparse_layers(host).values())
    assert_same_tensors(packed_values(host, "two"), values)
    assert torch.equal(logits(host), want)


@pytest.mark.parametrize(("dtype", "precision"), SOME[1:], ids=names)
def test_precisions_that_differ_are_refused(dtype, precision):
    other = "split" if precision == "fp32" else "fp32"
    host = two({"precision": precision}, {"precision": other}, base=lambda: tiny(dtype=dtype))
    with pytest.raises(ValueError, match=f"precision='{precision}' and '{other}'"):
        add(host, PARTS)


def test_a_failing_injection_leaves_the_model_as_it_was(monkeypatch):
    host, made = two(), []
    want, before = logits(host), restored_bytes(host)
    real = PrincipalSparseModel._create_and_replace

    def failing(self, *args, **kwargs):
        made.append(1)
        if len(made) == 4:
            raise MemoryError("no memory left")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(PrincipalSparseModel, "_create_and_replace", failing)
    with pytest.raises(MemoryError):
        add(host, PARTS)
    monkeypatch.undo()
    assert list(host.peft_config) == ["default", "two"]
    assert all(set(layer.princsparse_delta) == {"default", "two"} for layer in sparse_layers(host).values())
    assert torch.equal(logits(host), want)
    assert_same_base(before, restored_bytes(host))
    add(host, PARTS)


# -- the result in use ------------------------------------------------------------------------------------------------


def test_modules_that_one_adapter_trained_whole_are_copied(tmp_path):
    targets = {"target_modules": ["q_proj", "up_proj"]}
    host = two(targets, targets | {"modules_to_save": ["lm_head"]})
    add(host, PARTS)
    copies = host.base_model.model.lm_head.modules_to_save
    assert torch.equal(copies["sum"].weight, copies["two"].weight)
    host.set_adapter("sum")
    want = logits(host)
    host.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path / "sum")), want)


@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_the_sum_is_frozen_and_becomes_a_policy(dtype, precision, tmp_path):
    host = two(base=lambda: tiny(dtype=dtype), precision=precision)
    host.merge_adapter(["two"])
    with pytest.warns(UserWarning, match="Unmerging"):
        add(host, PARTS)
    assert host.active_adapters == ["two"] and not [n for n in trainable(host) if ".sum." in n]
    values = packed_values(host, "sum")
    train(host, 1, by=masked(host))
    assert_same_tensors(packed_values(host, "sum"), values)
    host.save_pretrained(tmp_path, selected_adapters=["sum"])
    policy = PeftModel.from_pretrained(tiny(dtype=dtype), tmp_path / "sum", is_trainable=True)
    kl = kl_per_step(trainer_for(policy, tmp_path / "run", optimizers=(masked(policy), None)))
    assert kl[0] == 0.0 and kl[1] != 0.0
