"""Several masked adapters on one base weight, of which one is written at a time."""

import pytest
import torch
from peft import PeftModel

from helpers import assert_same_base, base_bytes
from lifecycle import FAMILIES, IDS, OTHER_IDS, assert_same_tensors, gradients, logits, tiny, train, trainable
from offprincipal_peft.geometry.masks import build_mask
from sparse_models import (
    SOME,
    STORED,
    MaskRecomputedError,
    adapted,
    deltas,
    masked,
    names,
    no_new_mask,
    packed_values,
    pristine_weights,
    restored_bytes,
    sparse_config,
    sparse_layers,
    train_masked,
    trained,
)

OTHERS = {
    "mask": {"mask": "low & principal", "low_density": 0.4},
    "rank": {"principal_rank": 2},
    "structure": {"structure": "row"},
    "seed": {"mask": "random", "random_density": 0.2, "seed": 3},
}


def two(family: str = "llama", dtype=torch.float32, precision: str = "fp32", **second) -> PeftModel:
    """Two trained adapters, "default" and "second"; the second one is active."""
    host = trained(family, dtype, precision=precision)
    host.add_adapter("second", sparse_config(precision=precision, **second))
    host.set_adapter("second")
    train_masked(host, 2, lr=2e-2)
    return host


# -- the mask of a second adapter -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "precision"), STORED, ids=names)
def test_an_equal_config_shares_the_mask_and_starts_at_zero(family, dtype, precision):
    host = trained(family, dtype, precision=precision)
    logits(host)  # written
    with no_new_mask():
        host.add_adapter("second", sparse_config(precision=precision))
    for name, delta in deltas(host, "second").items():
        first = deltas(host)[name]
        assert delta.layout is first.layout and torch.equal(delta.entries(), first.entries())
        assert not sparse_layers(host)[name].get_delta_weight("second").any()
        assert sparse_layers(host)[name].get_delta_weight("default").any()
    host.set_adapter("second")
    assert torch.equal(logits(host), logits(tiny(family, dtype)))


@pytest.mark.parametrize("option", ["principal_density", "principal_rank", "structure", "seed", "mask"])
def test_another_config_evaluates_its_own_mask(option):
    other = {"principal_density": 0.5, "principal_rank": 5, "structure": "row", "seed": 1, "mask": "low"}[option]
    host = adapted()
    with no_new_mask(), pytest.raises((MaskRecomputedError, AssertionError), match="was called"):
        host.add_adapter("second", sparse_config(**{option: other}))


@pytest.mark.parametrize("state", ["written", "disabled"])
@pytest.mark.parametrize(
    ("family", "dtype", "precision", "other"),
    [
        ("llama", *STORED[0], "mask"),
        ("gpt2", *STORED[2], "rank"),
        ("gpt2", *STORED[0], "structure"),
        ("llama", *STORED[2], "seed"),
        ("llama", *STORED[3], "rank"),
    ],
    ids=names,
)
def test_a_second_mask_comes_from_the_original_weights(family, dtype, precision, other, state):
    host = trained(family, dtype, precision=precision, steps=8)
    before, weights = base_bytes(tiny(family, dtype)), pristine_weights(tiny(family, dtype), host)
    logits(host)
    config = sparse_config(precision=precision, **OTHERS[other])
    if state == "disabled":
        with host.disable_adapter():
            host.add_adapter("second", config)
    else:
        host.add_adapter("second", config)
    for name, delta in deltas(host, "second").items():
        W0 = weights[name].T if family == "gpt2" else weights[name]
        want = build_mask(W0, config.mask, config.mask_options(), name=name).entries
        assert torch.equal(delta.layout.mask(), want.T if family == "gpt2" else want), name
    host.set_adapter("second")
    assert torch.equal(logits(host), logits(tiny(family, dtype)))
    assert_same_base(before, restored_bytes(host))


