"""No stale weights, ever: after any write to the packed parameter the next forward computes with the new values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from helpers import tiny_llama, token_batch
from offprincipal_peft import MaskedAdamW, PrincipalSparseConfig
from offprincipal_peft.tuners.principal_sparse import PrincipalSparseLinear
from versions import older_than

IDS = token_batch(128)


def _model(dtype: torch.dtype = torch.bfloat16, **options: Any) -> PeftModel:
    settings: dict[str, Any] = {"mask": "random", "random_density": 0.3, "task_type": "CAUSAL_LM"}
    return get_peft_model(tiny_llama(dtype), PrincipalSparseConfig(**{**settings, **options}))


def _layers(model: nn.Module) -> list[PrincipalSparseLinear]:
    return [m for m in model.modules() if isinstance(m, PrincipalSparseLinear)]


def _delta(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if ".princsparse_delta.default." in n]


def _assert_fresh(model: nn.Module, originals: list[Tensor]) -> None:
    """After a forward, every base weight is round(W0 + delta) on the mask and W0 elsewhere, bit for bit."""
    for layer, original in zip(_layers(model), originals, strict=True):
        delta = layer.delta("default")
        mask = delta.layout.mask()
        expected = original.clone()
        expected[mask] = (original[mask].float() + delta.weight.detach()).to(original.dtype)
        assert torch.equal(layer.stored_matrix(), expected), layer.name


def _originals(model: nn.Module) -> list[Tensor]:
    for layer in _layers(model):
        layer.restore()
    return [layer.stored_matrix().clone() for layer in _layers(model)]


class _SubclassesNothing:
    """An optimiser that torch knows nothing of and that writes through ``.data``."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def step(self) -> None:
        for p in self.parameters:
            p.data -= 0.05 * p.grad.sign()


def _bnb_8bit(parameters: list[nn.Parameter]) -> Any:
    optim = pytest.importorskip("bitsandbytes").optim
    if older_than("bitsandbytes", "0.50"):
        pytest.skip("bitsandbytes steps its 8-bit optimisers on a CPU since 0.50; the installed one is older")
    return optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=0)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "plain": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False, fused=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=1.0, fused=True),
    "masked": lambda p: MaskedAdamW(p, lr=1e-2),
    "bnb-8bit": _bnb_8bit,
    "subclasses-nothing": _SubclassesNothing,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_forward_after_a_step_uses_its_values(name: str) -> None:
    model = _model()
    originals = _originals(model)
    optimizer = OPTIMIZERS[name](_delta(model))
    before = model(input_ids=IDS).logits
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.zero_grad()
        after = model(input_ids=IDS).logits
        _assert_fresh(model, originals)
        assert not torch.equal(after, before)
        before = after


@pytest.mark.parametrize("name", ["fused", "sgd-fused", "bnb-8bit"])
def test_a_sync_that_relies_on_versions_would_be_stale(name: str) -> None:
    """The broken variant: write the weight only where the parameter's version counter moved."""
    model = _model()
    optimizer = OPTIMIZERS[name](_delta(model))
    originals = _originals(model)
    for layer in _layers(model):
        _rely_on_versions(layer)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.zero_grad()
    model(input_ids=IDS)
    with pytest.raises(AssertionError):
        _assert_fresh(model, originals)


def _rely_on_versions(layer: PrincipalSparseLinear) -> None:
    delta, real = layer.delta("default"), layer.realise
    seen: list[int] = []

    def realise(adapter: str) -> None:
        version = delta.weight._version
        if seen != [version] or layer.written != adapter:
            real(adapter)
            seen[:] = [version]

    layer.realise = realise  # type: ignore[method-assign]


def test_writes_that_leave_no_trace() -> None:
    model = _model()
    originals = _originals(model)
    model(input_ids=IDS)
    generator = torch.Generator().manual_seed(0)
    writes: list[Callable[[nn.Parameter, Tensor], Any]] = [
        lambda p, new: p.data.copy_(new),
        lambda p, new: setattr(p, "data", new),
        lambda p, new: p.detach().numpy().__setitem__(slice(None), new.numpy()),
        lambda p, new: p.untyped_storage().copy_(new.untyped_storage()),
    ]
    for write in writes:
        for p in _delta(model):
            write(p, 0.1 * torch.randn(p.shape, generator=generator))
        for call in (
            lambda: model(input_ids=IDS),
            lambda: model.generate(IDS, max_new_tokens=1),
            lambda: _inner(model),
        ):
            call()
            _assert_fresh(model, originals)


def _inner(model: PeftModel) -> None:
    """The wrapped model called directly, without the PEFT model's forward around it."""
    with torch.no_grad():
        model.get_base_model()(input_ids=IDS)


def test_loading_and_switching(tmp_path: Any) -> None:
    model = _model()
    originals = _originals(model)
    for p in _delta(model):
        p.data.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    saved = {n: p.detach().clone() for n, p in model.named_parameters() if ".princsparse_delta." in n}
    for p in _delta(model):
        p.data.zero_()
    model(input_ids=IDS)
    model.load_adapter(tmp_path, "default")
    model(input_ids=IDS)
    _assert_fresh(model, originals)
    assert all(torch.equal(p, saved[n]) for n, p in model.named_parameters() if n in saved)
    model.add_adapter("other", PrincipalSparseConfig(mask="low", low_density=0.1, task_type="CAUSAL_LM"))
    model.set_adapter("other")
    model(input_ids=IDS)
    assert all(torch.equal(m.stored_matrix(), o) for m, o in zip(_layers(model), originals, strict=True))
    model.set_adapter("default")
    model(input_ids=IDS)
    _assert_fresh(model, originals)


def test_a_copy_into_the_reference_adapter() -> None:
    """What TRL does: ``ref.data.copy_(default.data)`` for every parameter with ``.default.`` in its name."""
    for precision in ("fp32", "split", "bf16"):
        model = _model(precision=precision)
        _train(model, 2)
        expected = model(input_ids=IDS).logits
        model.add_adapter("ref", model.peft_config["default"])
        for name, p in list(model.named_parameters()):
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(p.data)
        model.set_adapter("ref")
        assert torch.equal(model(input_ids=IDS).logits, expected), precision
        model.set_adapter("default")
        _train(model, 1)
        assert not torch.equal(model(input_ids=IDS).logits, expected)
        model.set_adapter("ref")
        assert torch.equal(model(input_ids=IDS).logits, expected), precision


def _train(model: nn.Module, steps: int) -> None:
    optimizer = MaskedAdamW(_delta(model), lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_half_of_a_split_master_from_elsewhere_is_refused() -> None:
    """A copy that arrives after the policy moved on cannot be completed, and is not computed with."""
    model = _model(precision="split")
    _train(model, 1)
    model.add_adapter("ref", model.peft_config["default"])
    old = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
    _train(model, 1)
    for name, value in old.items():
        model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(value)
    model.set_adapter("ref")
    with pytest.raises(RuntimeError, match="written from outside"):
        model(input_ids=IDS)
    model.set_adapter("default")
    model(input_ids=IDS)


def test_one_generate_writes_each_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from offprincipal_peft.tuners.principal_sparse import packed

    model = _model()
    writes: list[str] = []
    real = packed.PackedDelta.write

    def counted(self: Any, matrix: Tensor) -> None:
        writes.append(self.owner[0].name)
        real(self, matrix)

    monkeypatch.setattr(packed.PackedDelta, "write", counted)
    model.generate(IDS, max_new_tokens=5, min_new_tokens=5)
    assert sorted(writes) == sorted(layer.name for layer in _layers(model))
