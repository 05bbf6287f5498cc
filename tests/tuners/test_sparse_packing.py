"""Packed and dense storage of one mask: the same model, the same files, exchangeable."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from helpers import assert_same_base, base_bytes, tiny_gpt2, tiny_llama, token_batch
from offprincipal_peft import MaskedAdamW, PrincipalSparseConfig
from offprincipal_peft.kernels import ElementLayout
from offprincipal_peft.kernels.dense_layout import DenseLayout
from offprincipal_peft.tuners import PrincipalSparseLinear

IDS = token_batch(128)
PRECISIONS = [("fp32", torch.float32), ("fp32", torch.bfloat16), ("split", torch.bfloat16), ("bf16", torch.bfloat16)]


def _model(packing: str, precision: str = "fp32", dtype: torch.dtype = torch.float32, family: Any = tiny_llama) -> Any:
    config = PrincipalSparseConfig(packing=packing, precision=precision, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    return get_peft_model(family(dtype), config)


def _train(model: PeftModel, steps: int = 3) -> None:
    optimizer = MaskedAdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        ids = token_batch(128, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _layouts(model: PeftModel) -> set[type]:
    return {type(m.delta("default").layout) for m in model.modules() if isinstance(m, PrincipalSparseLinear)}


def test_auto_chooses_by_density() -> None:
    assert _layouts(_model("auto")) == {DenseLayout}  # the safe mask names about three quarters
    assert _layouts(_model("packed")) == {ElementLayout}
    low = PrincipalSparseConfig(mask="low", low_density=0.5, task_type="CAUSAL_LM")
    assert _layouts(get_peft_model(tiny_llama(), low)) == {ElementLayout}
    assert _model("dense").base_model.mask_reports == _model("packed").base_model.mask_reports


@pytest.mark.parametrize("family", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS, ids=str)
def test_both_train_the_same_and_load_each_others_files(
    precision: str, dtype: torch.dtype, family: Any, tmp_path: Path
) -> None:
    files, outputs = {}, {}
    for packing in ("packed", "dense"):
        model = _model(packing, precision, dtype, family)
        before = base_bytes(family(dtype))
        _train(model)
        outputs[packing] = model(input_ids=IDS).logits
        model.save_pretrained(tmp_path / packing)
        files[packing] = load_file(tmp_path / packing / "adapter_model.safetensors")
        assert_same_base(before, base_bytes(model))
        model.merge_adapter()
        assert torch.equal(model(input_ids=IDS).logits, outputs[packing])
        assert_same_base(before, base_bytes(model.unload()))
    assert files["packed"].keys() == files["dense"].keys()
    for key, value in files["packed"].items():
        # the last few of a packed vector go through other lanes of torch's fused kernel
        torch.testing.assert_close(files["dense"][key], value, rtol=1e-4, atol=1e-5)
        assert files["dense"][key].shape == value.shape
    for source, packing in (("packed", "dense"), ("dense", "packed")):
        loaded = _model(packing, precision, dtype, family)
        loaded.load_adapter(tmp_path / source, "default")
        assert torch.equal(loaded(input_ids=IDS).logits, outputs[source])


def test_packing_of_a_saved_config_is_its_own(tmp_path: Path) -> None:
    model = _model("packed")
    model.save_pretrained(tmp_path)
    assert _layouts(PeftModel.from_pretrained(tiny_llama(), tmp_path)) == {ElementLayout}


def test_another_packing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"packing must be one of 'auto', 'packed', 'dense', got 'sparse'"):
        PrincipalSparseConfig(packing="sparse")  # type: ignore[arg-type]
