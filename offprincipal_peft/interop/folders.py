"""Folders that are written whole or not at all, and what a saved adapter's folder holds."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from ..tuners.offprincipal_lora.config import PEFT_TYPE_NAME as OFF_PRINCIPAL

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ExportError(ValueError):
    """An adapter, a base or a target folder that cannot be exported from or into."""


def find_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """``"float32"``, ``"bfloat16"``, ``"float16"`` or the torch dtype of that name; None stays None."""
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if found not in _DTYPES.values():
        raise ExportError(f"dtype {dtype!r}: the choices are {', '.join(_DTYPES)}.")
    return found


# -- writing --------------------------------------------------------------------------------------------------------


def check_target(folder: Path, source: Path | None, *, overwrite: bool) -> Path:
    """The folder to write, resolved. Raises :class:`ExportError` where something is in the way.

    ``source``: the folder that is read, which must lie outside of the target.
    """
    target = folder.expanduser().resolve()
    if source is not None and (source.resolve() == target or target in source.resolve().parents):
        raise ExportError(f"{folder} is, or contains, the adapter that is read ({source}); give another folder.")
    if not target.exists():
        return target
    if not target.is_dir():
        raise ExportError(f"{folder} is a file; give the folder to write into.")
    if not any(target.iterdir()):
        return target
    if not overwrite:
        raise ExportError(f"{folder} exists and is not empty; give another folder, or overwrite=True (--overwrite).")
    if not any((target / name).is_file() for name in (CONFIG_NAME, "config.json")):
        raise ExportError(
            f"{folder} holds neither {CONFIG_NAME} nor config.json: it is no exported folder and is not overwritten. "
            "Give another folder, or remove this one."
        )
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A fresh folder beside ``target`` that takes its place when the block ends, and is removed if it fails.

    What was at ``target`` stays until then; no reader sees a half-written folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    fresh = target.with_name(f".{target.name}.{mark}.new")
    fresh.mkdir()
    try:
        yield fresh
        if target.exists():
            old = target.with_name(f".{target.name}.{mark}.old")
            target.rename(old)
            try:
                fresh.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old)
        else:
            fresh.rename(target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def size_of(folder: Path, pattern: str = "*") -> int:
    """Bytes of the files directly in ``folder`` that match ``pattern``."""
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())


# -- reading --------------------------------------------------------------------------------------------------------


def find_adapter(folder: Path, adapter_name: str) -> Path:
    """Where the adapter's files are: ``folder``, or its subfolder of the adapter's name, as PEFT saves it."""
    if not folder.is_dir():
        raise ExportError(f"no folder {folder}; give the folder of a saved adapter, which holds {CONFIG_NAME}.")
    if adapter_name != "default" and (folder / adapter_name / CONFIG_NAME).is_file():
        return folder / adapter_name
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    if (folder / CONFIG_NAME).is_file():
        if adapter_name != "default" and inside:
            raise ExportError(f"{folder} holds no adapter {adapter_name!r}; it holds default, {', '.join(inside)}.")
        return folder
    hint = f" It holds saved adapters in {', '.join(inside)}: name one." if inside else ""
    if (folder / "config.json").is_file():
        hint += " It holds a model: give the adapter's folder."
    raise ExportError(f"{folder} holds no {CONFIG_NAME}, so it is no saved adapter.{hint}")


def read_config(folder: Path) -> dict[str, Any]:
    """The JSON of a saved adapter's config, with its ``peft_type``."""
    path = folder / CONFIG_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and UTF-8 errors
        raise ExportError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
        raise ExportError(f"{path} names no peft_type, so it is no adapter's config.")
    return values


def default_form(folder: str | Path, adapter_name: str = "default") -> str:
    """``"lora"`` for a saved off-principal or LoRA adapter, ``"merged"`` for any other."""
    peft_type = read_config(find_adapter(Path(folder), adapter_name))["peft_type"]
    return "lora" if peft_type in (OFF_PRINCIPAL, "LORA") else "merged"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter. Raises :class:`ExportError` for a missing, pickled or damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        if (folder / WEIGHTS_NAME).is_file():
            raise ExportError(
                f"{folder} holds {WEIGHTS_NAME}, a pickle, which is not read; load the adapter where you trust it and "
                "save it again with safe_serialization=True."
            )
        raise ExportError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}, the adapter's tensors.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} is damaged or cut short ({error}); copy the adapter again.") from error


def copy_tokenizer(sources: list[str], target: Path) -> list[str]:
    """Copy the tokenizer files of the first source (a folder, or a Hugging Face id) that has any; their names."""
    from transformers.utils.hub import cached_file

    for source in sources:
        found = {}
        for name in TOKENIZER_FILES:
            path = cached_file(
                source,
                name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
            if path is not None:
                found[name] = path
        if any(name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for name in found):
            for name, path in found.items():
                shutil.copyfile(path, target / name)
            return sorted(found)
    return []
