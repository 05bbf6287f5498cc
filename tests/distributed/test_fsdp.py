"""Two processes under fully_shard against one: the same comparisons, and what cannot work says so."""

from typing import Any

import pytest

from distributed.cases import CASES, LOADED, UNDER_FSDP
from distributed.test_ddp import Ranks, bare_bytes, compare_with_one_process


@pytest.mark.parametrize(("name", "by"), UNDER_FSDP, ids=lambda value: str(value))
def test_two_ranks_train_as_one_process(ranks: Ranks, name: str, by: str) -> None:
    folder, found = ranks
    first, second = (rank["fsdp"][f"{name}/{by}"] for rank in found)
    assert first["whole"] == second["whole"] == []  # every parameter is a DTensor
    assert all(first["sharded_moments"]) and (by == "sgd") == (not first["sharded_moments"])
    assert first["accelerate_has"] == 0 and first["accelerate_differs"] == []
    compare_with_one_process(folder / "fsdp" / f"{name}-{by}", name, by, first["losses"])


@pytest.mark.parametrize(("name", "by"), UNDER_FSDP, ids=lambda value: str(value))
def test_ranks_end_with_the_same_adapter_masks_and_base(ranks: Ranks, name: str, by: str) -> None:
    first, second = (rank["fsdp"][f"{name}/{by}"] for rank in ranks[1])
    assert first["adapter"] == second["adapter"]
    assert first["compared"] == second["compared"] >= 16
    bare = bare_bytes(name)
    parameters = {key for key, _ in CASES[name].base().named_parameters()}
    for rank in (first, second):
        assert rank["base"] == bare
        assert parameters <= rank["base_after"].keys()
        assert {key: bare[key] for key in rank["base_after"]} == rank["base_after"]


@pytest.mark.parametrize("name", [name for name in LOADED if name != "split"])
def test_an_adapter_of_one_process_loads_in_two(ranks: Ranks, name: str) -> None:
    for rank in ranks[1]:
        assert rank["loaded"][name]["dtensors"] > 30
        assert rank["loaded"][name]["fsdp"] <= 1e-6  # seen 0.0


@pytest.mark.parametrize("name", ["projected", "packed", "dense"])
def test_values_load_into_a_sharded_model(ranks: Ranks, name: str) -> None:
    for rank in ranks[1]:
        resumed = rank["resumed"][name]
        assert resumed["differ"] == []
        assert resumed["moved"] > 0.1 and resumed["error"] <= 1e-6  # seen 0.0


REFUSED = {
    "split": ("RuntimeError", "precision='split'", "Use precision='fp32'"),
    "written before": ("RuntimeError", "when FSDP sharded it", "disable_adapter_layers()"),
    "second sparse adapter": ("ValueError", "sharded already", "Add and load adapters first"),
    "second projected adapter": ("ValueError", "sharded already", "Add and load adapters first"),
    "merged sparse": ("RuntimeError", "sharded by FSDP", "load it in a process that holds the whole model"),
    "merged projected": ("RuntimeError", "sharded", "in a process that loads the saved adapter on a whole model"),
    "safe merge": ("RuntimeError", "sharded by FSDP", "load it in a process that holds the whole model"),
    "sparse units": ("RuntimeError", "units of their own", "Give fully_shard whole blocks"),
    "projected units": ("RuntimeError", "not gathered", "give it whole blocks"),
    "other mask": ("ValueError", "these are of another one", "Load the adapter before fully_shard"),
    "other base": ("ValueError", "base weight with other bytes", "load the same base model"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_on_every_rank(ranks: Ranks, what: str) -> None:
    kind, *parts = REFUSED[what]
    for rank in ranks[1]:
        assert rank["refusals"].keys() == REFUSED.keys()
        said = rank["refusals"][what]
        assert said.startswith(f"{kind}: model.layers.0.self_attn.q_proj")
        assert all(text in said for text in parts), said


def numbers(said: str) -> list[float]:
    assert said.startswith("passed: "), said
    return [float(part) for part in said.removeprefix("passed: ").strip("[]").split(",")]


@pytest.mark.parametrize("what", ["projected", "pissa", "packed", "dense", "projected, rank 0 loads"])
def test_what_accelerate_makes_of_a_model_trains(ranks: Ranks, what: str) -> None:
    """accelerate's own function for FSDP2, which it does not call on CPUs."""
    for rank in ranks[1]:
        whole, difference, progress = numbers(rank["accelerate"][what])
        assert whole == 0 and progress > 0.03
        assert difference <= 3e-6  # seen 0.0


def test_accelerate_shards_a_model_that_was_trained_before(ranks: Ranks) -> None:
    for rank in ranks[1]:
        assert numbers(rank["accelerate"]["packed, after training"]) == [0.0]


@pytest.mark.parametrize(("what", "whole_parameters"), [("packed, bf16", 0), ("projected, bf16, bases whole", 28)])
def test_bf16_mixed_precision_that_works(ranks: Ranks, what: str, whole_parameters: int) -> None:
    """Against fp32: 14 layers have a basis on each side, which stay whole."""
    for rank in ranks[1]:
        whole, difference, progress = numbers(rank["accelerate"][what])
        assert whole == whole_parameters and progress > 0.03
        assert difference <= 0.04  # seen 0.0143: rounding of the whole model to bf16


def refused(rank: dict[str, Any], what: str, *parts: str) -> None:
    said = rank["accelerate"][what]
    assert said.startswith("RuntimeError: ") and all(part in said for part in parts), said


def test_what_accelerate_cannot_prepare_is_refused(ranks: Ranks) -> None:
    for rank in ranks[1]:
        refused(rank, "packed, rank 0 loads", "meta device", "fsdp_cpu_ram_efficient_loading: false")
        refused(rank, "projected, bf16", "casts a basis", "mixed_precision: 'no'")
        refused(rank, "pissa, bf16", "casts a factor", "mixed_precision: 'no'")
