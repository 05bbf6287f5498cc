"""An adapted model without values: which weights of a base an adapter changes, and each adapted layer on its own.

The model is built from its config with parameters that take no memory, PEFT puts the adapter's layers in and names
their tensors, and no weight is read. See :mod:`.layer_merge` for what is then done with one of them.

The empty parameters are one NaN in a model's shape, not on the meta device: PEFT moves adapters to their base's device.
A method that reads the base's values while it is put in meets NaN and fails, instead of starting from wrong values.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..audit.checkpoints import Checkpoint
from ..audit.headers import CheckpointError
from ..audit.pairing import PREFIXES
from ..tuners.principal_sparse.layer import PrincipalSparseLinear
from .adapter_source import PREFIX

ADAPTER = "default"  # its name in here, whatever the folder's is


@dataclass(frozen=True)
class Unit:
    """One adapted module.

    Attributes:
        name: in the bare model.
        module: PEFT's layer or wrapper, without the base's values and without those of ``stored``.
        base: path of each of the base's own parameters in ``module`` -> its name in the bare model.
        stored: path of a tensor in ``module`` -> its key in the adapter's file.
    """

    name: str
    module: nn.Module
    base: dict[str, str]
    stored: dict[str, str]

    @property
    def is_saved_whole(self) -> bool:
        return isinstance(self.module, ModulesToSaveWrapper)


@dataclass(frozen=True)
class Skeleton:
    """What an adapter does to a base.

    Attributes:
        units: by name.
        whole: name of a parameter in the bare model -> key of the tensor in the adapter's file that takes its place.
        files: name of a parameter in the bare model -> name of the tensor in the base's files that it is loaded from.
        ties: name of a parameter -> the names that it has, more than one where modules share it.
        converted: name of a parameter that several tensors of the base's files are put together into -> one of them.
        followers: name of a parameter whose module only follows another one's trained tokens -> that one's parameter.
    """

    units: dict[str, Unit]
    whole: dict[str, str]
    files: dict[str, str]
    ties: dict[str, list[str]]
    converted: dict[str, str]
    followers: dict[str, str]

    def source_of(self, name: str) -> str | None:
        """The tensor of the base's files that a parameter's values come from, directly or by a tie."""
        return next((self.files[other] for other in self.ties[name] if other in self.files), None)


def build_skeleton(
    model_class: Any, model_config: Any, config: Any, tensors: Mapping[str, Tensor], base: Checkpoint
) -> Skeleton:
    """Put an adapter into an empty model and find what it changes.

    Args:
        model_class: of transformers, with or without Auto in its name.
        model_config: of the base.
        config: of the adapter.
        tensors: of the adapter; only the few that belong to no layer are read.
        base: whose names and shapes are compared with the model's.

    Raises:
        CheckpointError: tensors that have no place in the model, or places without a tensor.
        ValueError, RuntimeError, KeyError and others: what transformers and PEFT raise.
    """
    sparse = config.peft_type == "PRINCIPAL_SPARSE"
    with torch.device("meta"):
        build = getattr(model_class, "from_config", None) or model_class._from_config
        model = build(copy.deepcopy(model_config), dtype=_sparse_dtype(config, tensors) if sparse else torch.float32)
    if not sparse:  # whose layers refuse weights that are not contiguous, and take a meta weight's values later
        _make_hollow(model)
    files, converted = _file_names(model, base)
    owners: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        owners.setdefault(id(parameter), []).append(name)
    ties = {name: owners[id(parameter)] for name, parameter in parameters.items()}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # what they say of a loaded model does not apply
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        adapted = kind(model, config, ADAPTER, autocast_adapter_dtype=False, low_cpu_mem_usage=True).eval()
        found = _placed(adapted, tensors)
    units, paths = _units(adapted.base_model.model, owners)
    followers = _take_followers(units)
    whole = _distribute(adapted, units, paths, found, tensors)
    if not units and not whole:
        raise CheckpointError("the adapter changes no weight of the model.")
    return Skeleton(units, whole, files, ties, converted, followers)


def _sparse_dtype(config: Any, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Of a base that the values of a sparse adapter were trained on, as far as they tell."""
    if config.precision != "fp32":
        return torch.bfloat16
    values = (value for key, value in tensors.items() if key.endswith(".princsparse_delta.weight"))
    return next((value.dtype for value in values), torch.float32)


def _make_hollow(model: nn.Module) -> None:
    """Give every parameter one NaN on the CPU in its whole shape; shared ones stay shared, copies hold nothing."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # with the old one, so that no id is used again
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                new = nn.Parameter(torch.full((), torch.nan).expand(old.shape), requires_grad=False)
                new.__dict__["__deepcopy__"] = lambda memo, shape=old.shape: _empty(shape)
                made[id(old)] = (old, new)
            module._parameters[name] = made[id(old)][1]


def _empty(shape: torch.Size) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


# -- names of the base's files --------------------------------------------------------------------------------------


def _file_names(model: Any, base: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """Parameter -> the tensor of the base's files that transformers loads it from; and those that are put together.

    Files may have wrappers' prefixes, which are taken off where more tensors find their place without.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    known = model.state_dict()
    best: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for chain in _chains(base.tensors):
        names, converted = {}, {}
        for file_name, info in base.tensors.items():
            bare = file_name.removeprefix(chain)
            name, source = rename_source_key(bare, renamings, converters, model.base_model_prefix, known)
            if name not in known and bare in known:
                name, source = bare, None
            if source is not None:
                converted[name] = file_name
            elif name in known and tuple(known[name].shape) == info.shape:
                names[name] = file_name
        if len(names) > len(best[0]):
            best = names, converted
    if not best[0]:
        raise CheckpointError(
            f"no tensor of {base.path} has a name and shape of {type(model).__name__}'s: it holds "
            f"{', '.join(list(base.tensors)[:3])}, the model {', '.join(list(known)[:3])}."
        )
    return best


