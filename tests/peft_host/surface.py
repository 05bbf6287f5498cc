"""PEFT's public surface as a table: one check per call and method, and the page that is rendered from it.

A cell makes the call and asserts what a user of LoRA expects of it, or that it is refused with an error that says why.
``python tests/peft_host/surface.py`` rewrites the table in ``docs/compatibility.md``.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the registry lives in the importable module, not in this script's own copy of it
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraModel
from transformers import PreTrainedModel

from lifecycle import config as off_config
from lifecycle import tiny as two_blocks
from lifecycle import train
from sparse_models import sparse_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->"
CELL_MODULES = ("cells_model", "cells_saving", "cells_tuner", "cells_functions", "cells_helpers")


def tiny(**sizes: Any) -> PreTrainedModel:
    """The Llama of the lifecycle tests with one block: seven layers to adapt, half the time."""
    return two_blocks(**{"layers": 1} | sizes)


def _lora(**overrides: Any) -> LoraConfig:
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**defaults | overrides)


@dataclass(frozen=True)
class Method:
    """A column of the table."""

    key: str
    title: str
    make: Callable[..., PeftConfig]
    prefix: str = "lora_"
    is_sparse: bool = False

    def config(self, **overrides: Any) -> PeftConfig:
        return self.make(**overrides)

    def fresh(self, adapter: str = "default", base: Any = None, **overrides: Any) -> PeftModel:
        """A new adapter on a tiny Llama, or on `base`; LoRA's own draw is repeatable."""
        torch.manual_seed(0)
        return peft.get_peft_model(tiny() if base is None else base, self.config(**overrides), adapter_name=adapter)

    def host(self, steps: int = 2, **overrides: Any) -> PeftModel:
        """A trained adapter, in eval mode."""
        model = self.fresh(**overrides)
        train(model, steps)
        return model

    def other_rank(self) -> dict[str, Any]:
        """Overrides for another size of adapter."""
        return {"mask": "random", "random_density": 0.3} if self.is_sparse else {"r": 6}


COLUMNS = {
    m.key: m
    for m in (
        Method("lora", "LoRA", _lora),
        Method("plain", "off-principal: plain", lambda **o: off_config("rlmo", **o)),
        Method("pissa", "off-principal: PiSSA's start", lambda **o: off_config("pissa", **o)),
        Method("projected", "off-principal: projected", lambda **o: off_config("offprincipal", **o)),
        Method("sparse", "sparse", sparse_config, "princsparse_", True),
    )
}
OFFPRINCIPAL = ("plain", "pissa", "projected")
OURS = (*OFFPRINCIPAL, "sparse")
EVERY = tuple(COLUMNS)


@dataclass(frozen=True)
class Refusal:
    """An error instead of a result. `says`: parts of the message; `reason`: what the page has."""

    error: type[Exception]
    says: tuple[str, ...]
    reason: str


Check = Callable[[Method, Path], None]


@dataclass(frozen=True)
class Entry:
    call: str
    check: Check
    refused: dict[str, Refusal] = field(default_factory=dict)
    no_use: str = ""  # why the call has no use with LoRA either: every column then shows the same error

    @property
    def group(self) -> str:
        return self.call.split(".")[0] if self.call.startswith(tuple(GROUPS)) else "functions"


GROUPS = {
    "PeftModel": "Methods and properties of `PeftModel`",
    "PeftModelForCausalLM": "Methods of `PeftModelForCausalLM` beyond those",
    "LoraModel": "Methods of the tuner, which `PeftModel` passes on",
    "functions": "Functions of `peft`, `peft.functional`, `peft.helpers`, `peft.optimizers` and `peft.utils`",
}
REGISTRY: dict[str, Entry] = {}


def check(call: str, refused: dict[str, Refusal] | None = None, no_use: str = "") -> Callable[[Check], Check]:
    """Register a function as the check of `call`, a public name with the variant of the call in parentheses."""

    def add(function: Check) -> Check:
        assert call not in REGISTRY, f"{call} is registered twice"
        REGISTRY[call] = Entry(call, function, refused or {}, no_use)
        return function

    return add


def refused_by(methods: Iterable[str], error: type[Exception], *says: str, reason: str) -> dict[str, Refusal]:
    return {method: Refusal(error, says, reason) for method in methods}


def registry() -> dict[str, Entry]:
    for name in CELL_MODULES:
        importlib.import_module(f"peft_host.{name}")
    return REGISTRY


