"""A base model with an adapter merged into it, as an ordinary Hugging Face folder."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..tuners.offprincipal_lora.config import PEFT_TYPE_NAME as OFF_PRINCIPAL
from ..tuners.principal_sparse.config import PEFT_TYPE_NAME as SPARSE
from ..tuners.principal_sparse.plan import trained_dtype
from .adapter_source import PREFIX
from .folders import (
    ExportError,
    check_target,
    copy_tokenizer,
    find_adapter,
    find_dtype,
    new_folder,
    read_config,
    read_tensors,
    size_of,
)

TASK_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
# Tasks that put a new head on a base which was saved without it: the base's own class has no such head.
_NEW_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True)
class MergedExport:
    """What was written. ``layers``: how many carried the adapter. ``nbytes``: of the weights' files."""

    folder: Path
    peft_type: str
    model_class: str
    base: str
    layers: int
    dtype: torch.dtype
    files: int
    nbytes: int
    tokenizer: bool

    def summary(self) -> str:
        """What was done and how to load it, in a few lines."""
        name = str(self.dtype).removeprefix("torch.")
        files = f"{self.files} file{'s' if self.files > 1 else ''}"
        return (
            f"merged model in {self.folder}: {self.peft_type} on {self.layers} layers of {self.base}, {name}, "
            f"{self.nbytes:,} bytes in {files}{'' if self.tokenizer else '; no tokenizer was found to copy'}\n"
            f"load it: {self.model_class}.from_pretrained({str(self.folder)!r})"
        )


def export_merged(
    adapter_folder: str | Path,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    adapter_name: str = "default",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> MergedExport:
    """Merge a saved adapter into its base model and write the model.

    Any PEFT adapter that can be merged will do. A sparse adapter gives its trained weights bit for bit and the base's
    own elsewhere, and refuses a base with other bytes. A base that is stored quantised gives a float model, if the
    adapter is one of this package's and adapts every quantised layer.

    Args:
        adapter_folder: of a saved adapter.
        folder: where to; written whole or not at all, with the tokenizer files of the adapter's folder or the base.
        base: a folder or a Hugging Face id; by default the adapter's ``base_model_name_or_path``.
        adapter_name: which adapter of a folder with several.
        dtype: of the written weights, by default the base's; for a sparse adapter the one it was trained on, which its
            fingerprints tell. The update is added at the wider of the two.
        device: to merge on.
        overwrite: replace an exported folder.
        max_shard_size: of one weights file, in bytes or as ``"5GB"``.

    Raises:
        ExportError: files that are missing or damaged, a base that does not fit or is stored quantised, a method that
            cannot be merged, a target in the way. Nothing is written then.
    """
    wanted = find_dtype(dtype)
    source = find_adapter(Path(adapter_folder), adapter_name)
    target = check_target(Path(folder), source, overwrite=overwrite)
    values = read_config(source)
    peft_type = mergeable_type(values["peft_type"], source)
    tensors = read_tensors(source)  # a damaged file is told before a large base is loaded
    name = str(base or values.get("base_model_name_or_path") or "")
    if not name:
        raise ExportError(f"{source} does not name its base model; give one (base=, --base).")
    if target == Path(name).expanduser().resolve():
        raise ExportError(f"{folder} is the base model's own folder; give another.")
    options = {"revision": None if base else values.get("revision"), **head_size(values, tensors)}
    model = _load_base(name, values, wanted, options, tensors).to(device)
    was_quantised = bool(getattr(model.config, "quantization_config", None))
    merged, layers = _merged(model, source, tensors, peft_type, name)
    if wanted is not None:
        merged.to(wanted)
    with new_folder(target) as fresh:
        # transformers would undo the conversions of a quantised checkpoint, which cannot be undone.
        merged.save_pretrained(fresh, max_shard_size=max_shard_size, save_original_format=not was_quantised)
        tokenizer = copy_tokenizer([str(source), name], fresh)
    files = len(list(target.glob("*.safetensors")))
    nbytes, kind = size_of(target, "*.safetensors"), type(merged).__name__
    return MergedExport(target, peft_type, kind, name, layers, merged.dtype, files, nbytes, bool(tokenizer))


def mergeable_type(peft_type: str, source: Path) -> str:
    if peft_type not in PeftType.__members__ or PeftType(peft_type) not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise ExportError(f"{source} has peft_type {peft_type!r}, which the installed PEFT does not know.")
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(peft_type)]
    if not hasattr(tuner, "merge_and_unload"):
        raise ExportError(f"{source} has peft_type {peft_type}, which changes no weight and cannot be merged.")
    return peft_type


# -- the base -----------------------------------------------------------------------------------------------------


