"""Copies, pickles and casts of adapted models and of configs."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model

from helpers import assert_same_base, base_bytes
from lifecycle import logits, train, trainable
from peft_host.surface import COLUMNS, EVERY, OURS, tiny

by_method = pytest.mark.parametrize("key", EVERY)


@by_method
def test_a_deep_copy_is_independent(key):
    host = COLUMNS[key].host()
    want = logits(host)
    twin = copy.deepcopy(host)
    assert torch.equal(logits(twin), want)
    shared = {p.data_ptr() for p in host.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert not shared
    train(twin, 2)
    moved = logits(twin)
    assert torch.equal(logits(host), want) and not torch.equal(moved, want)
    train(host, 2)
    assert torch.equal(logits(host), moved)  # the same training
    assert torch.equal(logits(twin), moved)
    twin.disable_adapter_layers()
    assert_same_base(base_bytes(tiny()), base_bytes(twin))


@by_method
def test_a_deep_copy_of_a_merged_model_unmerges_on_its_own(key):
    host = COLUMNS[key].host()
    host.merge_adapter()
    twin, merged = copy.deepcopy(host), logits(host)
    twin.unmerge_adapter()
    assert torch.equal(logits(host), merged)
    host.unmerge_adapter()
    assert torch.equal(logits(host), logits(twin))


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
@by_method
def test_a_pickled_model_comes_back(tmp_path, key, way):
    host = COLUMNS[key].host()
    want = logits(host)
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(host))
    else:
        torch.save(host, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(twin), want)
    assert set(trainable(twin)) == set(trainable(host))
    train(twin, 1)
    train(host, 1)
    assert torch.equal(logits(twin), logits(host))


@by_method
def test_a_config_copies_pickles_and_makes_the_same_adapter(key):
    config = COLUMNS[key].config()
    for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(twin) is type(config) and twin == config and twin.peft_type is config.peft_type
        torch.manual_seed(0)
        host = get_peft_model(tiny(), twin)
        train(host, 1)
        assert torch.equal(logits(host), logits(COLUMNS[key].host(1)))


@by_method
def test_of_a_config_only_the_targets_are_filled_in(key):
    """PEFT writes the layers it found; used again, our configs start from what was asked for."""
    config = COLUMNS[key].config()
    before = copy.deepcopy(config.to_dict())
    get_peft_model(tiny(), config)
    after = config.to_dict()
    assert before.pop("target_modules") and after.pop("target_modules")
    assert after == before


@pytest.mark.parametrize("way", ["bfloat16", "half", "to"])
@by_method
def test_casts_down_and_back_up(key, way):
    """The outcome stays within the rounding of the model's own weights, and the model still trains."""
    host = COLUMNS[key].host()
    want, dtype = logits(host), torch.float16 if way == "half" else torch.bfloat16
    host.to(dtype) if way == "to" else getattr(host, way)()
    low = logits(host)
    assert low.dtype == dtype
    assert (low.float() - want).abs().max() < 0.05  # 0.011 seen in bf16
    with host.disable_adapter():
        torch.testing.assert_close(logits(host), logits(tiny().to(dtype)), rtol=0.02, atol=0.02)
    host.float()
    assert (logits(host) - want).abs().max() < 0.05
    train(host, 1)
    assert torch.isfinite(logits(host)).all()


@pytest.mark.parametrize("key", OURS)
def test_a_cast_keeps_the_start_a_start(key):
    """An untrained adapter changes nothing in any dtype."""
    host = COLUMNS[key].fresh()
    host.bfloat16()
    with host.disable_adapter():
        want = logits(host)
    assert torch.equal(logits(host), want)


@by_method
def test_moving_to_the_device_it_is_on_changes_nothing(key):
    host = COLUMNS[key].host()
    want, names = logits(host), set(trainable(host))
    for moved in (host.to("cpu"), host.cpu(), host.to(torch.device("cpu"), torch.float32)):
        assert moved is host and torch.equal(logits(host), want) and set(trainable(host)) == names