# -- what has to be there ---------------------------------------------------------------------------------------------

# Public functions that no adapter's method can change, or that make another method's adapter.
ELSEWHERE = {
    "bloom_model_postprocess_past_key_value": "prefix tuning",
    "compose_cartridge_adapters": "cartridges",
    "initialize_kv_prefix_from_past_key_values": "cartridges",
    "initialize_kv_prefix_from_text": "cartridges",
    "prompt_embeddings_from_past_key_values": "cartridges",
    "create_arrow_model": "routes between plain LoRA adapters: export ours with `offprincipal export` first",
    "find_kappa_target_modules": "reads a bare model",
    "get_eva_state_dict": "EVA's start, which `LoraConfig(init_lora_weights='eva')` uses",
    "initialize_lora_eva_weights": "EVA's start; ours is set by `init_subspace`",
    "preprocess_loraga": "LoRA-GA's start; ours is set by `init_subspace`",
    "replace_lora_weights_loftq": "LoftQ's start; ours is set by `init_subspace`",
    "shift_tokens_right": "token ids",
}


def _methods(cls: type) -> list[str]:
    """Public methods and properties that `cls` or a PEFT class above it defines."""
    found: dict[str, None] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.split(".")[0] != "peft":
            continue
        for name, value in vars(base).items():
            public = isinstance(value, property | classmethod | staticmethod | Callable) and not inspect.isclass(value)
            if public and not name.startswith("_"):
                found[name] = None
    return list(found)


def _functions(module: Any) -> list[str]:
    names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
    found = [getattr(module, name) for name in names]
    return [f.__name__ for f in found if inspect.isfunction(f) and f.__module__.split(".")[0] == "peft"]


def public_calls() -> set[str]:
    """Every public call of the installed PEFT that the table must have, by its name there."""
    import peft.functional
    import peft.helpers
    import peft.optimizers
    import peft.utils.hotswap

    own = set(_methods(PeftModel))
    causal = [n for n, v in vars(peft.PeftModelForCausalLM).items() if not n.startswith("_") and callable(v)]
    calls = {f"PeftModel.{name}" for name in own} | {f"PeftModelForCausalLM.{name}" for name in causal}
    calls |= {f"LoraModel.{name}" for name in _methods(LoraModel)}
    hotswap = [n for n, f in vars(peft.utils.hotswap).items() if getattr(f, "__module__", "") == "peft.utils.hotswap"]
    names = {*_functions(peft), *_functions(peft.functional), *_functions(peft.optimizers)}
    names |= {n for n in _functions(peft.helpers) if getattr(peft.helpers, n).__module__ == "peft.helpers"}
    names |= {n for n in hotswap if not n.startswith("_")}
    classes = {n for n in vars(peft) if n.startswith("AutoPeftModel")} & {"AutoPeftModelForCausalLM"}
    return calls | (names - set(ELSEWHERE)) | {f"{n}.from_pretrained" for n in classes} | {"PeftMixedModel"}


# -- the page ---------------------------------------------------------------------------------------------------------


def render() -> str:
    """The tables, one per group, in the order of registration."""
    lines: list[str] = []
    for group, title in GROUPS.items():
        rows = [entry for entry in registry().values() if entry.group == group]
        lines += [f"### {title}", "", "| call | " + " | ".join(m.title for m in COLUMNS.values()) + " |"]
        lines.append("|---" * (len(COLUMNS) + 1) + "|")
        lines += [_row(entry) for entry in rows]
        lines.append("")
    lines += ["### Not in the tables", "", "| function | why |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, why in ELSEWHERE.items()]
    return "\n".join([*lines, ""])


def _row(entry: Entry) -> str:
    name = entry.call if entry.group == "functions" else entry.call.partition(".")[2]
    cells = []
    for key in COLUMNS:
        refusal = entry.refused.get(key)
        cells.append(
            f"– ({entry.no_use})" if entry.no_use else "✓" if refusal is None else f"refused: {refusal.reason}"
        )
    return f"| `{name}` | " + " | ".join(cells) + " |"


def with_table(page: str) -> str:
    """`page` with its table rendered anew."""
    head, found, rest = page.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    assert found and closed, f"the page needs the lines {BEGIN.strip()} and {END}"
    return head + BEGIN + "\n" + render() + "\n" + END + tail


if __name__ == "__main__":
    from peft_host import surface  # type: ignore[import-not-found]

    PAGE.write_text(surface.with_table(PAGE.read_text()))
    print(f"wrote {PAGE}")