def _chains(names: Iterable[str]) -> list[str]:
    """Every run of known prefixes that some name begins with, the empty one first."""
    names = list(names)
    found = [""]
    for chain in found:  # it grows while it is walked
        longer = [chain + prefix for prefix in PREFIXES]
        found += [each for each in longer if each not in found and any(name.startswith(each) for name in names)]
    return found


# -- the adapter's tensors ------------------------------------------------------------------------------------------


def _placed(adapted: PeftModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors under their names in the adapted model, as PEFT would load them; nothing is loaded."""
    found: dict[str, Tensor] = {}

    def take(state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> _IncompatibleKeys:
        found.update(state_dict)
        return _IncompatibleKeys([], [])

    sparse = [module for module in adapted.modules() if isinstance(module, PrincipalSparseLinear)]
    adapted.__dict__["load_state_dict"] = take
    for layer in sparse:  # each is checked when it has its base's values
        layer.__dict__["vet"] = lambda *args: None
    try:
        set_peft_model_state_dict(adapted, dict(tensors), ADAPTER, low_cpu_mem_usage=True)
    except KeyError as error:
        raise CheckpointError(f"the adapter is incomplete, it lacks {error.args[0]}.") from error
    finally:
        del adapted.__dict__["load_state_dict"]
        for layer in sparse:
            del layer.__dict__["vet"]
    return found


def _units(model: nn.Module, owners: dict[int, list[str]]) -> tuple[dict[str, Unit], dict[str, str]]:
    """The outermost adapted modules; and the paths of the base's parameters in the adapted model -> their names."""
    units: dict[str, Unit] = {}
    paths: dict[str, str] = {}
    for name, module in model.named_modules():
        is_unit = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        if is_unit and not any(name.startswith(f"{other}.") for other in units):
            base = {}
            for path, parameter in module.named_parameters(remove_duplicate=False):
                own = [each for each in owners.get(id(parameter), []) if each.startswith(f"{name}.")]
                if own:
                    base[path] = own[0]
            units[name] = Unit(name, module, base, {})
            paths |= {f"{name}.{path}": own for path, own in base.items()}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if path not in paths and path in owners.get(id(parameter), []):
            paths[path] = path
    return units, paths


def _take_followers(units: dict[str, Unit]) -> dict[str, str]:
    """Take out the modules that follow another one's trained tokens: PEFT gives both of two tied embeddings one."""
    leaders = {id(u.module.token_adapter): u for u in units.values() if isinstance(u.module, TrainableTokensWrapper)}
    followers: dict[str, str] = {}
    for unit in list(units.values()):
        tied = getattr(getattr(unit.module, "token_adapter", None), "tied_adapter", None)
        if tied is not None:
            (followed,) = leaders[id(tied)].base.values()
            followers |= dict.fromkeys(unit.base.values(), followed)
            del units[unit.name]
    return followers


def _distribute(
    adapted: PeftModel,
    units: dict[str, Unit],
    paths: dict[str, str],
    found: dict[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> dict[str, str]:
    """Note in each unit where its tensors are; what takes a base parameter's place: its name -> the adapter's key."""
    own: dict[str, Tensor] = dict(adapted.named_buffers(remove_duplicate=False))
    own |= dict(adapted.named_parameters(remove_duplicate=False))
    keys = {id(tensor): key for key, tensor in tensors.items()}
    whole: dict[str, str] = {}
    at_once: dict[str, Tensor] = {}
    strange = []
    for place, tensor in found.items():
        path = place.removeprefix(PREFIX)
        unit = next((unit for unit in units.values() if path.startswith(f"{unit.name}.")), None)
        inner = "" if unit is None else path[len(unit.name) + 1 :]
        sparse = unit is not None and isinstance(unit.module, PrincipalSparseLinear) and path not in paths
        key = keys.get(id(tensor))
        if not sparse and place not in own:
            strange.append(key or place)
            continue
        if path in paths and key is not None:
            whole[paths[path]] = key
            continue
        if not sparse and not (unit and unit.is_saved_whole) and own[place].shape != tensor.shape:
            raise CheckpointError(
                f"the adapter's {key or place} has shape {tuple(tensor.shape)}, the model needs "
                f"{tuple(own[place].shape)}."
            )
        if unit is None or key is None:
            at_once[place] = tensor
        elif unit.is_saved_whole:
            whole[f"{unit.name}.{inner.removeprefix(f'modules_to_save.{ADAPTER}.')}"] = key
        else:
            unit.stored[inner] = key
    if strange:
        raise CheckpointError(
            f"{len(strange)} of the adapter's {len(tensors)} tensors have no place in the model, the first is "
            f"{strange[0]}: it was made for another model."
        )
    _load_now(adapted, at_once, own)
    _check_complete(units, own, found)
    return whole


def _load_now(adapted: PeftModel, values: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Tensors that no single layer owns, or that PEFT computes from several: they stay in memory."""
    real = {place: value for place, value in values.items() if not own[place].is_meta}
    with torch.no_grad():
        for place, value in real.items():  # in place, since layers share them
            own[place].copy_(value)
    adapted.load_state_dict({k: v for k, v in values.items() if k not in real}, strict=False, assign=True)


def _check_complete(units: dict[str, Unit], own: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for unit in units.values():
        if isinstance(unit.module, PrincipalSparseLinear):
            continue
        for path, value in unit.module.named_parameters(remove_duplicate=False):
            if value.is_meta and path not in unit.base and f"{PREFIX}{unit.name}.{path}" not in found:
                raise CheckpointError(f"the adapter is incomplete, it has no tensor for {unit.name}.{path}.")
