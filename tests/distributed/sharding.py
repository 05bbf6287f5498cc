"""How models are sharded here, what is refused then, and what accelerate's own preparation for FSDP2 makes of them.

accelerate switches FSDP off on CPUs without a word, so its function that shards a model is called directly, with its
own plugin, and what comes out must be DTensors.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distributed.cases import CASES, batches, optimizer, part, train
from sparse_models import sparse_config, sparse_layers


def shard(host: PeftModel) -> PeftModel:
    """Whole blocks, then the rest, as FSDP2 is used."""
    model: Any = host.get_base_model()
    for block in model.model.layers if hasattr(model, "model") else model.transformer.h:
        fully_shard(block)
    sharded: PeftModel = fully_shard(host)
    return sharded


def told(call: Callable[[], Any]) -> str:
    """The error that a call raises, or ``"passed"`` and what it returned."""
    try:
        found = call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"passed: {found}"


def run(host: PeftModel) -> float:
    with torch.no_grad():
        return float(host(input_ids=batches()[0], labels=batches()[0]).loss)


def refusals(rank: int) -> dict[str, Callable[[], Any]]:
    """Calls that must fail on every rank; none of them has communicated more on one rank than on another."""

    def written() -> None:
        host = CASES["packed"].adapted()
        train(host, optimizer("sgd", host))
        run(host)
        run(shard(host))

    def small_units(name: str, unit: str) -> None:
        host = CASES[name].adapted()
        for path, module in host.named_modules():
            if path.endswith(unit):
                fully_shard(module)
        run(fully_shard(host))

    def other_mask() -> None:
        other = get_peft_model(CASES["packed"].base(), sparse_config(mask="random"))
        set_peft_model_state_dict(shard(CASES["packed"].adapted()), get_peft_model_state_dict(other))

    def loaded_base() -> None:
        host = shard(CASES["packed"].adapted())
        state = host.state_dict()
        key = next(k for k in state if k.endswith("q_proj.base_layer.weight"))
        host.load_state_dict({**state, key: state[key] + 1.0})

    return {
        "split": lambda: run(shard(CASES["split"].adapted())),
        "written before": written,
        "second sparse adapter": lambda: shard(CASES["packed"].adapted()).add_adapter("b", sparse_config()),
        "second projected adapter": lambda: shard(CASES["projected"].adapted()).add_adapter(
            "b", CASES["projected"].config()
        ),
        "merged sparse": lambda: shard(CASES["packed"].adapted()).merge_adapter(),
        "merged projected": lambda: shard(CASES["projected"].adapted()).merge_adapter(),
        "safe merge": lambda: next(iter(sparse_layers(shard(CASES["packed"].adapted())).values())).merge(
            safe_merge=True
        ),
        "sparse units": lambda: small_units("packed", "q_proj.base_layer"),
        "projected units": lambda: small_units("projected", "lora_A.default"),
        "other mask": other_mask,
        "other base": loaded_base,
    }


def prepared(rank: int, host: PeftModel, mixed_precision: str = "no", **options: Any) -> PeftModel:
    """A model as ``accelerator.prepare`` makes it of one under FSDP2 on GPUs."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True,
        **{"cpu_ram_efficient_loading": False} | options,
    )
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision=mixed_precision,
        is_main_process=rank == 0,
        device=torch.device("cpu"),
    )
    sharded: PeftModel = fsdp2_prepare_model(accelerator, host)
    return sharded


BASES = r".*\.lora_basis_[UV]\..*"


def accelerates(rank: int) -> dict[str, Callable[[], Any]]:
    """What each returns where it passes: how many parameters are whole, and the difference of losses to one process."""

    def trained(name: str, *arguments: Any, **options: Any) -> list[float]:
        host, alone = CASES[name].adapted(), CASES[name].adapted()
        host = prepared(rank, host, *arguments, **options)
        whole = [n for n, p in host.named_parameters() if not isinstance(p, DTensor)]
        found = train(host, optimizer("sgd", host), lambda batch: part(batch, 0))  # the same half on both ranks
        expected = train(alone, optimizer("sgd", alone), lambda batch: part(batch, 0))
        frozen = [n for n, p in host.named_parameters() if p.requires_grad and ("start" in n or "basis" in n)]
        assert not frozen, f"trained: {frozen}"
        return [len(whole), max(abs(a - b) for a, b in zip(found, expected, strict=True)), expected[0] - expected[-1]]

    def after_training() -> float:
        """A base weight that holds values is given its own back: accelerate asks for a state dict first."""
        host = CASES["packed"].adapted()
        train(host, optimizer("sgd", host))
        before = run(host)
        assert any(layer.written for layer in sparse_layers(host).values())
        return abs(run(prepared(rank, host)) - before)

    return {
        "packed, after training": after_training,
        "projected": lambda: trained("projected"),
        "pissa": lambda: trained("pissa"),
        "packed": lambda: trained("packed"),
        "dense": lambda: trained("dense"),
        "projected, rank 0 loads": lambda: trained("projected", cpu_ram_efficient_loading=True),
        "packed, rank 0 loads": lambda: trained("packed", cpu_ram_efficient_loading=True),
        "projected, bf16": lambda: trained("projected", "bf16"),
        "projected, bf16, bases whole": lambda: trained("projected", "bf16", ignored_modules=BASES),
        "pissa, bf16": lambda: trained("pissa", "bf16"),
        "packed, bf16": lambda: trained("packed", "bf16"),
    }
