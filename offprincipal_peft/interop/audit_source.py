"""A base with any PEFT adapter merged into it, read as a checkpoint: each layer is merged when it is asked for.

Memory: the names of everything, and one adapted layer. The adapter's own tensors are read layer by layer too; what
layers share (VeRA's projections, say) stays in memory.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType
from torch import Tensor

from ..audit.checkpoints import Checkpoint, open_checkpoint
from ..audit.headers import CheckpointError, TensorInfo, read_header
from ..tuners.offprincipal_lora.config import PEFT_TYPE_NAME as OFF_PRINCIPAL
from ..tuners.principal_sparse.config import PEFT_TYPE_NAME as SPARSE
from ..tuners.principal_sparse.layer import PrincipalSparseLinear
from ..tuners.principal_sparse.plan import trained_dtype
from .adapter_skeleton import Skeleton, Unit, build_skeleton
from .folders import ExportError, find_adapter, read_config, read_tensors
from .layer_merge import merge_sparse, merge_unit
from .merged_export import TASK_CLASSES, first_line, head_size, mergeable_type, model_class_of

# Methods whose merge needs one layer, its base weight and its saved tensors; each was compared with PEFT's own merge.
_WEIGHTS_ONLY = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA", "SHIRA", OFF_PRINCIPAL, SPARSE)
_BIASES_TOO = (
    *("BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "MISS", "OFT"),
    *("PEANUT", "PVERA", "RANDLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "WAVEFT"),
)
# LoRA's starts that change the base weight: those that PEFT makes again when it loads the adapter, and the others.
_MADE_AGAIN = ("pissa", "olora")
_LOST = ("pissa_niter", "corda", "loftq", "lora_ga")
_OTHERWISE = (
    "Merge it into its base (offprincipal export ADAPTER OUT --as merged, or PEFT's merge_and_unload and "
    "save_pretrained) and give that folder."
)
_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def open_adapter(
    folder: str | Path,
    base: Checkpoint | str | Path,
    *,
    adapter_name: str = "default",
    base_config: str | Path | None = None,
) -> MergedCheckpoint:
    """Open a base with a saved PEFT adapter merged into it. Reads headers, and merges the smallest adapted layer.

    Args:
        folder: of the adapter.
        base: that it was trained on, in float; its files are opened again, so that it may be closed.
        adapter_name: which adapter of a folder with several.
        base_config: the folder of the base's ``config.json``, where it does not lie beside the weights.

    Raises:
        CheckpointError: files that are missing or damaged; a base that the adapter does not fit, that is stored
            quantised, or whose model transformers does not know; a method that does not change weights, or that
            cannot be merged layer by layer. Reading raises it where a sparse adapter was trained on other bytes.
    """
    opened = open_checkpoint(base.path if isinstance(base, Checkpoint) else base)
    try:
        source = find_adapter(Path(folder).expanduser(), adapter_name)
        values = read_config(source)
        mergeable_type(values["peft_type"], source)
        tensors = read_tensors(source)  # mapped: not in memory yet
    except ExportError as error:
        raise CheckpointError(str(error)) from error
    _check_method(values, source)
    if opened.config.quantized_by:
        raise CheckpointError(
            f"{opened.path} is stored quantised ({opened.config.quantized_by}); give the float model that it was made "
            "from."
        )
    config, restart = _adapter_config(values, source)
    skeleton = _fitting_skeleton(source, values, config, tensors, opened, base_config)
    merged = MergedCheckpoint(source, opened, skeleton, _changes_biases(values), restart)
    merged.probe()
    return merged


class MergedCheckpoint(Checkpoint):
    """The tensors of a base under the base's names, those that an adapter changes with the adapter merged.

    A merged weight is fp32 (fp64 for an fp64 base): W0 + dW before any rounding. A tensor that the adapter holds whole
    (``modules_to_save``, saved embeddings, trained biases) has the dtype that it is saved in, all others that of the
    base. A tensor that the base's files lack (a new head, an output layer that was tied and is adapted alone) is listed
    under its name in the model. Made by :func:`open_adapter`.
    """

    def __init__(self, source: Path, base: Checkpoint, skeleton: Skeleton, biases: bool, restart: Any) -> None:
        self._skeleton, self._restart = skeleton, restart
        self._stored = read_header(source / SAFETENSORS_WEIGHTS_NAME)
        self._base = base.tensors
        self._whole = {skeleton.files.get(name, name): self._stored[key] for name, key in skeleton.whole.items()}
        self._units: dict[str, tuple[Unit, str]] = {}  # file's name -> who makes it, its name in the model
        self._held: dict[str, Tensor] = {}  # of the last merged unit, by their names in the model
        tensors = dict(base.tensors)
        tensors |= {name: dataclasses.replace(info, name=name) for name, info in self._whole.items()}
        for unit, name, file_name in _changed(skeleton, biases):
            tensors[file_name] = self._merged_info(source, name, file_name)
            self._units[file_name] = unit, name
            self._whole.pop(file_name, None)
        super().__init__(source, tensors, base.config)

    @property
    def adapted(self) -> frozenset[str]:
        """The names of the tensors that are not the base's own."""
        return frozenset((*self._whole, *self._units))

    def probe(self) -> None:
        """Merge the smallest adapted weight, so that what cannot be merged is told before an audit begins."""
        if self._units:
            self.read(min(self._units, key=lambda name: self.tensors[name].nbytes))

    def close(self) -> None:
        super().close()
        self._held = {}

    def _read(self, info: TensorInfo, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        if info.name not in self._units:
            return super()._read(self._whole.get(info.name, info), start, stop, into)
        if self._closed:
            raise CheckpointError(f"{self.path} was closed; open it again.")
        unit, name = self._units[info.name]
        if name not in self._held:
            self._held = {}  # freed before the next one is made
            self._held = self._merge(unit)
        if into is not None:
            return into[: stop - start].copy_(self._held[name].view(-1)[start:stop])
        if stop - start == info.numel:
            return self._held.pop(name).view(-1)  # given away, so that there is no second copy
        return self._held[name].view(-1)[start:stop].clone()

    # -- merging ------------------------------------------------------------------------------------------------------

    def _merged_info(self, source: Path, name: str, file_name: str) -> TensorInfo:
        info = self._source_info(source, name)
        if info.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise CheckpointError(f"{source} changes {name}, which {info.file} stores as {info.stored}. {_OTHERWISE}")
        wide = torch.promote_types(info.dtype, torch.float32)
        stored = "F64" if wide == torch.float64 else "F32"
        place = source / SAFETENSORS_WEIGHTS_NAME
        return TensorInfo(file_name, info.shape, wide, info.numel * wide.itemsize, place, 0, stored)

    def _source_info(self, source: Path, name: str) -> TensorInfo:
        """Where the value of a parameter is before the merge."""
        if name in self._skeleton.whole:
            return self._stored[self._skeleton.whole[name]]
        found = self._skeleton.source_of(name)
        if found is None:
            part = self._skeleton.converted.get(name)
            why = (
                f"transformers makes it of several tensors of the base ({part} is one)"
                if part
                else ("the base's files hold no tensor of that name and shape")
            )
            raise CheckpointError(f"{source} changes {name}, but {why}. {_OTHERWISE}")
        return self._base[found]

    def _base_value(self, name: str) -> Tensor:
        info = self._source_info(self.path, name)
        return super()._read(info, 0, info.numel).view(info.shape)

    def _stored_tensor(self, key: str) -> Tensor:
        info = self._stored[key]
        return super()._read(info, 0, info.numel).view(info.shape)

    def _merge(self, unit: Unit) -> dict[str, Tensor]:
        stored = {path: self._stored_tensor(key) for path, key in unit.stored.items()}
        try:
            if isinstance(unit.module, PrincipalSparseLinear):
                return self._merge_sparse(unit, stored)
            base = {path: _widened(self._base_value(name)) for path, name in unit.base.items()}
            was_finite = _are_finite(base) and _are_finite(stored)
            merged = merge_unit(unit, base, stored, self._restart)
        except CheckpointError:
            raise
        except _FAULTS as error:
            raise CheckpointError(f"{self.path} cannot be merged: {first_line(error)} {_OTHERWISE}") from error
        if was_finite and not _are_finite(merged) and any(tensor.isnan().any() for tensor in merged.values()):
            raise CheckpointError(  # the NaN of the empty model: see adapter_skeleton
                f"{self.path}: its method computes {unit.name} from more of the base than that layer. {_OTHERWISE}"
            )
        return {name: tensor.contiguous() for name, tensor in merged.items()}

    def _merge_sparse(self, unit: Unit, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        (name,) = (name for name in unit.base.values() if name.endswith(".weight"))
        weight = self._base_value(name)
        marks = [value for path, value in stored.items() if path.endswith(".base")]
        dtype = trained_dtype(weight, marks[0]) if marks else weight.dtype
        return {name: merge_sparse(unit, weight, weight.to(dtype or weight.dtype), stored)}  # None: it is refused there


def _widened(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _are_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every sum is, which takes no memory; False may also mean that one overflows."""
    return all(bool(tensor.sum().isfinite()) for tensor in tensors.values())


def _changed(skeleton: Skeleton, biases: bool) -> Iterator[tuple[Unit, str, str]]:
    """Every parameter that a merge changes: who makes it, its name in the model, the name that it is listed under."""
    makers = {}
    for unit in skeleton.units.values():
        for name in unit.base.values():
            if not unit.is_saved_whole and (biases or not name.endswith("bias")):
                makers[name] = unit
                yield unit, name, skeleton.files.get(name, name)
    for name, followed in skeleton.followers.items():
        if name in skeleton.files:  # the files hold a copy of what the model ties
            yield makers[followed], followed, skeleton.files[name]


# -- what can be merged -----------------------------------------------------------------------------------------------


def _check_method(values: dict[str, Any], source: Path) -> None:
    kind = values["peft_type"]
    if kind not in (*_WEIGHTS_ONLY, *_BIASES_TOO):
        raise CheckpointError(
            f"{source} has peft_type {kind}, which is not known to merge layer by layer. {_OTHERWISE}"
        )
    if values.get("layer_replication"):
        raise CheckpointError(
            f"{source} replicates layers (layer_replication): no weight of the base is its. {_OTHERWISE}"
        )
    if values.get("monteclora_config"):
        raise CheckpointError(
            f"{source} holds samplers (monteclora_config), which PEFT makes only when the model runs. {_OTHERWISE}"
        )
    start = str(values.get("init_lora_weights")).lower()
    if kind == "LORA" and start.startswith(_LOST):
        raise CheckpointError(
            f"{source} was trained on a base weight that its start had changed (init_lora_weights={start!r}), and the "
            "start cannot be made again. Save the adapter converted (save_pretrained with "
            "path_initial_model_for_weight_conversion), or the merged model, and give that folder."
        )


def _changes_biases(values: dict[str, Any]) -> bool:
    return values["peft_type"] in _BIASES_TOO or bool(values.get("lora_bias"))


def _adapter_config(values: dict[str, Any], source: Path) -> tuple[Any, Any]:
    """The config for a model without values; and the real one where each layer's start has to be made again."""
    try:
        config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(values["peft_type"])].from_pretrained(str(source))
    except _FAULTS as error:
        raise CheckpointError(f"{source}: the config is not valid: {first_line(error)}") from error
    config.inference_mode = True
    start = getattr(config, "init_lora_weights", None)
    if values["peft_type"] != "LORA" or not isinstance(start, str):
        return config, None
    plain = copy.copy(config)
    plain.init_lora_weights = True  # values follow
    return plain, config if start.lower().startswith(_MADE_AGAIN) else None


def _fitting_skeleton(
    source: Path,
    values: dict[str, Any],
    config: Any,
    tensors: dict[str, Tensor],
    base: Checkpoint,
    base_config: str | Path | None,
) -> Skeleton:
    """Of the model class that the adapter or the base names, else of the first that the adapter fits."""
    import transformers

    beside = base.path if base.path.is_dir() else base.path.parent
    place = beside if base_config is None else Path(base_config).expanduser()
    try:
        model_config = transformers.AutoConfig.from_pretrained(str(place), **head_size(values, tensors))
    except _FAULTS as error:
        what = first_line(error) if (place / "config.json").is_file() else f"{place} holds no config.json"
        raise CheckpointError(
            f"{source} is merged into the model of its base's config.json, which transformers has to know: {what}. "
            f"{_OTHERWISE}"
        ) from error
    architectures = getattr(model_config, "architectures", None) or []
    others = (*architectures, TASK_CLASSES.get(values.get("task_type") or ""), "AutoModelForCausalLM", "AutoModel")
    candidates = [model_class_of(model_config, values)]
    candidates += [getattr(transformers, name, None) for name in others if name]
    faults = []
    for candidate in dict.fromkeys(each for each in candidates if each is not None):
        try:
            return build_skeleton(candidate, model_config, copy.deepcopy(config), tensors, base)
        except _FAULTS as error:  # the next class may have the names
            faults.append(error)
    raise CheckpointError(f"{source} does not fit {base.path}: {first_line(faults[0])}") from faults[0]
