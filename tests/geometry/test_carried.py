"""Where updates, gradients and masks arrive when the basis changes: against dense matrices and against training."""

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from attention_models import KINDS, both, distance, first_block, model_of, permutation, rotation, state_of, tokens
from helpers import relative_error
from offprincipal_peft import PrincipalSparseConfig
from offprincipal_peft.geometry import (
    AttentionLayout,
    Intervention,
    apply_interventions,
    energy_shares,
    find_layouts,
    jaccard,
    top_basis,
    unchanged,
)
from offprincipal_peft.geometry.masks import MaskOptions, build_mask, principal_score
from offprincipal_peft.geometry.selection import select

MAKERS = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


# ---- updates and gradients


def dense_map(each: Intervention, role: str) -> Tensor:
    """The (channels, channels) matrix by which the channels of q, k, v or o move, written out entry by entry."""
    layout, d = each.layout, each.layout.head_dim
    order = each.query_order if role in ("query", "output") else each.kv_order
    turns = each.value_rotation if role in ("value", "output") else each.query_key_rotation
    matrix = torch.zeros(len(order) * d, len(order) * d, dtype=torch.float64)
    for new, old in enumerate(order):
        kv_head = new if role in ("key", "value") else new // (layout.n_heads // layout.n_kv_heads)
        block = torch.eye(d, dtype=torch.float64) if turns is None else turns[kv_head]
        for c in range(d):
            for e in range(d):
                matrix[new * d + e, old * d + c] = block[c, e]
    return matrix


def expected_image(each: Intervention, name: str, values: Tensor) -> Tensor:
    """By multiplication with the dense maps, fused tensors and stored orientation included."""
    layout = each.layout
    if name == layout.output:
        matrix = dense_map(each, "output")
        return matrix @ values if layout.transposed else values @ matrix.T
    names = {"query": layout.query, "key": layout.key, "value": layout.value}
    biases = {"query": layout.query_bias, "key": layout.key_bias, "value": layout.value_bias}
    roles = [role for role in names if name in (names[role], biases[role])]
    matrix = torch.block_diag(*[dense_map(each, role) for role in roles])
    return values @ matrix.T if layout.transposed and values.ndim == 2 else matrix @ values


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "phi3", "llama, one key head"])
def test_updates_and_weights_map_as_the_dense_matrices_say(name: str) -> None:
    tensors, layout = first_block(name)
    generator = torch.Generator().manual_seed(1)
    for each in [both(layout), permutation(layout), rotation(layout).inverse()]:
        for key in dict.fromkeys(part.name for part in layout.parts()):
            update = torch.randn(tensors[key].shape, generator=generator, dtype=torch.float64)
            assert (
                relative_error(each.carry_update(update, key), expected_image(each, key, update)) <= 1e-15
            )  # observed 1.2e-16
            assert (
                relative_error(each.carry_weight(tensors[key], key), expected_image(each, key, tensors[key])) <= 1e-15
            )
            # observed 2.2e-16


def gradients_of(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(tokens()).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens(seed=4).flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@MAKERS
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "olmo2", "gpt-oss, sinks"])
def test_the_gradient_in_the_new_basis_is_the_carried_one(
    name: str, make: Callable[[AttentionLayout], Intervention]
) -> None:
    model = model_of(name)
    before = gradients_of(model)
    interventions = [make(layout) for layout in find_layouts(model)]
    expected = dict(before)
    for each in interventions:
        expected |= {key: each.carry_update(before[key], key) for key in each.moved_names()}
    changed = apply_interventions(model, interventions)
    after = gradients_of(model)
    assert after.keys() == expected.keys()
    size = max(float(value.abs().max()) for value in before.values())
    assert max(distance(after[key], expected[key]) for key in after) <= 1e-12 * size  # observed 7.4e-15
    for key in (name for name in changed if "k_proj.bias" not in name):  # and not as it was
        assert distance(after[key], before[key]) > 1e-3 * float(before[key].abs().max()), key


