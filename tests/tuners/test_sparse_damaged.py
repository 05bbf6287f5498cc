"""Folders that do not fit: damaged files, other bases. Each is refused by layer, and the model is as it was."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from helpers import assert_same_base, base_bytes
from lifecycle import assert_same_tensors, logits, tiny
from sparse_models import (
    SOME,
    names,
    no_new_mask,
    packed_values,
    restored_bytes,
    sparse_config,
    train_masked,
    trained,
)

WEIGHTS = "adapter_model.safetensors"
QUERY = "base_model.model.model.layers.1.self_attn.q_proj.princsparse_delta."


def edited(source: Path, target: Path, edit) -> Path:
    """A copy of a saved adapter whose tensors went through `edit` (a dict, changed in place)."""
    shutil.copytree(source, target)
    tensors = load_file(target / WEIGHTS)
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / WEIGHTS)
    return target


def drop(*parts: str):
    def edit(tensors):
        doomed = [name for name in tensors if all(part in name for part in parts)]
        assert doomed, f"nothing matches {parts}"
        for name in doomed:
            del tensors[name]

    return edit


def change(key: str, how):
    def edit(tensors):
        before = tensors[QUERY + key].clone()
        after = tensors[QUERY + key] = how(before.clone())
        assert after.dtype != before.dtype or not torch.equal(after, before)

    return edit


def put(position: int, value: int):
    def how(entries):
        entries[position] = value
        return entries

    return how


WHERE = r"layers\.1\.self_attn\.q_proj"
BITS = {
    "a layer is missing": (drop(QUERY), rf"no values for 1 of the 14 layers.*{WHERE}"),
    "masks are missing": (drop(".entries"), r"q_proj.*lacks entries.*never regenerated"),
    "one mask is missing": (drop(QUERY, ".entries"), rf"{WHERE}.*lacks entries.*never regenerated"),
    "identity is missing": (drop(QUERY, ".base"), rf"{WHERE}.*lacks base"),
    "values are missing": (drop(QUERY, "weight"), rf"{WHERE}.*lacks weight"),
    "values too few": (change("weight", lambda v: v[:-1]), rf"{WHERE}.*names 410 entries.*shape \(409,\)"),
    "values too many": (change("weight", lambda v: torch.cat([v, v[:1]])), rf"{WHERE}.*names 410.*\(411,\)"),
    "values in 16 bits": (change("weight", torch.Tensor.bfloat16), rf"{WHERE}.*torch.float32 values.*torch.bfloat16"),
    "bits too few": (change("entries", lambda e: e[:-1]), rf"{WHERE}.*takes 128 bytes of bits, got 127"),
    "no bit": (change("entries", torch.zeros_like), rf"{WHERE}.*names 0 of 1024"),
    "every bit": (change("entries", lambda e: torch.full_like(e, 255)), rf"{WHERE}.*names 1024 of 1024"),
    "one bit more": (change("entries", put(0, 255)), rf"{WHERE}.*names \d+ entries.*shape \(410,\)"),
    "mask of int64": (change("entries", torch.Tensor.long), rf"{WHERE}.*uint8 bits or int32.*torch.int64"),
    "other identity": (change("base", put(0, 3)), rf"{WHERE}.*other bytes"),
}
POSITIONS = {
    "outside": (change("entries", put(-1, 1024)), rf"{WHERE}.*1 mask positions lie outside 0 to 1023.*1024"),
    "negative": (change("entries", put(0, -1)), rf"{WHERE}.*outside 0 to 1023 \(first: -1\)"),
    "unsorted": (change("entries", lambda e: e.flip(0)), rf"{WHERE}.*not sorted: entry 1 is"),
    "duplicated": (change("entries", lambda e: e[:1].expand(10).clone()), rf"{WHERE}.*duplicated: entry 1 is"),
}
WAYS = {
    "from_pretrained": lambda base, folder: PeftModel.from_pretrained(base, folder),
    "low memory": lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    "beside": lambda base, folder: get_peft_model(base, sparse_config(mask="low")).load_adapter(folder, "other"),
    "into": lambda base, folder: get_peft_model(base, sparse_config()).load_adapter(folder, "default"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A trained adapter whose masks are stored as bits, and one whose masks are stored as positions."""
    torch.manual_seed(0)
    found = {name: tmp_path_factory.mktemp("saved") / name for name in ("bits", "positions")}
    trained().save_pretrained(found["bits"])
    trained(mask="random").save_pretrained(found["positions"])
    return found