@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_adding_an_adapter_while_another_is_merged(dtype, precision):
    """One that shares the mask unmerges, as adding any adapter does in PEFT; a new mask needs the original weight."""
    host = trained(dtype=dtype, precision=precision)
    want = logits(host)
    host.merge_adapter()
    merged = base_bytes(host)
    with pytest.raises(ValueError, match=r"q_proj: adapter 'default' is merged; unmerge it first"):
        host.add_adapter("second", sparse_config(precision=precision, mask="low"))
    assert_same_base(merged, base_bytes(host))
    assert list(host.peft_config) == ["default"] and torch.equal(logits(host), want)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        host.add_adapter("second", sparse_config(precision=precision))
    assert not any(layer.merged for layer in sparse_layers(host).values())
    assert torch.equal(logits(host), want)
    assert_same_base(base_bytes(tiny(dtype=dtype)), restored_bytes(host))


def test_the_written_weight_would_have_given_another_mask():
    host = trained(steps=8)
    logits(host)
    config = sparse_config(**OTHERS["mask"])
    for name, W0 in pristine_weights(tiny(), host).items():
        written = sparse_layers(host)[name].stored_matrix()
        masks = [build_mask(W, config.mask, config.mask_options(), name=name).entries for W in (W0, written)]
        assert not torch.equal(*masks)


# -- switching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "precision"), STORED, ids=names)
def test_switching_back_and_forth_gives_the_same_bits(family, dtype, precision):
    host = two(family, dtype, precision, **OTHERS["mask"])
    alone = trained(family, dtype, precision=precision)
    want = {"default": logits(alone), "second": logits(host)}
    assert not torch.equal(*want.values())
    values = {name: packed_values(host, name) for name in want}
    assert_same_tensors(values["default"], packed_values(alone))
    for name in ("default", "second", "second", "default", "second"):
        host.set_adapter(name)
        assert torch.equal(logits(host), want[name])
        with host.disable_adapter():
            assert torch.equal(logits(host), logits(tiny(family, dtype)))
    for name in want:
        assert_same_tensors(packed_values(host, name), values[name])
    assert_same_base(base_bytes(tiny(family, dtype)), restored_bytes(host))


@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_turns_of_training_equal_training_alone(dtype, precision):
    """Two adapters trained in turns on one base, each with its own optimiser, as if each were alone."""
    host = adapted(dtype=dtype, precision=precision)
    host.add_adapter("second", sparse_config(precision=precision, mask="low"))
    optimizers = {}
    for name in ("default", "second"):
        host.set_adapter(name)
        optimizers[name] = masked(host, weight_decay=0.1)
    for step in range(3):
        for name, by in optimizers.items():
            host.set_adapter(name)
            train(host, 1, by=by, first=step)
    for name, mask in (("default", "~principal"), ("second", "low")):
        alone = adapted(dtype=dtype, precision=precision, mask=mask)
        train_masked(alone, 3, weight_decay=0.1)
        host.set_adapter(name)
        assert torch.equal(logits(host), logits(alone))
        assert_same_tensors(packed_values(host, name), packed_values(alone))


@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_another_adapters_forward_before_the_backward_changes_no_gradient(dtype, precision):
    host = two(dtype=dtype, precision=precision, **OTHERS["mask"])
    host.set_adapter("default")
    want = gradients(host)
    loss = host(input_ids=IDS, labels=IDS).loss
    host.set_adapter("second")
    logits(host, OTHER_IDS)
    host.set_adapter("default")
    loss.backward()
    assert_same_tensors({name: p.grad for name, p in trainable(host).items()}, want)


@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_only_the_active_adapter_trains(dtype, precision):
    host = two(dtype=dtype, precision=precision)
    assert trainable(host) and all(".second." in name for name in trainable(host))
    before = packed_values(host, "default")
    train_masked(host, 2)
    assert_same_tensors(packed_values(host, "default"), before)