@pytest.mark.parametrize("make", [rotation, permutation], ids=["rotation", "permutation"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_of_training_carry_over(make: Callable[[AttentionLayout], Intervention], optimizer: str) -> None:
    """SGD commutes with both; AdamW, which divides entry by entry, with permutations only."""

    def trained(model: PreTrainedModel) -> dict[str, Tensor]:
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
        options = {"momentum": 0.9} if optimizer == "sgd" else {"eps": 1e-8}
        steps = kind(model.parameters(), lr=1e-2, weight_decay=0.1, **options)
        for _ in range(3):
            gradients_of(model)
            steps.step()
        return state_of(model)

    plain, turned = model_of("llama"), model_of("llama")
    interventions = [make(layout) for layout in find_layouts(turned)]
    apply_interventions(turned, interventions)
    start, end, found = state_of(plain), trained(plain), trained(turned)
    assert min(relative_error(end[key], start[key]) for key in start) > 1e-3
    expected = dict(end)
    for each in interventions:
        expected |= each.transform(expected)
    error = max(relative_error(found[key], expected[key]) for key in found)
    if optimizer == "adamw" and make is rotation:
        assert error > 1e-3  # observed 0.052
    else:
        assert error <= 1e-13  # observed 2.0e-16 (SGD) and 1.3e-15 (AdamW)


# ---- masks


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_mask_moves_with_a_permutation_as_the_update_on_it_does(name: str) -> None:
    tensors, layout = first_block(name)
    each = permutation(layout)
    generator = torch.Generator().manual_seed(2)
    for key in (layout.query, layout.key, layout.value, layout.output):
        mask = torch.rand(tensors[key].shape, generator=generator) < 0.3
        update = mask * torch.rand(mask.shape, generator=generator, dtype=torch.float64).add(0.5)
        moved = each.carry_mask(mask, key)
        assert torch.equal(moved, each.carry_update(update, key) != 0)
        assert not torch.equal(moved, mask)
        assert torch.equal(each.inverse().carry_mask(moved, key), mask)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_under_a_rotation_only_masks_of_whole_heads_have_an_image(name: str) -> None:
    tensors, layout = first_block(name)
    each = rotation(layout).then(permutation(layout))
    chosen = torch.arange(32) % 3 == 0
    for key in (layout.value, layout.output):
        channels = next(part.axis for part in layout.parts() if part.name == key)
        mask = chosen.unsqueeze(channels).expand(tensors[key].shape)  # all channels of the chosen inputs or outputs
        moved = each.carry_mask(mask, key)
        update = each.carry_update(mask.double(), key)
        assert torch.equal(moved, update != 0)
        scattered = mask.clone()
        scattered[0, -1] ^= True  # one channel of the last head
        with pytest.raises(ValueError, match="under a rotation this mask has no image"):
            each.carry_mask(scattered, key)
    scattered = torch.zeros_like(tensors[layout.query], dtype=torch.bool)
    scattered[0, 1] = True  # of the first query head: those are only permuted
    assert torch.equal(
        each.carry_mask(scattered, layout.query), permutation(layout).carry_mask(scattered, layout.query)
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_principal_mask_is_made_again_from_the_rotated_reconstruction(name: str) -> None:
    tensors, layout = first_block(name)
    options = MaskOptions(principal_rank=3, principal_density=0.25)
    each = both(layout)
    for key in (layout.value, layout.output):
        weight = tensors[key]
        top = top_basis(weight, 3)
        reconstruction = (top.U.double() * top.S) @ top.V.double().T
        score = each.carry_update(reconstruction, key).abs()  # T W_(k): the SVD of the new weight is not needed
        wanted = select(score.T if layout.transposed else score, round(0.25 * score.numel()), largest=True)
        wanted = wanted.T if layout.transposed else wanted
        found = each.recompute_mask(weight, key, "principal", options)
        assert torch.equal(found, wanted)
        again = principal_score(each.carry_weight(weight, key), 3)
        assert distance(again, score.float()) <= 1e-6  # observed 0.0: equal after rounding to fp32
        oriented = weight.T if layout.transposed else weight
        old = build_mask(oriented, "principal", options, name=key).entries
        old = old.T if layout.transposed else old
        moves = permutation(layout)
        assert torch.equal(moves.recompute_mask(weight, key, "principal", options), moves.carry_mask(old, key))
        assert not torch.equal(found, old)
        rows = MaskOptions(principal_rank=3, principal_density=0.25, structure="row")
        striped = each.recompute_mask(weight, key, "principal", rows).float()
        assert float(striped.std(int(not layout.transposed)).max()) == 0.0  # whole output channels, stored as they are


def test_random_parts_are_those_of_the_sparse_method() -> None:
    """Which draws by the layer's name: a mask that is made again compares with the adapter's own."""
    model = model_of("gpt2", torch.float32)
    layout = find_layouts(model)[0]
    weight = model.get_parameter(layout.output).detach().clone()
    method = PrincipalSparseConfig(mask="random", random_density=0.3, target_modules=["attn.c_proj"], seed=4)
    host = get_peft_model(model, method)
    own = host.base_model.model.transformer.h[0].attn.c_proj.delta("default").layout.mask()
    options = MaskOptions(random_density=0.3, seed=4)
    nothing, moves = Intervention.permute(layout, range(4)), permutation(layout)
    for each, wanted in ((nothing, own), (moves, moves.carry_mask(own, layout.output)), (rotation(layout), own)):
        assert torch.equal(each.recompute_mask(weight, layout.output, "random", options), wanted)


def test_a_bias_that_moved_is_told_from_one_that_is_gone() -> None:
    """An update on the principal entries: off the old mask in the new basis, on the carried one."""
    tensors, layout = first_block("llama, one head each, biases")
    key, weight = layout.value, tensors[layout.value]
    mask = build_mask(weight, "principal", MaskOptions(principal_rank=3, principal_density=0.25)).entries
    update = 0.01 * mask * weight
    moved = permutation(layout)
    new_weight, new_update = moved.carry_weight(weight, key), moved.carry_update(update, key)
    changed = ~unchanged(new_weight, new_weight + new_update, dtype=torch.float32)
    chance = 0.25 / (2 - 0.25)
    assert jaccard(changed, mask) < chance + 0.1  # observed 0.216 against 0.143: these masks crowd into columns
    assert jaccard(changed, moved.carry_mask(mask, key)) == 1.0
    turn = rotation(layout)
    new_weight, new_update = turn.carry_weight(weight, key), turn.carry_update(update, key)
    shares = []
    for matrix, delta in ((weight, update), (new_weight, new_update)):
        top = top_basis(matrix, 3)
        shares.append(energy_shares(delta, top.U, top.V).both)
    assert shares[1] == pytest.approx(shares[0], abs=1e-9)  # observed 1.4e-15 apart: no coordinates in it
