"""Exports of live models: several adapters, merged ones, pending values, names, and what is no adapter."""

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from interop.exporting import (
    CONFIG,
    TENSORS,
    TOLERANCES,
    distance,
    load_base,
    plain,
    save_base,
    saved,
    settings,
    tensors,
    trained,
)
from lifecycle import assert_same_tensors, config, logits, train
from offprincipal_peft import OffPrincipalLoraConfig
from offprincipal_peft.interop import ExportError, export_lora
from sparse_models import sparse_config

TOLERANCE = TOLERANCES[torch.float32]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def test_a_live_model_gives_what_its_folder_gives(base, tmp_path):
    host = trained(base, "offprincipal")
    export_lora(saved(host, tmp_path / "a"), tmp_path / "from folder")
    done = export_lora(host, tmp_path / "live")
    for file in (TENSORS, CONFIG):
        assert (tmp_path / "live" / file).read_bytes() == (tmp_path / "from folder" / file).read_bytes()
    assert done.nbytes == (tmp_path / "live" / TENSORS).stat().st_size
    assert set(done.ranks.values()) == {4} and done.folded and done.dtype == torch.float32 and done.error == 0.0


def test_one_of_several_adapters(base, tmp_path):
    host = trained(base, "pissa")
    host.add_adapter("second", config("offprincipal", r=3))
    host.set_adapter("second")
    train(host, 2)
    export_lora(host, tmp_path / "live", adapter_name="second")
    host.save_pretrained(tmp_path / "saved")
    export_lora(tmp_path / "saved", tmp_path / "by name", adapter_name="second")
    export_lora(tmp_path / "saved" / "second", tmp_path / "by folder")
    for name in ("live", "by name", "by folder"):
        assert settings(tmp_path / name)["r"] == 3
        assert distance(logits(plain(base, tmp_path / name)), logits(host)) < TOLERANCE
    host.set_adapter("default")
    export_lora(tmp_path / "saved", tmp_path / "first")
    assert distance(logits(plain(base, tmp_path / "first")), logits(host)) < TOLERANCE


def test_a_merged_model_exports_its_adapter(base, tmp_path):
    host = trained(base, "pissa")
    export_lora(host, tmp_path / "before")
    host.merge_adapter()
    export_lora(host, tmp_path / "merged")
    assert_same_tensors(tensors(tmp_path / "merged"), tensors(tmp_path / "before"))


def test_a_compiled_model_is_seen_through(base, tmp_path):
    host = trained(base, "pissa")
    export_lora(torch.compile(host), tmp_path / "x")
    export_lora(host, tmp_path / "y")
    assert_same_tensors(tensors(tmp_path / "x"), tensors(tmp_path / "y"))


def test_an_adapter_of_a_config_alone_is_a_zero_update(base, tmp_path):
    """A config read from a saved adapter postpones the starts; the export computes them, and nothing has trained."""
    adapter = saved(trained(base, "pissa"), tmp_path / "a")
    host = peft.get_peft_model(load_base(base), PeftConfig.from_pretrained(adapter))
    export_lora(host, tmp_path / "x", compress=True)
    assert settings(tmp_path / "x")["r"] == 1
    assert torch.equal(logits(plain(base, tmp_path / "x")), logits(load_base(base)))


def test_values_that_never_came_are_refused(base, tmp_path):
    adapter = saved(trained(base, "pissa"), tmp_path / "a")
    host = peft.get_peft_model(load_base(base), PeftConfig.from_pretrained(adapter), low_cpu_mem_usage=True)
    with pytest.raises(ExportError, match=r"lora_A\.weight is on the meta device and has no values"):
        export_lora(host, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_bf16_parameters_are_folded_in_fp32(tmp_path):
    """A plain adapter keeps its bf16 bytes; a difference is taken in fp32, as the forward takes it."""
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    for preset, dtype in (("rlmo", torch.bfloat16), ("pissa", torch.float32)):
        host = peft.get_peft_model(load_base(base), config(preset), autocast_adapter_dtype=False)
        train(host, 2)
        export_lora(host, tmp_path / preset)
        assert {v.dtype for v in tensors(tmp_path / preset).values()} == {dtype}


class Nested(nn.Module):
    """`first` and `inner.first`: a pattern that is not anchored at its start would match both."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first, self.second, self.last = nn.Linear(12, 10), nn.Linear(10, 12), nn.Linear(12, 4)
            self.inner = nn.Sequential()
            self.inner.first = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.second(torch.relu(self.first(x)))))


def test_patterns_match_one_layer_each_and_any_model_will_do(tmp_path):
    options = {"r": 2, "task_type": None, "rank_pattern": {"inner.first": 4, "second": 3}, "lora_alpha": 6}
    host = peft.get_peft_model(Nested(), config("pissa", target_modules=["first", "second"], **options))
    by = torch.optim.AdamW([p for p in host.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(5, 12)
    for _ in range(3):
        host(x).square().sum().backward()
        by.step()
        by.zero_grad()
    done = export_lora(host, tmp_path / "x")
    assert done.ranks == {"first": 4, "inner.first": 8, "second": 6}
    written = settings(tmp_path / "x")
    assert written["rank_pattern"] == {"^first": 4, "^second": 6} and written["r"] == 8
    assert written["auto_mapping"] == {"base_model_class": "Nested", "parent_library": Nested.__module__}
    loaded = PeftModel.from_pretrained(Nested(), tmp_path / "x")
    assert distance(loaded(x), host(x)) < TOLERANCE
    assert distance(Nested()(x), host(x)) > 1e-2


def test_what_is_not_an_off_principal_adapter_is_refused(base, tmp_path):
    lora = peft.get_peft_model(load_base(base), LoraConfig(target_modules=["q_proj"]))
    sparse = peft.get_peft_model(load_base(base), sparse_config(target_modules=["q_proj"]))
    off = peft.get_peft_model(load_base(base), config("lora", target_modules=["q_proj"]))
    refused = [
        (lora, {}, "adapter 'default' is a plain PEFT LoRA already"),
        (sparse, {}, "sparse adapter, whose update has full rank .*merged"),
        (off, {"adapter_name": "other"}, "no adapter 'other'; its adapters are default"),
        (load_base(base), {}, r"LlamaForCausalLM: give a PeftModel, or the folder"),
        (OffPrincipalLoraConfig(), {}, "OffPrincipalLoraConfig: give a PeftModel"),
        (off, {"dtype": "int8"}, "dtype 'int8': the choices are float32, bfloat16, float16"),
        (off, {"dtype": torch.float64}, "dtype torch.float64: the choices are"),
    ]
    for number, (model, options, words) in enumerate(refused):
        with pytest.raises(ExportError, match=words):
            export_lora(model, tmp_path / f"{number}", **options)
        assert not (tmp_path / f"{number}").exists()


def test_values_that_a_dtype_cannot_hold_are_refused(base, tmp_path):
    host = trained(base, "rlmo", steps=0)
    layer = next(m for m in host.modules() if hasattr(m, "lora_B"))
    layer.lora_A["default"].weight.data.fill_(1e5)
    layer.lora_B["default"].weight.data.fill_(1e6)
    with pytest.raises(ExportError, match=r"0\.self_attn\.q_proj: its factors round to infinity in torch.float16"):
        export_lora(host, tmp_path / "x", dtype="float16")
    assert list(tmp_path.iterdir()) == []
