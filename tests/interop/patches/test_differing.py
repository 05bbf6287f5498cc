"""Where two blocks differ, against a plain comparison of their bytes; and what is read ahead, against a plain loop."""

import threading
import time

import pytest
import torch

from offprincipal_peft.audit.buffers import Buffers, ahead
from offprincipal_peft.interop.sparse_patch.making import differing

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.bool]


def slow(first: torch.Tensor, second: torch.Tensor) -> list[int]:
    size = first.itemsize
    old, new = (bytes(side.view(torch.uint8).tolist()) for side in (first, second))
    return [i for i in range(len(first)) if old[i * size : (i + 1) * size] != new[i * size : (i + 1) * size]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1003])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.08, 0.1, 0.5, 1.0])  # on both sides of a tenth, where the way changes
def test_positions_are_those_of_other_bytes(dtype: torch.dtype, count: int, density: float) -> None:
    generator = torch.Generator().manual_seed(count)
    first = torch.randint(0, 2, (count,), generator=generator).to(dtype)
    flips = torch.rand(count, generator=generator) < density
    second = torch.where(flips, 1 - first.float(), first.float()).to(dtype)
    found = differing(first, second)
    assert found.dtype == torch.int64 and found.tolist() == slow(first, second) == flips.nonzero().view(-1).tolist()


def test_bytes_are_compared_and_not_numbers() -> None:
    first = torch.tensor([0.0, torch.nan, torch.nan, 1.0])
    second = torch.tensor([-0.0, torch.nan, -torch.nan, 1.0])
    assert differing(first, second).tolist() == slow(first, second) == [0, 2]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_order_and_memory_is_not_used_too_early(count: int) -> None:
    slots = [Buffers(1) for _ in range(count + 1)]
    running, most, lock = [0], [0], threading.Lock()

    def job(i: int) -> torch.Tensor:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.002 * (i % 3))  # later ones are done before earlier ones
        found = slots[i % len(slots)].take(5, torch.int64).fill_(i)
        with lock:
            running[0] -= 1
        return found

    seen = []
    for found in ahead((lambda i=i: job(i) for i in range(30)), count):
        before = found.clone()
        time.sleep(0.003)  # the others run meanwhile
        assert torch.equal(found, before)
        seen.append(int(found[0]))
    assert seen == list(range(30)) and most[0] <= count


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_job_raises_comes_in_its_place(count: int) -> None:
    seen = []
    with pytest.raises(ZeroDivisionError):
        for found in ahead((lambda i=i: 6 // (3 - i) for i in range(9)), count):
            seen.append(found)
    assert seen == [2, 3, 6]


def test_nothing_is_started_after_the_reader_stops() -> None:
    started = []
    results = ahead((lambda i=i: started.append(i) or i for i in range(100)), 2)
    assert next(results) == 0
    results.close()
    assert len(started) <= 4
