"""Swapping an adapter's values in place: starts and bases go with them, and what cannot be swapped says so."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from helpers import assert_same_base, base_bytes
from lifecycle import adapter_tensors, assert_same_tensors, logits, no_decomposition, train
from lifecycle import config as off_config
from peft_host.surface import COLUMNS, OFFPRINCIPAL, tiny

by_method = pytest.mark.parametrize("key", OFFPRINCIPAL)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # padded products sum in another order; up to 3.6e-7 was seen


def saved(folder: Path, config, steps: int = 3):
    torch.manual_seed(0)
    host = get_peft_model(tiny(), config)
    train(host, steps)
    host.save_pretrained(folder)
    return host


@by_method
def test_every_tensor_goes_over(tmp_path, key):
    """Values, starts and bases of the incoming adapter, whose base model need not be the one here."""
    other = get_peft_model(tiny(seed=1), COLUMNS[key].config())
    train(other, 3)
    other.save_pretrained(tmp_path)
    host = COLUMNS[key].host(1)
    before = base_bytes(tiny())
    with no_decomposition():
        hotswap_adapter(host, str(tmp_path), "default")
        assert_same_tensors(adapter_tensors(host), adapter_tensors(other))
        found = logits(host)
    twin = get_peft_model(tiny(), COLUMNS[key].config())
    twin.load_adapter(tmp_path, "default")
    assert torch.equal(found, logits(twin))
    host.disable_adapter_layers()
    assert_same_base(before, base_bytes(host))


@by_method
@pytest.mark.parametrize("r", [2, 6])
def test_another_rank(tmp_path, key, r):
    other = saved(tmp_path, COLUMNS[key].config(r=r, lora_alpha=16))
    host = COLUMNS[key].host(1)
    hotswap_adapter(host, str(tmp_path), "default")
    torch.testing.assert_close(logits(host), logits(other), **CLOSE)
    host.merge_adapter()
    torch.testing.assert_close(logits(host), logits(other), **CLOSE)
    host.unmerge_adapter()
    host.disable_adapter_layers()
    assert_same_base(base_bytes(tiny()), base_bytes(host))


@by_method
@pytest.mark.parametrize("r", [4, 6, 8])
def test_after_preparing_for_a_larger_rank(tmp_path, key, r):
    other = saved(tmp_path, COLUMNS[key].config(r=r))
    host = COLUMNS[key].host(1)
    want = logits(host)
    prepare_model_for_compiled_hotswap(host, target_rank=8, config=host.peft_config)
    torch.testing.assert_close(logits(host), want, **CLOSE)
    hotswap_adapter(host, str(tmp_path), "default")
    torch.testing.assert_close(logits(host), logits(other), **CLOSE)
    host.merge_adapter()
    torch.testing.assert_close(logits(host), logits(other), **CLOSE)


@by_method
def test_scalings_as_tensors_change_nothing(key):
    host = COLUMNS[key].host()
    want = logits(host)
    prepare_model_for_compiled_hotswap(host)
    assert torch.equal(logits(host), want)
    host.merge_adapter()
    host.unmerge_adapter()
    assert torch.equal(logits(host), want)


@pytest.mark.parametrize(
    "axes",
    [
        {"init_subspace": "top"},
        {"seed": 1},
        {"init_factors": "B", "train_factors": "A"},
        {"principal_rank": 3, "projection": "both"},
        {"principal_rank": 3, "projection": "input"},
        {"train_factors": "B"},
        {"use_rslora": True},
    ],
    ids=lambda axes: "-".join(f"{k}={v}" for k, v in axes.items()),
)
def test_another_method_is_refused_before_anything_is_written(tmp_path, axes):
    saved(tmp_path, off_config("rlmo", **axes), 1)
    host = COLUMNS["plain"].host(1)
    want = logits(host)
    with pytest.raises(ValueError, match=f"Configs are incompatible: for ({'|'.join(axes)})"):
        hotswap_adapter(host, str(tmp_path), "default")
    assert torch.equal(logits(host), want)


def test_plain_lora_is_refused(tmp_path):
    saved(tmp_path, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), 1)
    host = COLUMNS["plain"].host(1)
    with pytest.raises(ValueError, match="Incompatible PEFT types found: OFFPRINCIPAL_LORA and LORA"):
        hotswap_adapter(host, str(tmp_path), "default")


@by_method
def test_a_merged_adapter_is_refused(tmp_path, key):
    saved(tmp_path, COLUMNS[key].config())
    host = COLUMNS[key].host(1)
    host.merge_adapter()
    with pytest.raises(ValueError, match="currently merged"):
        hotswap_adapter(host, str(tmp_path), "default")


@by_method
def test_the_next_adapter_starts_where_its_config_says(tmp_path, key):
    """A layer copies the start of an adapter that it has; a swap must not leave it a wrong record of that."""
    saved(tmp_path, COLUMNS[key].config())
    host = COLUMNS[key].host(1)
    hotswap_adapter(host, str(tmp_path), "default")
    host.add_adapter("two", COLUMNS[key].config())
    fresh = COLUMNS[key].fresh()
    assert_same_tensors(adapter_tensors(host, "two"), adapter_tensors(fresh))


def test_a_sparse_adapter_says_that_it_is_not_in_pefts_list(tmp_path):
    """PEFT's message, which names the methods it swaps; load_adapter over the adapter is what to do instead."""
    other = COLUMNS["sparse"].host(3)
    other.save_pretrained(tmp_path)
    host = COLUMNS["sparse"].host(1)
    with pytest.raises(ValueError, match=r"Hotswapping only supports .*PRINCIPAL_SPARSE was passed"):
        hotswap_adapter(host, str(tmp_path), "default")
    host.load_adapter(tmp_path, "default")
    assert torch.equal(logits(host), logits(other))