@pytest.mark.parametrize("precision", ["fp32", "split"])
def test_two_adapters_of_different_precisions(precision):
    host = trained(dtype=torch.bfloat16, precision=precision)
    other = "split" if precision == "fp32" else "bf16"
    host.add_adapter("second", sparse_config(precision=other))
    assert deltas(host, "second")["model.layers.0.mlp.up_proj"].precision == other
    want = logits(host)
    host.set_adapter("second")
    assert torch.equal(logits(host), logits(tiny(dtype=torch.bfloat16)))
    train_masked(host, 2)
    host.set_adapter("default")
    assert torch.equal(logits(host), want)


# -- together, and deleted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_two_active_adapters_are_refused(dtype, precision):
    host = two(dtype=dtype, precision=precision)
    want, before = logits(host), restored_bytes(host)
    host.base_model.set_adapter(["default", "second"])
    for use in (logits, lambda host: host(input_ids=IDS, labels=IDS).loss.backward()):
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: adapters default, second are active"):
            use(host)
    assert_same_base(before, bytes_when_switched_off(host))
    host.set_adapter("second")
    assert torch.equal(logits(host), want)


def bytes_when_switched_off(host: PeftModel) -> dict[str, str]:
    host.base_model.disable_adapter_layers()
    digests = base_bytes(host)
    host.base_model.enable_adapter_layers()
    return digests


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
@pytest.mark.parametrize("first", ["default", "second"])
@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_an_active_and_written_adapter_can_be_deleted(dtype, precision, first):
    host = two(dtype=dtype, precision=precision, **OTHERS["mask"])
    rest = "second" if first == "default" else "default"
    host.set_adapter(rest)
    want, values = logits(host), packed_values(host, rest)
    host.set_adapter(first)
    logits(host)
    host.delete_adapter(first)
    assert_same_base(base_bytes(tiny(dtype=dtype)), base_bytes(host))  # nothing is written now
    assert list(host.peft_config) == [rest] and host.active_adapters == [rest]
    assert not any(f".{first}." in name for name in host.state_dict())
    assert all(set(layer.configs) == {rest} for layer in sparse_layers(host).values())
    assert torch.equal(logits(host), want)
    assert_same_tensors(packed_values(host, rest), values)
    host.add_adapter(first, sparse_config(precision=precision))  # the name is free again, with nothing left over
    host.set_adapter(first)
    assert torch.equal(logits(host), logits(tiny(dtype=dtype)))


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_the_mask_outlives_the_adapter_that_it_was_shared_from():
    host = two()
    want = logits(host)
    host.delete_adapter("default")
    assert torch.equal(logits(host), want)
    with no_new_mask():
        host.add_adapter("third", sparse_config())
    train_masked(host, 1)


def test_a_merged_adapter_cannot_be_deleted():
    host = two(dtype=torch.bfloat16, precision="split")
    host.merge_adapter(["default"])
    with pytest.raises(ValueError, match="merged"):
        host.delete_adapter("default")
    assert "default" in host.peft_config
    host.delete_adapter("second")
    host.unmerge_adapter()
    assert_same_base(base_bytes(tiny(dtype=torch.bfloat16)), base_bytes(host))


@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_one_of_two_adapters_is_merged_for_good(dtype, precision):
    host = two(dtype=dtype, precision=precision)
    host.set_adapter("default")
    want = logits(host)
    host.set_adapter("second")
    logits(host)
    assert torch.equal(logits(host.merge_and_unload(adapter_names=["default"])), want)


@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_both_adapters_are_saved_and_come_back(tmp_path, dtype, precision):
    host = two(dtype=dtype, precision=precision, **OTHERS["mask"])
    host.save_pretrained(tmp_path)
    with no_new_mask():
        loaded = PeftModel.from_pretrained(tiny(dtype=dtype), tmp_path)
        loaded.load_adapter(tmp_path / "second", "second")
    for name in ("default", "second"):
        assert_same_tensors(packed_values(loaded, name), packed_values(host, name))
        loaded.set_adapter(name), host.set_adapter(name)
        assert torch.equal(logits(loaded), logits(host))
