"""Cells of the table: helpers and optimisers that look into the layers."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import helpers as peft_helpers
from peft import optimizers
from peft.utils import cast_mixed_precision_params, prepare_model_for_kbit_training

from lifecycle import IDS, gradients, logits, train, trainable
from peft_host.cells_model import moved
from peft_host.surface import OFFPRINCIPAL, Method, check, refused_by, tiny

NO_SCALING = refused_by(
    ["sparse"], ValueError, "scaling is only supported for", "LoraLayer", reason="there is no scaling; scale the values"
)
NO_PAIRS = "needs lora_A and lora_B"


@check("prepare_model_for_kbit_training")
def _(m: Method, tmp: Path) -> None:
    base = prepare_model_for_kbit_training(tiny(dtype=torch.bfloat16))  # in fp32; checkpoints quantised models only
    assert {p.dtype for p in base.parameters()} == {torch.float32} and not trainable(base)
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    host = m.fresh(base=base)
    train(host, 2)
    twin = m.fresh(base=tiny(dtype=torch.bfloat16).float())
    train(twin, 2)
    torch.testing.assert_close(logits(host), logits(twin), rtol=1e-4, atol=1e-5)


@check(
    "cast_mixed_precision_params",
    refused=refused_by(
        ["pissa", "projected"],
        RuntimeError,
        "cast_mixed_precision_params",
        ".to(dtype) instead",
        reason="rounds frozen starts and bases; use `model.to(dtype)`",
    ),
)
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    cast_mixed_precision_params(host, torch.bfloat16)
    assert {p.dtype for p in trainable(host).values()} == {torch.float32}
    assert host.get_input_embeddings().weight.dtype == torch.bfloat16
    with host.disable_adapter():
        want = logits(host)
    assert torch.equal(logits(host), want)  # no update at the start
    train(host, 2)
    assert not torch.equal(logits(host), want)


@check("check_if_peft_model")
def _(m: Method, tmp: Path) -> None:
    assert not peft_helpers.check_if_peft_model(str(tmp))
    m.fresh().save_pretrained(tmp)
    assert peft_helpers.check_if_peft_model(str(tmp))


@check("rescale_adapter_scale", refused=NO_SCALING)
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    want = moved(host)
    with peft_helpers.rescale_adapter_scale(host, 0.0):
        torch.testing.assert_close(logits(host), logits(tiny()))
    with peft_helpers.rescale_adapter_scale(host, 0.5):
        halved = host.base_model.model.model.layers[0].mlp.down_proj.get_delta_weight("default")
        assert not torch.equal(logits(host), want)
    whole = host.base_model.model.model.layers[0].mlp.down_proj.get_delta_weight("default")
    torch.testing.assert_close(2 * halved, whole)
    assert torch.equal(logits(host), want)


@check("disable_input_dtype_casting")
def _(m: Method, tmp: Path) -> None:
    host = m.host()
    with peft_helpers.disable_input_dtype_casting(host):
        assert torch.equal(logits(host), moved(host))


@check("update_forward_signature")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    peft_helpers.update_forward_signature(host)
    assert {"input_ids", "labels"} <= set(inspect.signature(host.forward).parameters)
    moved_nothing(host)


@check("update_generate_signature")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    peft_helpers.update_generate_signature(host)
    assert host.generate(input_ids=IDS, max_new_tokens=1).shape == (2, IDS.shape[1] + 1)


@check("update_signature")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    peft_helpers.update_signature(host, "all")
    moved_nothing(host)


def moved_nothing(host) -> None:
    assert torch.equal(logits(host), logits(tiny()))


# -- optimisers of LoRA's factors -------------------------------------------------------------------------------------


def assert_trains(host, optimizer: torch.optim.Optimizer) -> None:
    """Every trainable parameter is in the optimiser, and its steps lower the loss."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in trainable(host).values()} <= held
    losses = []
    host.train()
    for _step in range(4):
        loss = host(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@check("create_loraplus_optimizer")
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    made = optimizers.create_loraplus_optimizer(host, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    for name, parameter in trainable(host).items():
        fast = "lora_B" in name or m.is_sparse  # values are vectors, which LoRA+ counts as B
        assert rates[id(parameter)] == (8e-3 if fast else 1e-3), name
    assert_trains(host, made)


# The message is Python's own: nothing of this package is called before PEFT's step fails.
@check(
    "create_lorafa_optimizer",
    refused=refused_by(OFFPRINCIPAL, TypeError, "NoneType", reason="pairs by position; use `train_factors='B'`"),
)
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    before = {n: p.detach().clone() for n, p in host.named_parameters()}
    made = optimizers.create_lorafa_optimizer(host, r=4, lora_alpha=8, lr=1e-3)
    assert_trains(host, made)
    changed = {n for n, p in host.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_B.default" in n or m.is_sparse for n in changed), changed
    assert not torch.equal(logits(host), logits(tiny()))


@check(
    "create_riemannian_optimizer",
    refused=refused_by(["sparse"], ValueError, "did not find any trainable", "LoRA-style", reason=NO_PAIRS),
)
def _(m: Method, tmp: Path) -> None:
    host = m.fresh()
    assert gradients(host)
    assert_trains(host, optimizers.create_riemannian_optimizer(host, torch.optim.AdamW, lr=1e-3))


@check("PeftModel.push_to_hub")
def _(m: Method, tmp: Path) -> None:
    """Without a network: what would be sent is what save_pretrained writes."""
    host = m.host()
    sent: list[set[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        api = SimpleNamespace(create_repo=lambda *a, **k: SimpleNamespace(repo_id="me/x"))
        patch.setattr("transformers.utils.hub.hf_api", lambda: api)
        patch.setattr(peft.PeftModel, "_upload_modified_files", lambda self, d, *a, **k: sent.append(names_in(d)))
        host.push_to_hub("me/x")
    assert sent and {"adapter_model.safetensors", "adapter_config.json"} <= sent[0]


def names_in(folder: str) -> set[str]:
    return {p.name for p in Path(folder).iterdir()}
