"""Make a third-party method a full member of PEFT's registry.

PEFT looks a method up by its :class:`~peft.PeftType` member, an enum that offers no extension point; a plain string
does not do, because hotswapping, saving and the transformers integration read ``.value``. The member is therefore
built by hand. The trade-off: this reaches into ``enum`` internals, in one place, with a test that every use of the
member (lookup by name and value, iteration, pickle, deepcopy, JSON) works.
"""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import hotswap, register_peft_method

_HOTSWAP_KEYS = [
    "use_rslora",
    "lora_dropout",
    "alpha_pattern",
    "principal_rank",
    "projection",
    "train_factors",
    # the layers' record of where they started is the config's, and the next adapter copies it
    "init_subspace",
    "init_source",
    "geora_rho",
    "init_scale",
    "init_factors",
    "seed",
]


def extend_peft_type(name: str) -> PeftType:
    """Return the member ``name`` of :class:`~peft.PeftType`, adding it first where it does not exist.

    ``name`` is upper case and becomes both the member's name and its value.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def register(name: str, config_cls: type, model_cls: Any, *, hotswap_like_lora: bool = False) -> PeftType:
    """Register a method with PEFT under lower-case ``name``; repeating it (a reload) replaces our own entry.

    Raises ``KeyError`` where another package already holds the name.
    """
    peft_type = extend_peft_type(name.upper())
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if known is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    elif (known.__module__, known.__qualname__) == (config_cls.__module__, config_cls.__qualname__):
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
        PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_cls.prefix
    else:
        raise KeyError(
            f"PEFT already has a method {name!r}, registered by {known.__module__}.{known.__qualname__}; "
            f"{config_cls.__module__}.{config_cls.__qualname__} cannot take its place."
        )
    if hotswap_like_lora:
        hotswap.CONFIG_KEYS_TO_CHECK[peft_type] = list(_HOTSWAP_KEYS)
    return peft_type
