"""Device maps and offloading on a CPU: with accelerate's hooks values are on the meta device between calls."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel
from peft.utils import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

from lifecycle import IDS, logits, no_decomposition, tiny, train, trainable
from peft_host.surface import COLUMNS, EVERY, OURS

by_method = pytest.mark.parametrize("key", EVERY)
UNSPARSE = pytest.mark.parametrize("key", [key for key in EVERY if not COLUMNS[key].is_sparse])
CPU = torch.device("cpu")
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
ON_DISK = {part: "disk" if part == "model.layers.1" else "cpu" for part in PARTS}
SPARSE_REFUSAL = r"q_proj: the base weight has no values .*offloading.* Load the model onto one device"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT rewrites what is on disk below the current directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load_base(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def saved(key: str, base: Path, folder: Path) -> torch.Tensor:
    """A trained adapter in `folder`, and the logits of its model without any map."""
    host = COLUMNS[key].fresh(base=load_base(base))
    train(host, 2)
    host.save_pretrained(folder)
    return logits(host)


@pytest.mark.parametrize(
    "options",
    [{"device_map": {"": "cpu"}}, {"device_map": "auto"}, {"device_map": "auto", "max_memory": {"cpu": "1GB"}}],
    ids=["cpu", "auto", "auto-max_memory"],
)
@by_method
def test_a_base_with_a_device_map(tmp_path, base, key, options):
    want = saved(key, base, tmp_path / "adapter")
    with no_decomposition():
        loaded = PeftModel.from_pretrained(load_base(base, **options), tmp_path / "adapter")
        assert torch.equal(logits(loaded), want)


@UNSPARSE
def test_a_base_with_layers_on_disk(tmp_path, base, key):
    want = saved(key, base, tmp_path / "adapter")
    offloaded = load_base(base, device_map=ON_DISK, offload_folder=str(tmp_path / "off"))
    assert any(p.is_meta for p in offloaded.parameters())
    with no_decomposition():
        loaded = PeftModel.from_pretrained(
            offloaded,
            tmp_path / "adapter",
            device_map={f"base_model.model.{part}": where for part, where in ON_DISK.items()},
            offload_folder=str(tmp_path / "adapter-off"),
        )
        assert [name for name, p in loaded.named_parameters() if p.is_meta and "lora_" in name]
        for _again in range(2):  # values come and go
            assert torch.equal(logits(loaded), want)


@UNSPARSE
def test_max_memory_puts_an_adapted_model_on_disk(tmp_path, base, key):
    want = saved(key, base, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        load_base(base, device_map=ON_DISK, offload_folder=str(tmp_path / "off")),
        tmp_path / "adapter",
        device_map="auto",
        max_memory={"cpu": 60_000},
        offload_folder=str(tmp_path / "adapter-off"),
    )
    assert any(p.is_meta for p in loaded.parameters())
    assert torch.equal(logits(loaded), want)


def offload(host: PeftModel, where: str, folder: Path) -> None:
    if where == "cpu":
        cpu_offload(host, CPU)
    else:
        disk_offload(host, str(folder), execution_device=CPU)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@UNSPARSE
def test_offloading_an_adapted_model(tmp_path, key, where):
    host = COLUMNS[key].host()
    want = logits(host)
    tokens = host.generate(input_ids=IDS[:, :4], max_new_tokens=2, do_sample=False)
    offload(host, where, tmp_path)
    assert all(p.is_meta for name, p in host.named_parameters() if ".default." in name)
    for _again in range(2):
        assert torch.equal(logits(host), want)
    assert torch.equal(host.generate(input_ids=IDS[:, :4], max_new_tokens=2, do_sample=False), tokens)


def test_a_sparse_adapter_on_a_base_with_layers_on_disk(tmp_path, base):
    saved("sparse", base, tmp_path / "adapter")
    offloaded = load_base(base, device_map=ON_DISK, offload_folder=str(tmp_path / "off"))
    with pytest.raises((ValueError, RuntimeError), match=SPARSE_REFUSAL):
        PeftModel.from_pretrained(
            offloaded,
            tmp_path / "adapter",
            device_map={f"base_model.model.{part}": where for part, where in ON_DISK.items()},
            offload_folder=str(tmp_path / "adapter-off"),
        )


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloading_a_model_with_a_sparse_adapter(tmp_path, where):
    host = COLUMNS["sparse"].host()
    with pytest.raises((ValueError, RuntimeError), match=SPARSE_REFUSAL):
        offload(host, where, tmp_path)
        logits(host)


@pytest.mark.parametrize("key", OURS)
def test_a_new_adapter_needs_the_values_of_the_base(tmp_path, base, key):
    offloaded = load_base(base, device_map=ON_DISK, offload_folder=str(tmp_path / "off"))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj .* meta device and has no values"):
        COLUMNS[key].fresh(base=offloaded)


@pytest.mark.parametrize("reentrant", [True, False])
@by_method
def test_gradient_checkpointing_of_a_prepared_model(key, reentrant):
    losses = {}
    for checkpointing in (False, True):
        base = prepare_model_for_kbit_training(tiny())
        if checkpointing:
            base.enable_input_require_grads()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        host = COLUMNS[key].fresh(base=base)
        train(host, 3)
        losses[checkpointing] = logits(host)
        assert trainable(host)
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-4, atol=1e-5)
