"""What two ranks do with DDP and FSDP2; the tests compare it with one process."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distributed.cases import CASES, LOADED, UNDER_DDP, UNDER_FSDP, batches, optimizer, part, train
from distributed.sharding import accelerates, refusals, shard, told
from helpers import base_bytes
from offprincipal_peft.tuners.ranks import check_same_on_every_rank
from sparse_models import sparse_config, sparse_layers

FULL = StateDictOptions(full_state_dict=True)
# What accelerator.get_state_dict, and so a Trainer's checkpoint, asks for under FSDP2.
ACCELERATES = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)


def mean_over_ranks(losses: list[float]) -> list[float]:
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def all_checks(rank: int, folder: Path) -> dict[str, Any]:
    return {
        "ddp": {f"{name}/{by}": ddp(rank, folder, name, by) for name, by in UNDER_DDP},
        "fsdp": {f"{name}/{by}": fsdp(rank, folder, name, by) for name, by in UNDER_FSDP},
        "loaded": {name: loaded(rank, folder, name) for name in LOADED},
        "resumed": {name: resumed(rank, name) for name in ("projected", "packed", "dense")},
        "refusals": {name: told(refuse) for name, refuse in refusals(rank).items()},
        "accelerate": {name: told(call) for name, call in accelerates(rank).items()},
        "planted": planted(rank),
    }


# -- training ------------------------------------------------------------------------------------------------------


def ddp(rank: int, folder: Path, name: str, by: str) -> dict[str, Any]:
    """Train through accelerate; rank 0 saves the adapter."""
    host = CASES[name].adapted()
    accelerator = Accelerator(cpu=True)
    wrapped, optimiser = accelerator.prepare(host, optimizer(by, host))
    assert isinstance(wrapped, DistributedDataParallel), type(wrapped)
    losses = train(wrapped, optimiser, lambda batch: part(batch, rank), accelerator.backward)
    found = {"losses": mean_over_ranks(losses), "compared": check_same_on_every_rank(host)}
    inner = accelerator.unwrap_model(wrapped)
    if accelerator.is_main_process:
        inner.save_pretrained(folder / "ddp" / f"{name}-{by}")
    with inner.disable_adapter():
        found["base"] = base_bytes(inner)
    return {**found, "adapter": digests(inner)}


def fsdp(rank: int, folder: Path, name: str, by: str) -> dict[str, Any]:
    """Train with fully_shard; every rank gathers the whole state, rank 0 saves the adapter in PEFT's form."""
    host = CASES[name].adapted()
    plain = base_bytes(host)
    compared = check_same_on_every_rank(host)
    shard(host)
    whole = [n for n, p in host.named_parameters() if not isinstance(p, DTensor)]
    optimiser = optimizer(by, host)
    losses = mean_over_ranks(train(host, optimiser, lambda batch: part(batch, rank)))
    moments = [v for s in optimiser.state.values() for k, v in s.items() if k.startswith("exp_avg")]
    state = get_model_state_dict(host, options=FULL)
    if rank == 0:
        host.save_pretrained(folder / "fsdp" / f"{name}-{by}", state_dict=state)
    as_accelerate = get_model_state_dict(host, options=ACCELERATES)  # empty on the other ranks
    return {
        "losses": losses,
        "compared": compared,
        "accelerate_differs": [k for k, v in as_accelerate.items() if not torch.equal(v, state[k])],
        "accelerate_has": len(as_accelerate) - len(state),
        "whole": whole,
        "sharded_moments": [isinstance(m, DTensor) for m in moments],
        "base": plain,
        "base_after": base_after(plain, state),
        "adapter": {k: fingerprint(v) for k, v in get_peft_model_state_dict(host, state_dict=state).items()},
    }


def base_after(names: dict[str, str], state: dict[str, Tensor]) -> dict[str, str]:
    """Hashes of the base's tensors in a whole state dict, by the names that `base_bytes` gives them."""

    plain = {key.removeprefix("base_model.model.").replace(".base_layer.", "."): value for key, value in state.items()}
    return {name: fingerprint(value) for name, value in plain.items() if name in names}


def digests(host: PeftModel) -> dict[str, str]:
    """A hash for every tensor that a saved adapter would hold."""
    return {key: fingerprint(value) for key, value in get_peft_model_state_dict(host).items()}


def fingerprint(tensor: Tensor) -> str:
    bag = torch.nn.Module()
    bag.register_buffer("value", tensor.detach().clone())
    return base_bytes(bag)["value"]


# -- loading ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def loaded(rank: int, folder: Path, name: str) -> dict[str, Any]:
    """An adapter that one process saved, in two: under DDP and sharded; the largest difference of the logits."""
    expected = load_file(folder / "one" / f"{name}.safetensors")["logits"]
    ids = batches()[0]
    under_ddp = DistributedDataParallel(CASES[name].load(folder / "one" / name)).eval()
    found = {"ddp": float((under_ddp(input_ids=ids).logits - expected).abs().max())}
    if name != "split":
        sharded = shard(CASES[name].load(folder / "one" / name)).eval()
        found["dtensors"] = sum(isinstance(p, DTensor) for p in sharded.parameters())
        found["fsdp"] = float((sharded(input_ids=ids).logits - expected).abs().max())
    return found


def resumed(rank: int, name: str) -> dict[str, Any]:
    """Values of a trained model into a sharded one that has the same masks and starts."""
    source = CASES[name].adapted()
    train(source, optimizer("sgd", source))
    values = {k: v.clone() for k, v in get_peft_model_state_dict(source).items()}
    target = shard(CASES[name].adapted())
    with torch.no_grad():
        before = target(input_ids=batches()[0]).logits
    set_peft_model_state_dict(target, values)
    got = get_peft_model_state_dict(target, state_dict=get_model_state_dict(target, options=FULL))
    with torch.no_grad():
        after, expected = (m.eval()(input_ids=batches()[0]).logits for m in (target, source))
    return {
        "differ": [k for k, v in values.items() if not torch.equal(got[k].cpu(), v)],
        "moved": float((after - before).abs().max()),
        "error": float((after - expected).abs().max()),
    }


def planted(rank: int) -> dict[str, str]:
    """Ranks that were given different masks, base weights and bases are noticed, on both of them."""
    found = {}
    host = CASES["packed"].adapted()
    other = get_peft_model(CASES["packed"].base(), sparse_config(packing="packed", mask="random", seed=rank))
    found["mask"] = told(lambda: check_same_on_every_rank(other))
    with torch.no_grad():
        next(iter(sparse_layers(host).values())).get_base_layer().weight[0, 0] += rank
    found["weight"] = told(lambda: check_same_on_every_rank(host))
    low = CASES["projected"].adapted()
    with torch.no_grad():
        next(m for n, m in low.named_modules() if n.endswith("lora_basis_U.default")).weight[0, 0] += rank
    found["basis"] = told(lambda: check_same_on_every_rank(low))
    bare = CASES["packed"].base()
    found["bare"] = told(lambda: check_same_on_every_rank(bare))
    return found
