"""Any off-principal adapter as a plain PEFT LoRA, which loads where this package is not installed.

The update of an off-principal adapter is a product of folded factors (see :mod:`.tuners.offprincipal_lora.fold`), so
that it is a LoRA of rank r, or 2r where both factors started away from zero and both trained. The scaling is folded in
too: the written ``lora_alpha`` equals ``r``, and tools that ignore patterns still scale every layer by 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from .adapter_source import PREFIX, AdapterSource, lora_fields, open_adapter
from .folders import ExportError, check_target, copy_tokenizer, find_adapter, find_dtype, new_folder, size_of
from .recompress import product_error, recompress


@dataclass(frozen=True)
class LoraExport:
    """What was written.

    ``ranks``: by layer. ``folded``: False where the factors are the adapter's own bytes. ``error``: the largest
    relative Frobenius distance of a layer's written update to the fp32 one. ``nbytes``: of the tensors' file.
    """

    folder: Path
    ranks: dict[str, int]
    dtype: torch.dtype
    folded: bool
    compressed: int
    error: float
    nbytes: int
    base: str | None

    def summary(self) -> str:
        """What was done and how to load it, in a few lines."""
        least, most = min(self.ranks.values()), max(self.ranks.values())
        rank = f"rank {most}" if least == most else f"ranks {least} to {most}"
        how = "folded, scaling 1" if self.folded else "the adapter's own factors and scaling"
        if self.error:
            how += f", update within {self.error:.1e} (relative, Frobenius)"
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"plain LoRA in {self.folder}: {len(self.ranks)} layers, {rank}, {name}, {self.nbytes:,} bytes; {how}\n"
            f"load it: PeftModel.from_pretrained(model, {str(self.folder)!r}), model being {self.base or 'its base'}"
        )


def export_lora(
    adapter: PeftModel | str | Path,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    dtype: str | torch.dtype | None = None,
    compress: bool = False,
    overwrite: bool = False,
) -> LoraExport:
    """Write an off-principal adapter as a LoRA that plain PEFT loads.

    Args:
        adapter: a saved adapter's folder (no base model is loaded), or a live model; merged or not, its factors count.
        folder: where to; written whole or not at all.
        adapter_name: which adapter of a live model, or of a folder with several.
        dtype: of the factors; by default fp32 for folded ones (fp64 for fp64 factors) and their own where nothing
            is subtracted or projected, which keeps r, lora_alpha and bytes as they are.
        compress: recompute the factors at the least rank that gives the same update within one rounding to fp32
            (relative Frobenius 1.2e-7 for what is cut off). Layers whose folded rank exceeds min(d_out, d_in) always
            are.
        overwrite: replace an exported folder.

    Raises:
        ExportError: an adapter that is not off-principal, not whole or not finite, a target in the way, or values that
            the dtype cannot hold. Nothing is written then.
    """
    wanted = find_dtype(dtype)
    if isinstance(adapter, str | Path):
        adapter = find_adapter(Path(adapter), adapter_name)
    target = check_target(Path(folder), adapter if isinstance(adapter, Path) else None, overwrite=overwrite)
    source = open_adapter(adapter, adapter_name)
    fold = compress or not source.is_plain
    tensors, ranks, compressed, worst = dict(source.others), {}, 0, 0.0
    for name in sorted(source.layers):
        left, right = source.factors(name) if fold else _raw(source, name)
        kept = left, right
        if fold and (compress or left.shape[1] > min(left.shape[0], right.shape[1])):
            kept = recompress(left, right)
            compressed += 1
        kept = _cast(*kept, wanted, name)
        if kept[0] is not left:
            worst = max(worst, product_error(left, right, *kept))
        ranks[name] = kept[0].shape[1]
        tensors[f"{PREFIX}{name}.lora_B.weight"], tensors[f"{PREFIX}{name}.lora_A.weight"] = kept
    _write(target, source, tensors, _lora_config(source, ranks if fold else None))
    return LoraExport(
        target,
        ranks,
        kept[0].dtype,
        fold,
        compressed,
        worst,
        size_of(target, SAFETENSORS_WEIGHTS_NAME),
        source.config.base_model_name_or_path,
    )


def _raw(source: AdapterSource, name: str) -> tuple[Tensor, Tensor]:
    parts = source.layers[name]
    return parts["lora_B"], parts["lora_A"]


def _cast(left: Tensor, right: Tensor, dtype: torch.dtype | None, name: str) -> tuple[Tensor, Tensor]:
    if dtype is None:
        return left, right
    if dtype == torch.float16 and left.dtype != dtype:
        left, right = _balanced(left, right)
    left, right = left.to(dtype), right.to(dtype)
    if not (bool(left.isfinite().all()) and bool(right.isfinite().all())):
        raise ExportError(f"{name}: its factors round to infinity in {dtype}; export bfloat16 or float32.")
    return left, right


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with each column of ``left`` and row of ``right`` of like size, moved by powers of two.

    Differences of trained and starting factors are small enough to be lost below fp16's smallest normal number.
    """
    big_left, big_right = left.abs().amax(dim=0), right.abs().amax(dim=1)
    used = (big_left > 0) & (big_right > 0)
    shift = torch.where(used, (big_right / big_left).log2().div(2).round(), 0.0)
    power = torch.exp2(shift)
    return left * power, right / power[:, None]


def _lora_config(source: AdapterSource, ranks: dict[str, int] | None) -> LoraConfig:
    """The plain config; ``ranks`` of the folded layers, or None where the adapter's own r and alpha hold."""
    values: dict[str, Any] = lora_fields(source.config)
    if not source.has_exact_targets:
        values["target_modules"] = sorted(source.layers)
        values.update(exclude_modules=None, layers_to_transform=None, layers_pattern=None)
    if ranks is not None:
        r = max(ranks.values())  # tools that read r alone size their buffers by it
        # PEFT matches (.*\.)?(PATTERN)$: the anchor keeps a name from matching as another's ending.
        other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
        values.update(r=r, lora_alpha=r, use_rslora=False, rank_pattern=other, alpha_pattern=dict(other))
    values["inference_mode"] = True
    config = LoraConfig(**values)
    for name in ("target_modules", "exclude_modules"):  # sets, which JSON would hold in another order each time
        if isinstance(getattr(config, name), set):
            setattr(config, name, sorted(getattr(config, name)))
    return config


def _write(target: Path, source: AdapterSource, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    from safetensors.torch import save_file

    with new_folder(target) as fresh:
        # Clones: tied tensors share memory, which safetensors refuses.
        whole = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
        save_file(whole, fresh / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(fresh))
        if source.folder is not None:
            copy_tokenizer([str(source.folder)], fresh)
        (fresh / "README.md").write_text(_card(source), encoding="utf-8")


def _card(source: AdapterSource) -> str:
    base = source.config.base_model_name_or_path
    head = ["library_name: peft", *([f"base_model: {base}"] if base else []), "tags: [lora]"]
    return "\n".join(
        [
            "---",
            *head,
            "---",
            "",
            "A plain PEFT LoRA, exported from an off-principal adapter of offprincipal-peft. It loads with",
            "`PeftModel.from_pretrained(base_model, folder)` and needs no other package.",
            "",
        ]
    )
