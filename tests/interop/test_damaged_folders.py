"""Folders that are not whole, not an adapter, or in the way: what is said, and that nothing is written."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from interop.exporting import CONFIG, TENSORS, save_base, saved, settings, tensors, trained
from offprincipal_peft.interop import ExportError, export_lora, folders

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapter")
    base = save_base(root / "base")
    options = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    return saved(trained(base, "milora", projection="output", principal_rank=3, **options), root / "a")


@pytest.fixture
def copy(adapter, tmp_path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "a"))


def change_tensors(folder: Path, change) -> None:
    values = load_file(folder / TENSORS)
    change(values)
    save_file(values, folder / TENSORS, metadata={"format": "pt"})


def change_config(folder: Path, **values) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop(*parts: str):
    def change(values):
        for key in [k for k in values if any(part in k for part in parts)]:
            del values[key]

    return change


def put(key: str, value: torch.Tensor):
    return lambda values: values.update({key: value})


DAMAGED_TENSORS = {
    "no start": (drop("layers.0.self_attn.q_proj.lora_start_B"), r"layers\.0\.self_attn\.q_proj: .*lacks lora_start_B"),
    "no basis": (drop("lora_basis_U"), "lacks lora_basis_U"),
    "no B": (drop("lora_B"), "lacks lora_B"),
    "no A": (drop("lora_A"), "lacks lora_A"),
    "no layer of a target": (drop("down_proj"), "incomplete, it has no tensor for the target down_proj"),
    "no saved module": (drop("lm_head"), r"lacks the modules to save \(lm_head\)"),
    "no factors at all": (drop("lora_"), "holds no layer's factors"),
    "other rank": (put(f"{Q}.lora_A.weight", torch.zeros(5, 32)), r"lora_A has shape \(5, 32\).* r = 4 .*\(4, 32\)"),
    "other k": (put(f"{Q}.lora_basis_U.weight", torch.zeros(32, 2)), r"\(32, 2\), but .*k = 3 .*\(32, 3\)"),
    "NaN": (put(f"{Q}.lora_B.weight", torch.full((32, 4), float("nan"))), r"q_proj: lora_B .* it is damaged"),
    "a basis too many": (put(f"{Q}.lora_basis_V.weight", torch.zeros(32, 3)), "there is lora_basis_V"),
    "magnitudes": (
        put(f"{Q}.lora_magnitude_vector.weight", torch.zeros(32)),
        "lora_magnitude_vector.weight is no",
    ),
    "an unknown key": (put("base_model.model.model.norm.weight", torch.zeros(32)), r"norm\.weight is no part"),
    "no prefix": (put("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 32)), "is no part"),
}


def whole_layer_named_k_proj(values):
    for key in [k for k in values if Q in k]:
        values[key.replace("q_proj", "k_proj")] = values[key].clone()


DAMAGED_TENSORS["a layer that is no target"] = (whole_layer_named_k_proj, "k_proj, which target_modules does not name")


@pytest.mark.parametrize("case", DAMAGED_TENSORS)
def test_damaged_tensors_are_told(copy, tmp_path, case):
    change, words = DAMAGED_TENSORS[case]
    change_tensors(copy, change)
    with pytest.raises(ExportError, match=words) as told:
        export_lora(copy, tmp_path / "x")
    assert str(copy) in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


CONFIGS = {
    "lora": ({"peft_type": "LORA"}, "is a plain PEFT LoRA already"),
    "sparse": ({"peft_type": "PRINCIPAL_SPARSE"}, "sparse adapter, whose update has full rank"),
    "another method": ({"peft_type": "IA3"}, "peft_type IA3; only off-principal adapters"),
    "an unknown method": ({"peft_type": "NEWEST"}, "peft_type 'NEWEST', which the installed PEFT does not know"),
    "no method": ({"peft_type": None}, "names no peft_type"),
    "another rank": ({"r": 5}, r"r = 5 and k = 3 of the config need \(5, "),
    "no axis": ({"init_subspace": "middle"}, "config is not valid: init_subspace must be one of"),
    "an unknown setting": ({"use_newest": True}, "the config sets use_newest, which this version"),
    "another projection": ({"projection": "input"}, "lacks lora_basis_V"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_do_not_hold_are_told(copy, tmp_path, case):
    values, words = CONFIGS[case]
    change_config(copy, **values)
    with pytest.raises(ExportError, match=words):
        export_lora(copy, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_unknown_setting_that_is_off_is_no_obstacle(copy, tmp_path):
    change_config(copy, use_newest=False, newest_options=None)
    export_lora(copy, tmp_path / "x")


@pytest.mark.parametrize("targets", ["all-linear", None])
def test_targets_that_need_a_model_become_the_adapted_layers(copy, tmp_path, targets):
    change_config(copy, target_modules=targets)
    done = export_lora(copy, tmp_path / "x")
    assert settings(tmp_path / "x")["target_modules"] == sorted(done.ranks) and len(done.ranks) == 4


def test_missing_and_unreadable_files(copy, tmp_path):
    def refused(words: str, folder: Path = copy, **options) -> None:
        with pytest.raises(ExportError, match=words):
            export_lora(folder, tmp_path / "x", **options)
        assert not (tmp_path / "x").exists()

    refused("no folder .*nowhere", tmp_path / "nowhere")
    refused(r"holds no adapter_config.json, .* saved adapters in a: name one", tmp_path)
    blob = (copy / TENSORS).read_bytes()
    for length in (0, 4, len(blob) // 2, len(blob) - 1):
        (copy / TENSORS).write_bytes(blob[:length])
        refused("adapter_model.safetensors is damaged or cut short")
    (copy / TENSORS).rename(copy / "adapter_model.bin")
    refused("adapter_model.bin, a pickle, which is not read")
    (copy / "adapter_model.bin").unlink()
    refused("holds no adapter_model.safetensors")
    (copy / CONFIG).write_text("{")
    refused("adapter_config.json is not JSON")
    (copy / CONFIG).rename(copy / "config.json")
    refused("no saved adapter. It holds a model: give the adapter's folder")


# -- the target -----------------------------------------------------------------------------------------------------


def test_targets_in_the_way(copy, tmp_path):
    file, full, export = tmp_path / "file", tmp_path / "full", tmp_path / "export"
    file.write_text("kept")
    full.mkdir()
    (full / "thesis.tex").write_text("kept")
    export_lora(copy, export)
    for target, options, words in (
        (file, {}, "is a file; give the folder"),
        (full, {}, r"full exists and is not empty; give another folder, or overwrite=True \(--overwrite\)"),
        (full, {"overwrite": True}, "is no exported folder and is not overwritten"),
        (export, {}, "exists and is not empty"),
        (copy, {"overwrite": True}, "is, or contains, the adapter that is read"),
        (tmp_path, {"overwrite": True}, "is, or contains, the adapter that is read"),
    ):
        with pytest.raises(ExportError, match=words):
            export_lora(copy, target, **options)
    assert file.read_text() == (full / "thesis.tex").read_text() == "kept"


def test_overwriting_leaves_nothing_of_the_old(copy, tmp_path):
    (tmp_path / "x").mkdir()
    export_lora(copy, tmp_path / "x")  # an empty folder is no obstacle
    (tmp_path / "x" / "old.txt").write_text("old")
    export_lora(copy, tmp_path / "x", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["README.md", CONFIG, TENSORS]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "x"]


@pytest.mark.parametrize("stop", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failed_write_leaves_the_old_folder_whole(copy, tmp_path, monkeypatch, stop):
    export_lora(copy, tmp_path / "x")
    before = tensors(tmp_path / "x")

    def half(values, path, **options):
        path.write_bytes(b"half")
        raise stop

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    for target in ("x", "y"):
        with pytest.raises(type(stop)):
            export_lora(copy, tmp_path / target, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "x"]
    assert all(torch.equal(value, before[key]) for key, value in tensors(tmp_path / "x").items())


def test_a_failed_exchange_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "x"
    target.mkdir()
    (target / "old").write_text("old")
    real = Path.rename

    def rename(self, to):
        if self.name.endswith(".new"):
            raise OSError("no")
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no"), folders.new_folder(target) as fresh:
        (fresh / "new").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (target / "old").read_text() == "old"


def test_tokenizer_files_come_along(copy, tmp_path):
    (copy / "tokenizer.json").write_text("{}")
    (copy / "chat_template.jinja").write_text("x")
    (copy / "optimizer.pt").write_text("not this")
    export_lora(copy, tmp_path / "x")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [
        "README.md",
        CONFIG,
        TENSORS,
        "chat_template.jinja",
        "tokenizer.json",
    ]