def _load_base(
    name: str,
    values: dict[str, Any],
    wanted: torch.dtype | None,
    options: dict[str, Any],
    tensors: dict[str, Tensor],
) -> nn.Module:
    """The base in the wider of its own dtype and ``wanted``; for a sparse adapter in the one it was trained on."""
    from transformers import AutoConfig

    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise ExportError(f"no folder {name}; give the base model's folder or id (base=, --base).")
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ExportError(f"base model {name}: {first_line(error)} Give its folder or id (base=, --base).") from error
    quantised = bool(getattr(config, "quantization_config", None))
    if quantised and values["peft_type"] not in (OFF_PRINCIPAL, SPARSE):
        raise ExportError(
            f"base model {name} is stored quantised, and this adapter's method would round the merged weights to its "
            "grid again; give the float model that it was made from (base=, --base)."
        )
    model_class = model_class_of(config, values)
    try:
        model = model_class.from_pretrained(name, **options, dtype="auto")
        widest = None if wanted is None else torch.promote_types(model.dtype, wanted)
        if values["peft_type"] == SPARSE:
            widest = _trained_dtype(model, tensors)
        if widest not in (None, model.dtype) and not quantised:
            model = model_class.from_pretrained(name, **options, dtype=widest)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise ExportError(f"base model {name} does not load: {first_line(error)}") from error
    return model.eval()


def _trained_dtype(model: Any, tensors: dict[str, Tensor]) -> torch.dtype | None:
    """The dtype in which a sparse adapter met the base's weights, by the fingerprint of one of them.

    A checkpoint that is stored in fp32 is often trained in bf16. None where no dtype gives the adapter's bytes: loading
    it will say what does not fit.
    """
    marks = {k: v for k, v in tensors.items() if k.endswith(".princsparse_delta.base")}
    for key, mark in marks.items():
        try:
            weight = model.get_submodule(key.removeprefix(PREFIX).removesuffix(".princsparse_delta.base")).weight.data
        except AttributeError:
            return None
        return trained_dtype(weight, mark)
    return None


def head_size(values: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of labels that the adapter's own head was trained for, which the base's config does not know."""
    if values.get("task_type") not in _NEW_HEADS:
        return {}
    heads = [v for k, v in tensors.items() if re.search(r"\.(score|classifier|out_proj|qa_outputs)\.weight$", k)]
    return {"num_labels": heads[-1].shape[0]} if heads and heads[-1].dim() == 2 else {}


def model_class_of(config: Any, values: dict[str, Any]) -> Any:
    """The class the adapter names, the one of its task where that adds a head, else the base's own."""
    import transformers

    named = (values.get("auto_mapping") or {}).get("base_model_class")
    task = values.get("task_type")
    own = (getattr(config, "architectures", None) or [None])[0]
    if task in _NEW_HEADS:
        own = None
    for candidate in (named, own, TASK_CLASSES.get(task or ""), "AutoModel"):
        found = getattr(transformers, candidate, None) if candidate else None
        if found is not None:
            return found
    raise AssertionError("AutoModel exists")


# -- the adapter ----------------------------------------------------------------------------------------------------


def _merged(model: Any, source: Path, tensors: dict[str, Tensor], peft_type: str, base: str) -> tuple[Any, int]:
    """The model with the adapter in its weights, and how many layers carried it."""
    untied = _untie_adapted_embeddings(model, tensors)
    adapted = _adapt(model, source, peft_type, base)
    layers = sum(isinstance(module, BaseTunerLayer) for module in adapted.base_model.model.modules())
    try:
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ExportError(f"{source} cannot be merged: {first_line(error)}") from error
    if getattr(merged.config, "quantization_config", None):
        raise ExportError(
            f"base model {base} is stored quantised and {source} adapts some of its layers only, so that the rest "
            "would stay quantised; give the float model that it was made from (base=, --base)."
        )
    if untied:
        _tie_equal_embeddings(merged)
    return merged, layers


def _adapt(model: Any, source: Path, peft_type: str, base: str) -> PeftModel:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)].from_pretrained(str(source))
    if config.is_prompt_learning:
        raise ExportError(f"{source} has peft_type {peft_type}, which changes no weight and cannot be merged.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(model, str(source), torch_device=str(model.device))
        except (ValueError, RuntimeError, KeyError) as error:
            raise ExportError(f"{source} does not fit the base model {base}: {first_line(error)}") from error
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise ExportError(f"{source} is incomplete for the base model {base}: {warning.message}")
    return adapted


def _untie_adapted_embeddings(model: Any, tensors: dict[str, Tensor]) -> bool:
    """An adapter on one of two tied embeddings changes that one alone, so that the merged pair is no longer tied.

    Trained tokens are the exception: PEFT applies those of tied embeddings to both.
    """
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in embeddings or embeddings[0].weight is not embeddings[1].weight:
        return False
    names = [name for name, module in model.named_modules() if any(module is each for each in embeddings)]
    changed = [key for key in tensors if not key.endswith("trainable_tokens_delta")]
    if not any(key.startswith(f"{PREFIX}{name}.") for key in changed for name in names):
        return False
    embeddings[1].weight = nn.Parameter(embeddings[1].weight.detach().clone())
    _set_tied(model, False)
    return True


def _tie_equal_embeddings(model: Any) -> None:
    """Tied again where the adapter only carried a copy of both."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    if torch.equal(first.weight, last.weight):
        last.weight = first.weight
        _set_tied(model, True)


def _set_tied(model: Any, tied: bool) -> None:
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = tied


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__
