"""benchmarks/scaling.py: its formulas are what real tensors take, and docs/scaling.md shows what its file holds."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SCRIPTS = ("scaling", "_scaling_formulas", "_scaling_measured", "_common")


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The script's modules, which import one another by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        found = {name: importlib.import_module(name) for name in SCRIPTS}
        yield SimpleNamespace(**{name.removeprefix("_scaling_"): module for name, module in found.items()})
        for name in SCRIPTS:
            sys.modules.pop(name, None)


def tiny(scripts: Any, family: str) -> Any:
    """Square, wide and tall layers; biases and a tied head, or neither."""
    qwen = family == "qwen"
    return scripts.formulas.ModelShape(family, 64, 2, 4, 2, 176, 128, tied=qwen, qkv_bias=qwen)


def test_published_models_have_the_published_number_of_parameters(scripts: Any) -> None:
    for model in [*scripts.formulas.MODELS, scripts.formulas.SMOL]:
        assert model.count() == model.parameters, model.name
        assert model.source.startswith("https://huggingface.co/")


@pytest.mark.parametrize("kind", ["full", "master", "lora", "projected", "entries", "split", "rows"])
@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_the_formula_is_the_exact_count_of_bytes(family: str, kind: str, scripts: Any) -> None:
    shape, method = tiny(scripts, family), scripts.formulas.Method(kind, kind, rank=4, density=0.3)
    held = scripts.measured.measured(scripts.measured.build(shape), method)
    assert dataclasses.asdict(held) == dataclasses.asdict(scripts.formulas.memory(shape, method))
    assert held.gradients > 0 and held.optimiser > 0


@pytest.mark.parametrize("density", [0.05, 0.011, 0.59])
@pytest.mark.parametrize("kind", ["entries", "split"])
def test_at_other_densities(kind: str, density: float, scripts: Any) -> None:
    shape, method = tiny(scripts, "llama"), scripts.formulas.Method(kind, kind, density=density)
    held = scripts.measured.measured(scripts.measured.build(shape), method)
    assert held == scripts.formulas.memory(shape, method)


def test_every_way_to_train_is_in_the_tables(scripts: Any) -> None:
    assert {method.kind for method in scripts.formulas.METHODS} == set(scripts.formulas.KINDS)


def test_a_step_really_trains(scripts: Any) -> None:
    """The count is of a model that learns, masters included: weights, or what the adapter adds, have moved."""
    for method in scripts.formulas.METHODS:
        method = dataclasses.replace(method, rank=4)
        model = scripts.measured.build(tiny(scripts, "llama"))
        trained = scripts.measured.Trained(model, method)
        before = [value.detach().clone() for value in trained.masters or trained.values]
        trained.backward()
        trained.step()
        after = trained.masters or trained.values
        assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)), method.name


def test_a_ring_moves_what_the_formula_says(scripts: Any) -> None:
    """Two chunks a process and step around the ring: 2 (N - 1) sends of G / N each."""
    shape, method = tiny(scripts, "llama"), scripts.formulas.Method("", "lora", rank=4)
    gradients = scripts.formulas.memory(shape, method).gradients
    assert scripts.formulas.traffic(shape, method, 1).ddp == scripts.formulas.traffic(shape, method, 1).fsdp == 0
    for n in (2, 4, 8):
        assert scripts.formulas.traffic(shape, method, n).ddp == 2 * (n - 1) * gradients // n
    with pytest.raises(ValueError, match="processes=0: at least 1"):
        scripts.formulas.traffic(shape, method, 0)


@pytest.mark.parametrize("kind", ["lora", "projected", "entries", "rows", "split"])
def test_a_sync_holds_what_the_formula_says(kind: str, scripts: Any, tmp_path: Path) -> None:
    """The saved factors; of a sparse adapter int32 positions and bf16 values of the entries that can change."""
    shape, method = tiny(scripts, "llama"), scripts.formulas.Method(kind, kind, rank=4, density=0.05)
    trained = scripts.measured.Trained(scripts.measured.build(shape), method)
    sync = scripts.formulas.traffic(shape, method)
    if method.is_sparse:
        entries = sum(value.numel() for value in trained.values)
        assert (sync.sync, sync.sync_known) == (entries * (4 + 2), entries * 2)
        return
    trained.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    factors = [value for name, value in saved.items() if "lora_A" in name or "lora_B" in name]
    assert sync.sync == sum(value.nbytes for value in factors)


def test_what_has_no_formula_is_refused(scripts: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind='dora': it is one of full, master, lora"):
        scripts.formulas.Method("x", "dora")
    for density in (0.0, 0.7):
        with pytest.raises(ValueError, match=f"density={density}: .* at most 0.6"):
            scripts.formulas.Method("x", "entries", density=density)
    shape = tiny(scripts, "llama")
    scripts.measured.build(shape).save_pretrained(tmp_path)
    scripts.measured.build(shape, tmp_path)
    with pytest.raises(ValueError, match=f"llama: the model has {shape.count()} parameters, its shape says"):
        scripts.measured.build(dataclasses.replace(shape, layers=3), tmp_path)


def test_sizes_have_three_digits(scripts: Any) -> None:
    shown = [scripts.scaling.size(n) for n in (0, 2048, 3 * 2**20, 15.25 * 2**30, 244 * 2**30, 1.06 * 2**40)]
    assert shown == ["0", "2 KiB", "3.00 MiB", "15.2 GiB", "244 GiB", "1.06 TiB"]


# ---- the page


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / "scaling.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    names = ["docs/scaling.md", "benchmarks/results/scaling.json"]
    for name in [*names, "benchmarks/scaling.py", "benchmarks/_scaling_formulas.py"]:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / name).read_text())
    return tmp_path


def test_the_page_shows_what_the_file_holds_and_the_file_what_the_formulas_give() -> None:
    done = check(ROOT)
    assert done.returncode == 0, done.stderr


def test_a_changed_figure_is_noticed(copy: Path) -> None:
    assert check(copy).returncode == 0
    page = copy / "docs" / "scaling.md"
    text = page.read_text()
    row = text.index("| full, bf16 | ", text.index("memory: begin")) + len("| full, bf16 | ")
    page.write_text(text[:row] + "9" + text[row + 1 :])
    done = check(copy)
    assert done.returncode == 1 and "scaling.py --render" in done.stderr


def test_a_figure_that_the_formulas_do_not_give_is_noticed(copy: Path) -> None:
    path = copy / "benchmarks" / "results" / "scaling.json"
    result = json.loads(path.read_text())
    result["computed"]["rows"][0]["memory"]["weights"] += 1
    path.write_text(json.dumps(result))
    done = check(copy)
    assert done.returncode == 1 and "does not hold what the formulas give" in done.stderr


def test_measured_tensors_are_what_the_formulas_say() -> None:
    """To the byte, at real sizes, on the machine that wrote the file; the process held no less than that."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())["measured"]
    assert len(rows) == 14 and len({row["case"] for row in rows}) == 2
    for row in rows:
        assert row["tensors"] == row["formula"], (row["case"], row["method"])
        assert row["peak_growth"] >= sum(row["tensors"].values())
