"""Two processes under DDP against one with the same global batches: losses, adapters, bases, masks, saving, loading."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model_state_dict
from torch import Tensor

from distributed.cases import CASES, LOADED, UNDER_DDP, optimizer, train
from distributed.comparing import compare, saved, state_of
from helpers import assert_same_base, base_bytes

Ranks = tuple[Path, list[dict[str, Any]]]

LOSS = 3e-6  # fp32: seen 7.2e-7 of 4.9
# Of the largest movement of a tensor, and in norms. fp32, SGD: seen 4.2e-5 and 1.2e-5 (the projected factors' gradients
# cancel, the others are below 1e-5). AdamW divides by the root of tiny gradients: seen 1.7e-4 and 2.2e-5.
ADAPTER = {"sgd": (2e-4, 5e-5), "adamw": (8e-4, 1e-4)}
# bf16 products round a batch of two rows otherwise than one of four, with and without FSDP: seen 4.3e-4, 1.1e-2 (SGD),
# 3.3e-2 (AdamW, with gradients in fp32, sparse-bf16, and averaged in bf16, split).
BF16_LOSS = 2e-3
BF16_NORM = {"sgd": 4e-2, "masked": 8e-2}


def bounds(name: str, by: str) -> tuple[float, float, float]:
    """Of losses, of the largest difference, of the norm."""
    if CASES[name].dtype.itemsize == 2 and name != "projected-bf16":
        return BF16_LOSS, 1.0, BF16_NORM[by]
    return LOSS, *ADAPTER["adamw" if by == "masked" else by]


@cache
def one_process(name: str, by: str) -> tuple[dict[str, Tensor], list[float], dict[str, Tensor]]:
    """The adapter before, the losses, the adapter after."""
    host = CASES[name].adapted()
    start = state_of(host)
    losses = train(host, optimizer(by, host))
    return start, losses, state_of(host)


@cache
def bare_bytes(name: str) -> dict[str, str]:
    return base_bytes(CASES[name].base())


def compare_with_one_process(folder: Path, name: str, by: str, losses: list[float]) -> None:
    """The saved adapter of two ranks is that of one process, within the bounds, and loads in one process."""
    start, alone, expected = one_process(name, by)
    loss_bound, largest_bound, norm_bound = bounds(name, by)
    assert max(abs(a - b) for a, b in zip(losses, alone, strict=True)) <= loss_bound
    assert alone[-1] != alone[0]
    largest, norm = compare(saved(folder), expected, start)
    assert largest <= largest_bound and norm <= norm_bound, (largest, norm)
    again = CASES[name].load(folder)
    assert get_peft_model_state_dict(again).keys() == start.keys()
    compare(state_of(again), expected, start)


@pytest.mark.parametrize(("name", "by"), UNDER_DDP, ids=lambda value: str(value))
def test_two_ranks_train_as_one_process(ranks: Ranks, name: str, by: str) -> None:
    folder, found = ranks
    for rank in found:
        compare_losses = rank["ddp"][f"{name}/{by}"]["losses"]
        assert compare_losses == found[0]["ddp"][f"{name}/{by}"]["losses"]
    compare_with_one_process(folder / "ddp" / f"{name}-{by}", name, by, found[0]["ddp"][f"{name}/{by}"]["losses"])


@pytest.mark.parametrize(("name", "by"), UNDER_DDP, ids=lambda value: str(value))
def test_ranks_end_with_the_same_adapter_masks_and_base(ranks: Ranks, name: str, by: str) -> None:
    first, second = (rank["ddp"][f"{name}/{by}"] for rank in ranks[1])
    assert first["adapter"] == second["adapter"]
    assert first["compared"] == second["compared"] >= 16  # weights, masks, starts, bases: check_same_on_every_rank
    bare = bare_bytes(name)
    for rank in (first, second):
        assert_same_base(bare, rank["base"])


@pytest.mark.parametrize("name", CASES)
def test_no_buffer_is_broadcast_for_an_adapter(name: str) -> None:
    """DDP sends every buffer at every forward: masks, indices and bases must be none."""
    bare = {key for key, _ in CASES[name].base().named_buffers()}
    adapted = {key.removeprefix("base_model.model.") for key, _ in CASES[name].adapted().named_buffers()}
    assert adapted == bare


@pytest.mark.parametrize("name", LOADED)
def test_an_adapter_of_one_process_loads_in_two(ranks: Ranks, name: str) -> None:
    for rank in ranks[1]:
        assert rank["loaded"][name]["ddp"] <= 1e-6  # seen 0.0


def test_ranks_that_differ_are_noticed_on_both(ranks: Ranks) -> None:
    for rank in ranks[1]:
        planted = rank["planted"]
        assert "differs from rank 0 in 14 of 28 tensors" in planted["mask"] and "mask of 'default'" in planted["mask"]
        assert "in 1 of 28 tensors: model.layers.0.self_attn.q_proj: base weight" in planted["weight"]
        assert "in 1 of 56 tensors" in planted["basis"] and "lora_basis_U of 'default'" in planted["basis"]
        assert planted["bare"].startswith("ValueError: the model has no layer")


@pytest.mark.parametrize("name", ["projected", "packed", "split"])
def test_sft_in_two_processes_is_sft_in_one(ranks: Ranks, name: str, tmp_path: Path) -> None:
    from distributed.trainer_checks import fine_tuned
    from trainers import logged

    folder, found = ranks
    start = state_of(CASES[name].adapted())
    trainer = fine_tuned(CASES[name], tmp_path, world=1)
    loss_bound, _, norm_bound = bounds(name, "masked" if name == "split" else "adamw")
    for rank in found:
        two = rank["sft"][name]
        assert max(abs(a - b) for a, b in zip(two["losses"], logged(trainer, "loss"), strict=True)) <= loss_bound
        assert two["adapter"] == found[0]["sft"][name]["adapter"]
        assert_same_base(bare_bytes(name), two["base"])
    _, norm = compare(saved(folder / "sft" / name), state_of(trainer.model), start)
    assert norm <= norm_bound  # seen 7.7e-6 (fp32), 5.7e-2 (split)


@pytest.mark.parametrize("name", ["projected", "packed"])
def test_grpo_runs_in_two_processes(ranks: Ranks, name: str) -> None:
    first, second = (rank["grpo"][name] for rank in ranks[1])
    assert first["kl"] == second["kl"] and len(first["kl"]) == 2
    assert first["kl"][0] == 0.0 < first["kl"][1]  # the reference is the base model
    assert first["adapter"] == second["adapter"] != first["before"]
    for rank in (first, second):
        assert_same_base(bare_bytes(name), rank["base"])
