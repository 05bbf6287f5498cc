"""Which tensors are compared, and what is said of the others."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from audit.pairs import draw, model
from offprincipal_peft.audit import (
    Checkpoint,
    CheckpointError,
    Rename,
    iterate,
    pair,
)


def reasons(pairing: Any) -> dict[str, str]:
    assert len({skip.name for skip in pairing.skipped}) == len(pairing.skipped)
    return {skip.name: skip.reason for skip in pairing.skipped}


# ---- what is matched


def test_tensors_of_equal_name_and_shape_are_matched_and_the_others_told(tmp_path):
    same = {"a.weight": draw(4, 3), "b.bias": draw(5, dtype=torch.float32)}
    base = model(tmp_path / "base", same | {"wide.weight": draw(4, 6), "gone.weight": draw(2), "ids": torch.arange(3)})
    tuned = model(tmp_path / "tuned", same | {"wide.weight": draw(4, 7), "new.weight": draw(2), "ids": torch.arange(3)})
    pairing = pair(base, tuned)
    assert {match.name for match in pairing.matched} == set(same)
    assert all(match.note == "" and match.common() == match.infos[0].dtype for match in pairing.matched)
    assert reasons(pairing) == {
        "wide.weight": "shape (4, 6) in base and (4, 7) in tuned",
        "gone.weight": "missing in tuned",
        "ids": "holds I64 values in base, which are no floating-point weights; "
        "holds I64 values in tuned, which are no floating-point weights",
        "new.weight": "missing in base",
    }
    assert pairing.renames == (Rename(),) and str(pairing.renames[0]) == "names as they are"
    assert pairing.nbytes == 2 * (4 * 3 * 2 + 5 * 4)


def test_several_tuned_checkpoints_must_all_hold_a_tensor(tmp_path):
    base = model(tmp_path / "base", {"a": draw(4), "b": draw(4), "c": draw(4)})
    one = model(tmp_path / "one", {"a": draw(4), "b": draw(3), "c": draw(4)})
    two = model(tmp_path / "two", {"module.a": draw(4), "module.b": draw(4), "module.d": draw(1)})
    pairing = pair(base, one, two)
    assert [[info.name for info in match.infos] for match in pairing.matched] == [["a", "a", "module.a"]]
    assert pairing.renames == (Rename(), Rename(tuned="module."))
    assert reasons(pairing) == {
        "b": "shape (4,) in base and (3,) in tuned 1",
        "c": "missing in tuned 2",
        "module.d": "missing in base",
    }


def test_a_tensor_that_several_tuned_checkpoints_have_and_the_base_lacks_is_told_once(tmp_path):
    base = model(tmp_path / "base", {"model.w": draw(4)})
    one = model(tmp_path / "one", {"model.w": draw(4), "model.new": draw(2), "model.ids": torch.arange(3)})
    two = model(tmp_path / "two", {"w": draw(4), "new": draw(2), "ids": draw(3)})
    assert reasons(pair(base, one, two)) == {
        "model.new": "missing in base",
        "model.ids": "holds I64 values in tuned 1, which are no floating-point weights; missing in base",
    }


def test_dtypes_that_differ_are_compared_in_the_coarser_one_with_a_note(tmp_path):
    base = model(tmp_path / "base", {"a": draw(4, dtype=torch.float32), "b": draw(4, dtype=torch.float16)})
    tuned = model(tmp_path / "tuned", {"a": draw(4), "b": draw(4, dtype=torch.float32)})
    found = {match.name: match for match in pair(base, tuned).matched}
    assert (found["a"].common(), found["b"].common()) == (torch.bfloat16, torch.float16)
    assert found["a"].note == (
        "F32 in base, BF16 in tuned: stored values are compared in bfloat16; in fp32 the rounding to bfloat16 is part "
        "of the difference"
    )
    block = next(block for block in iterate(pair(base, tuned)) if block.match.name == "a")
    assert [tensor.dtype for tensor in block.tensors] == [torch.float32, torch.bfloat16]


WRAPPED = ("_orig_mod.", "module.", "base_model.model.", "model.", "module._orig_mod.", "base_model.model.model.")


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("on_base", [False, True])
def test_a_common_prefix_is_found_and_reported(tmp_path, prefix, on_base):
    plain = {"layers.0.weight": draw(2, 3), "layers.1.weight": draw(2, 3, seed=1)}
    wrapped = {prefix + name: tensor for name, tensor in plain.items()} | {"lm_head.weight": draw(5, 3)}
    sides = [model(tmp_path / "a", plain), model(tmp_path / "b", wrapped)]
    pairing = pair(*(sides[::-1] if on_base else sides))
    assert pairing.renames == (Rename(prefix, "") if on_base else Rename("", prefix),)
    assert repr(prefix) in str(pairing.renames[0])
    assert len(pairing.matched) == 2
    assert all(
        match.infos[0].name.removeprefix(prefix) == match.infos[1].name.removeprefix(prefix)
        for match in pairing.matched
    )
    assert reasons(pairing) == {"lm_head.weight": f"missing in {'tuned' if on_base else 'base'}"}


def test_two_prefixes_and_a_head_that_only_one_of_them_wraps(tmp_path):
    base = model(tmp_path / "base", {"module.model.w": draw(2, 3), "module.lm_head.weight": draw(5, 3)})
    tuned = model(tmp_path / "tuned", {"_orig_mod.model.w": draw(2, 3), "_orig_mod.lm_head.weight": draw(5, 3)})
    pairing = pair(base, tuned)
    assert pairing.renames == (Rename("module.", "_orig_mod."),) and len(pairing.matched) == 2


def test_names_as_they_are_win_over_a_rename_that_does_no_better(tmp_path):
    base = model(tmp_path / "base", {"model.w": draw(3)})  # without "model." it would be the other one's w
    tuned = model(tmp_path / "tuned", {"model.w": draw(3), "w": draw(3)})
    pairing = pair(base, tuned)
    assert pairing.renames == (Rename(),)
    assert reasons(pairing) == {"w": "missing in base"}


def test_two_renames_that_fit_equally_well_are_refused(tmp_path):
    base = model(tmp_path / "base", {"w": draw(3)})
    tuned = model(tmp_path / "tuned", {"module.w": draw(3), "_orig_mod.w": draw(3)})
    with pytest.raises(CheckpointError, match=r"fits .* in two ways that differ, 1 tensors each: tuned names without"):
        pair(base, tuned)


def test_nothing_matches(tmp_path):
    base = model(tmp_path / "base", {f"a{i}": draw(3) for i in range(5)})
    tuned = model(tmp_path / "tuned", {f"b{i}": draw(3) for i in range(5)})
    with pytest.raises(CheckpointError, match=r"Tuned holds b0, b1, b2; base holds a0, a1, a2\. Both must be"):
        pair(base, tuned)
    other = model(tmp_path / "other", {f"a{i}": draw(4) for i in range(5)})
    with pytest.raises(CheckpointError, match=r"no tensor of .* a0: shape \(3,\) in base and \(4,\) in tuned; a1: "):
        pair(base, other)
    with pytest.raises(CheckpointError, match="at least one tuned checkpoint"):
        pair(base)


# ---- quantised and tied


def quantised(folder: Path) -> dict[str, Checkpoint]:
    norm = {"norm.weight": draw(8)}
    packed = torch.arange(32, dtype=torch.uint8)
    return {
        "bnb 4 bit": model(
            folder / "four",
            norm
            | {
                "q.weight": packed.view(32, 1),
                "q.weight.absmax": draw(1, dtype=torch.float32),
                "q.weight.quant_map": draw(16, dtype=torch.float32),
                "q.weight.quant_state.bitsandbytes__nf4": packed,
            },
            quantization_config={"quant_method": "bitsandbytes"},
        ),
        "bnb 8 bit": model(
            folder / "eight",
            norm | {"q.weight": draw(8, 8).to(torch.int8), "q.SCB": draw(8, dtype=torch.float32)},
        ),
        "fp8": model(
            folder / "fp8",
            norm | {"q.weight": draw(8, 8).to(torch.float8_e4m3fn), "q.weight_scale_inv": draw(1, dtype=torch.float32)},
        ),
        "gptq": model(
            folder / "gptq",
            norm | {"q.qweight": torch.zeros(1, 8, dtype=torch.int32), "q.scales": draw(1, 8, dtype=torch.float16)},
            quantization_config={"quant_method": "gptq"},
        ),
    }


EXPECTED = {
    "bnb 4 bit": {
        "q.weight": "quantised by bitsandbytes: stored as U8 in tuned",
        "q.weight.absmax": "quantised: belongs to q.weight in tuned",
        "q.weight.quant_map": "quantised: belongs to q.weight in tuned",
        "q.weight.quant_state.bitsandbytes__nf4": "quantised by bitsandbytes: stored as U8 in tuned",
    },
    "bnb 8 bit": {
        "q.weight": "quantised: stored as I8 in tuned",
        "q.SCB": "quantised: belongs to q.weight in tuned",
    },
    "fp8": {
        "q.weight": "quantised: stored as F8_E4M3 in tuned",
        "q.weight_scale_inv": "quantised: belongs to q.weight in tuned",
    },
    "gptq": {
        "q.weight": "quantised: tuned holds q.qweight (I32) in its place",
        "q.qweight": "quantised by gptq: stored as I32 in tuned",
        "q.scales": "quantised: belongs to q.qweight in tuned",
    },
}


def test_quantised_weights_and_what_is_stored_beside_them_are_skipped(tmp_path):
    base = model(tmp_path / "base", {"norm.weight": draw(8), "q.weight": draw(8, 8)})
    for case, tuned in quantised(tmp_path).items():
        pairing = pair(base, tuned)
        assert [match.name for match in pairing.matched] == ["norm.weight"], case
        assert reasons(pairing) == EXPECTED[case]
        turned = reasons(pair(tuned, base))
        assert set(turned) == set(EXPECTED[case]), case
        assert all(reason.startswith("quantised") for reason in turned.values()), turned


def test_a_scale_of_a_weight_that_is_not_quantised_is_compared(tmp_path):
    tensors = {"q.weight": draw(8, 8), "q.scales": draw(8)}
    assert len(pair(model(tmp_path / "a", tensors), model(tmp_path / "b", tensors)).matched) == 2


def test_a_head_that_one_side_keeps_only_as_its_embedding(tmp_path):
    embedding = draw(9, 4)
    plain = {"model.embed_tokens.weight": embedding, "model.norm.weight": draw(4)}
    tied = model(tmp_path / "tied", plain, tie_word_embeddings=True)
    unsaid = model(tmp_path / "unsaid", plain)
    copied = model(tmp_path / "copied", plain | {"lm_head.weight": embedding})
    trained = model(tmp_path / "trained", plain | {"lm_head.weight": embedding + 1})
    same = "tied: the same content as model.embed_tokens.weight in {}, and missing in {}"
    apart = "missing in base, {} it to model.embed_tokens.weight; in tuned their contents differ, so it is untied there"
    for base, tuned, reason in (
        (copied, tied, same.format("base", "tuned")),
        (tied, copied, same.format("tuned", "base")),
        (tied, trained, apart.format("whose config.json ties")),
        (unsaid, trained, apart.format("which may tie")),
    ):
        pairing = pair(base, tuned)
        assert reasons(pairing) == {"lm_head.weight": reason}
        assert len(pairing.matched) == 2


# ---- blocks


BOUNDS: tuple[dict[str, int], ...] = (
    {},
    {"rows": 3},
    {"block_bytes": 64},
    {"rows": 2, "block_bytes": 100},
    {"block_bytes": 1},
)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("bound", BOUNDS)
def test_blocks_cover_every_tensor_once_in_file_order_and_within_their_bound(tmp_path, bound, flat):
    tensors = {
        "a": draw(10, 7),
        "b": draw(1, 300),
        "c": draw(33),
        "d": torch.tensor(2.5),
        "e": torch.zeros(0, 3),
        "f": torch.zeros(3, 0),
        "g": draw(4, 3, 5, dtype=torch.float32),
    }
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    pairing = pair(model(tmp_path / "base", tensors), model(tmp_path / "tuned", other))
    seen: list[tuple[int, int]] = []
    found: dict[str, list[tuple[Tensor, ...]]] = {}
    for block in iterate(pairing, flat=flat, progress=lambda *numbers: seen.append(numbers), **bound):
        name, row = block.match.name, 1 if flat else math.prod(block.match.shape[1:])
        assert block.tensors[0].numel() == (block.stop - block.start) * row
        assert block.tensors[0].ndim == (1 if flat else tensors[name].ndim)
        assert block.stop - block.start <= bound.get("rows", 300)
        one = 2 * row * tensors[name].itemsize  # a block has at least one row or entry
        assert sum(tensor.nbytes for tensor in block.tensors) <= max(bound.get("block_bytes", 2400), one)
        found.setdefault(name, []).append(block.tensors)
    assert list(found) == list(pairing.checkpoints[0].tensors)
    for name, blocks in found.items():
        assert len(blocks) == 1 or bound
        for side, truth in enumerate((tensors[name], other[name])):
            assert torch.equal(torch.cat([block[side].reshape(-1) for block in blocks]), truth.reshape(-1))
    assert seen[-1] == (pairing.nbytes, pairing.nbytes)
    assert seen == sorted(seen) and len(seen) == sum(map(len, found.values()))


@pytest.mark.parametrize("bound", [{"rows": 0}, {"block_bytes": -1}])
def test_a_bound_must_be_positive(tmp_path, bound):
    side = model(tmp_path, {"w": draw(3)})
    with pytest.raises(ValueError, match=f"{next(iter(bound))} must be positive, got"):
        next(iterate(pair(side, side), **bound))


def test_memory_that_is_used_again_needs_blocks_of_entries(tmp_path):
    side = model(tmp_path / "base", {"w": draw(6)})
    with pytest.raises(ValueError, match="reuse is for blocks of entries: flat=True"):
        next(iterate(pair(side, side), reuse=True))
