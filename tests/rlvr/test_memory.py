"""What training keeps: found wherever it hides, counted once."""

import ctypes
import subprocess
import sys

import torch
from torch import nn

from offprincipal_peft.rlvr import memory
from offprincipal_peft.rlvr.memory import peak_bytes, reachable_tensors, storages


def held(*roots) -> int:
    return sum(storages(reachable_tensors(roots)).values())


def test_a_model_and_its_optimiser_by_hand():
    model = nn.Linear(10, 20)
    parameters = (10 * 20 + 20) * 4
    assert held(model) == parameters
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    model(torch.randn(3, 10)).sum().backward()
    assert held(model, optimizer) == parameters  # gradients are left out
    optimizer.step()
    steps = 2 * 4  # AdamW's step counters
    assert held(model, optimizer) == 3 * parameters + steps


def test_a_storage_is_counted_once_and_whole():
    base = torch.zeros(1000)
    assert held([base[:10], base.view(10, 100), base]) == 4000
    assert held([base[:10]]) == 4000  # the view keeps all of it
    tied = nn.Module()
    tied.a = nn.Parameter(base)
    tied.b = tied.a
    assert held(tied, tied) == 4000


class Slotted:
    __slots__ = ("kept", "unset")

    def __init__(self, kept: torch.Tensor) -> None:
        self.kept = kept


def test_tensors_that_are_no_parameters_and_no_buffers():
    """Every place where a layer could keep something, each with its own size."""
    model = nn.Linear(1, 1, bias=False)  # 4 bytes
    model.mask = torch.zeros(100, dtype=torch.bool)
    model.nested = {"a": [(torch.zeros(10), {torch.zeros(20)})]}
    model.slotted = Slotted(torch.zeros(30))
    model.raw = (ctypes.c_uint8 * 50)()
    model.register_buffer("loose", torch.zeros(40), persistent=False)
    model.weight.shadow = torch.zeros(60)
    model.dtype, model.kind, model.name = torch.float32, nn.Linear, "zeros"
    assert held(model) == 4 + 100 + 40 + 80 + 120 + 50 + 160 + 240


def test_cycles_empty_and_meta_tensors():
    a: dict = {"tensor": torch.zeros(5)}
    a["self"] = [a]
    assert held(a, torch.zeros(0), torch.zeros(1000, device="meta")) == 20


def test_the_peak_is_of_this_process_alone():
    """A child begins with its own: what its parent needed once is not its."""
    big = torch.ones(75_000_000)  # 300 MB, resident
    here = peak_bytes(torch.device("cpu"))
    assert here > big.nbytes
    code = (
        "import runpy, torch\n"
        f"peak_bytes = runpy.run_path({memory.__file__!r})['peak_bytes']\n"  # the package would import much more
        "before = peak_bytes(torch.device('cpu'))\n"
        "kept = torch.ones(50_000_000)\n"  # 200 MB
        "print(before, peak_bytes(torch.device('cpu')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < here
    assert 150_000_000 < after - before < 250_000_000