def refuse_load(way: str, folder: Path, error, match: str, dtype=torch.float32, damage=None) -> None:
    base = tiny(dtype=dtype)
    if damage is not None:
        damage(base)
    before = base_bytes(base)
    with no_mask_needed(way), pytest.raises(error, match=match):
        WAYS[way](base, folder)
    assert_same_base(before, base_bytes(base))


def no_mask_needed(way: str):
    return no_new_mask() if way in ("from_pretrained", "low memory") else warnings.catch_warnings()


@pytest.mark.parametrize("case", [*BITS, *POSITIONS])
def test_a_damaged_file_is_refused(tmp_path, folders, case):
    kind = "bits" if case in BITS else "positions"
    edit, match = BITS.get(case) or POSITIONS[case]
    folder = edited(folders[kind], tmp_path / "cut", edit)
    ways = list(WAYS)
    number = [*BITS, *POSITIONS].index(case)
    for way in (ways[number % 4], ways[(number + 1) % 4]):
        refuse_load(way, folder, ValueError, match)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("left", [0.5, 0.999])
def test_a_file_that_was_cut_short_is_refused(tmp_path, folders, way, left):
    folder = tmp_path / "cut"
    shutil.copytree(folders["bits"], folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(left * len(content))])
    refuse_load(way, folder, SafetensorError, "not fully covered|[Ii]ncomplete|[Ii]nvalid")


def flip_a_bit(base) -> None:
    base.model.layers[1].self_attn.q_proj.weight.data.view(torch.uint8)[7, 3] ^= 1


@pytest.mark.parametrize("way", WAYS)
def test_another_base_is_refused(folders, way):
    refuse_load(way, folders["bits"], ValueError, rf"{WHERE}.*other bytes.*load the same base", damage=flip_a_bit)
    other_dtype = r"layers\.0\.self_attn\.q_proj.*other bytes.*in the same dtype"
    refuse_load(way, folders["bits"], ValueError, other_dtype, dtype=torch.bfloat16)
    base = tiny(dtype=torch.float32)
    WAYS[way](base, folders["bits"])  # the right one


def test_another_precision_in_the_config_than_in_the_file_is_refused(tmp_path):
    trained(dtype=torch.bfloat16).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"precision": "split"}))
    for way in ("from_pretrained", "low memory", "beside"):
        refuse_load(way, tmp_path, ValueError, "q_proj.*lacks master", dtype=torch.bfloat16)


@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_a_refused_load_leaves_the_adapters_as_they_were(tmp_path, dtype, precision):
    host = trained(dtype=dtype, precision=precision)
    host.save_pretrained(tmp_path / "whole")
    folder = edited(tmp_path / "whole", tmp_path / "cut", change("entries", torch.zeros_like))
    train_masked(host, 1)
    want, values, before = logits(host), packed_values(host), restored_bytes(host)
    for adapter in ("default", "other"):
        with pytest.raises(ValueError, match=WHERE):
            host.load_adapter(folder, adapter)
        assert host.active_adapters == ["default"]
        assert_same_tensors(packed_values(host), values)
        assert torch.equal(logits(host), want)
    host.delete_adapter("other")
    host.load_adapter(tmp_path / "whole", "other")  # the name is free again
    assert_same_base(before, restored_bytes(host))


@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_nothing_is_loaded_into_a_merged_adapter(tmp_path, dtype, precision):
    host = trained(dtype=dtype, precision=precision)
    host.save_pretrained(tmp_path)
    host.merge_adapter()
    merged, state = base_bytes(host), {k: v.clone() for k, v in host.state_dict().items()}
    for load in (lambda: host.load_adapter(tmp_path, "default"), lambda: host.load_state_dict(state)):
        with pytest.raises(ValueError, match=r"q_proj: adapter 'default' is merged.*unmerge_adapter\(\)"):
            load()
        assert_same_base(merged, base_bytes(host))
    host.unmerge_adapter()
    assert_same_base(base_bytes(tiny(dtype=dtype)), base_bytes(host))
