"""The model's function stays, and updates, gradients and masks arrive where the new basis has them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attention_models import (
    CONFIGS,
    KINDS,
    ROTARY,
    both,
    cached_logits_of,
    distance,
    first_block,
    logits_of,
    model_of,
    moved_by,
    permutation,
    rotation,
    state_of,
    tokens,
)
from helpers import base_bytes, relative_error
from offprincipal_peft.geometry import (
    AttentionLayout,
    Intervention,
    apply_interventions,
    find_layouts,
    haar_rotation,
    permute_heads,
    rotate,
)

CHANGED = 0.5  # a wrong variant moves logits of size 6 to 13 by more than this: observed 0.73 at least


MAKERS = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


# ---- the function stays


@MAKERS
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_stay_with_and_without_a_cache(name: str, make: Callable[[AttentionLayout], Intervention]) -> None:
    model = model_of(name)
    before, cached = logits_of(model), cached_logits_of(model)
    weights = state_of(model)
    changed = apply_interventions(model, [make(layout) for layout in find_layouts(model)])
    assert {key for key, value in state_of(model).items() if not torch.equal(value, weights[key])} == set(changed)
    assert len(changed) >= 4
    assert distance(logits_of(model), before) <= 1e-12  # logits up to 13; observed 2.7e-14 at most
    assert distance(cached_logits_of(model), cached) <= 1e-12  # observed 1.7e-14 at most


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_generation_stays(name: str) -> None:
    model = model_of(name)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    before = model.generate(tokens(), **options)
    apply_interventions(model, [both(layout) for layout in find_layouts(model)])
    assert torch.equal(model.generate(tokens(), **options), before)


def test_queries_and_keys_rotate_where_nothing_stands_between() -> None:
    model = model_of("gpt2")
    before = logits_of(model)
    layouts = find_layouts(model)
    turns = [
        Intervention.rotate_queries_and_keys(layout, haar_rotation(layout.head_dim, 5, heads=4)) for layout in layouts
    ]
    assert len(apply_interventions(model, turns)) == 4  # c_attn and its bias, twice; not c_proj
    assert distance(logits_of(model), before) <= 1e-12  # observed 7.1e-15
    apply_interventions(model, [turn.then(both(turn.layout)).then(turn) for turn in turns])
    assert distance(logits_of(model), before) <= 1e-12  # observed 1.2e-14


@pytest.mark.parametrize("name", ROTARY)
def test_a_rotation_of_queries_and_keys_is_refused_under_rotary_embedding(name: str) -> None:
    model = model_of(name)
    layout = find_layouts(model)[0]
    drawn = haar_rotation(layout.head_dim, 0)
    with pytest.raises(ValueError, match=r"self_attn: queries and keys pass a rotary embedding"):
        Intervention.rotate_queries_and_keys(layout, drawn)
    if layout.norm_width is not None:
        with pytest.raises(ValueError, match="queries and keys pass a qk-norm"):
            Intervention.rotate_queries_and_keys(replace(layout, rotary=False), drawn)
    lie = replace(layout, rotary=False, query_norm=None, key_norm=None, norm_width=None)
    turned = Intervention.rotate_queries_and_keys(lie, drawn).transform(state_of(model))
    assert moved_by(model, turned) > CHANGED  # observed 5.1 at least


# ---- wrong variants are seen


@pytest.mark.parametrize("name", CONFIGS)
def test_half_a_rotation_moves_the_logits(name: str) -> None:
    model = model_of(name)
    layout = find_layouts(model)[0]
    new = rotation(layout).transform(state_of(model))
    assert moved_by(model, new) <= 1e-12
    for left_out in new:  # v without o, o without v, and the bias of v left behind
        assert moved_by(model, {key: value for key, value in new.items() if key != left_out}) > CHANGED, left_out
    other_way = rotation(layout).inverse().transform(state_of(model))
    assert moved_by(model, new | {layout.output: other_way[layout.output]}) > CHANGED


@pytest.mark.parametrize("name", CONFIGS)
def test_half_a_permutation_moves_the_logits(name: str) -> None:
    model = model_of(name)
    layout = find_layouts(model)[0]
    new = permutation(layout).transform(state_of(model))
    assert moved_by(model, new) <= 1e-12
    for left_out in new:  # biases, gains and sinks among them; observed 0.99 at least
        alone = {key: value for key, value in new.items() if key != left_out}
        assert moved_by(model, alone) > CHANGED, left_out


def test_a_wrong_number_of_repeats_moves_the_logits() -> None:
    model = model_of("llama")  # 4 query heads on 2 key heads
    layout = find_layouts(model)[0]
    right = Intervention.permute(layout, [1, 0])
    assert right.query_order == (2, 3, 0, 1)
    interleaved = replace(right, query_order=(1, 0, 3, 2))  # as if head i read key head i % 2
    assert moved_by(model, right.transform(state_of(model))) <= 1e-12
    assert moved_by(model, interleaved.transform(state_of(model))) > CHANGED  # observed 9.9
    turn = rotation(layout)
    copies = turn.value_rotation
    assert copies is not None
    tiled = copies.repeat(2, 1, 1)  # R_0 R_1 R_0 R_1 for the query heads instead of R_0 R_0 R_1 R_1
    new = turn.transform(state_of(model))
    old = state_of(model)[layout.output]
    wrong = torch.einsum("nhc,hcd->nhd", old.unflatten(1, (4, 8)), tiled).flatten(1)
    assert moved_by(model, new | {layout.output: wrong}) > CHANGED  # observed 8.0


# ---- bytes, inverses, composition


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama, one head each, biases", "gpt2", "olmo2", "gpt-oss, sinks", "phi3"])
def test_a_permutation_and_its_inverse_restore_the_bytes(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    layouts = find_layouts(model)
    with torch.no_grad():  # what arithmetic would not bring back
        model.get_parameter(layouts[0].query)[0, :3] = torch.tensor([-0.0, float("nan"), float("-inf")])
    before = base_bytes(model)
    forth = [permutation(layout) for layout in layouts]
    assert apply_interventions(model, forth)
    assert base_bytes(model) != before
    apply_interventions(model, [each.inverse() for each in forth])
    assert base_bytes(model) == before


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # two roundings of about eps / 5 each in norm; observed 6.4e-16, 2.4e-8, 1.8e-4, 1.5e-3
    [(torch.float64, 2e-15), (torch.float32, 6e-8), (torch.float16, 4e-4), (torch.bfloat16, 3e-3)],
    ids=str,
)
def test_a_rotation_and_its_inverse_restore_up_to_rounding(dtype: torch.dtype, bound: float) -> None:
    for name in ("llama", "gpt2"):
        tensors, layout = first_block(name, dtype)
        there = both(layout).transform(tensors)
        assert all(value.dtype == dtype for value in there.values())
        back = both(layout).inverse().transform(tensors | there)
        assert max(relative_error(back[key], tensors[key]) for key in back) <= bound


def test_a_rotation_in_bf16_is_the_fp64_one_rounded_once() -> None:
    tensors, layout = first_block("llama", torch.bfloat16)
    turn = rotation(layout).then(permutation(layout))
    exact = turn.transform({key: value.double() for key, value in tensors.items()})
    for key, value in turn.transform(tensors).items():
        assert torch.equal(value, exact[key].to(torch.bfloat16)), key


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama, one key head"])
def test_composition_is_one_after_the_other(name: str) -> None:
    tensors, layout = first_block(name)
    steps = [rotation(layout), permutation(layout), rotation(layout, seed=2), permutation(layout, shift=-1)]
    if not layout.rotary:
        steps.insert(2, Intervention.rotate_queries_and_keys(layout, haar_rotation(8, 9, heads=4)))
    one_by_one, whole = tensors, steps[0]
    for step in steps:
        one_by_one = one_by_one | step.transform(one_by_one)
    for step in steps[1:]:
        whole = whole.then(step)
    assert not whole.is_permutation
    at_once = tensors | whole.transform(tensors)
    assert max(relative_error(at_once[key], one_by_one[key]) for key in tensors) <= 1e-15  # observed 2.1e-16
    undone = whole.then(whole.inverse())
    assert undone.kv_order == tuple(range(layout.n_kv_heads))
    assert undone.query_order == tuple(range(layout.n_heads))
    eye = torch.eye(layout.head_dim, dtype=torch.float64)
    assert undone.value_rotation is not None
    assert distance(undone.value_rotation, eye.expand_as(undone.value_rotation)) <= 1e-14  # observed 8.9e-16
    nothing = permutation(layout).then(permutation(layout).inverse())
    assert nothing.is_permutation
    assert nothing.moved_names() == ()


def test_orders_that_do_not_commute_compose_in_turn() -> None:
    layout = AttentionLayout("", 6, 3, 2, "q", "k", "v", "o")
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (12, 5), "k": (6, 5), "v": (6, 5), "o": (5, 12)}
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    first = Intervention.permute(layout, [1, 2, 0], [[1, 0], [0, 1], [0, 1]])
    second = Intervention.permute(layout, [0, 2, 1], [[0, 1], [1, 0], [0, 1]])
    assert first.query_order == (3, 2, 4, 5, 0, 1)
    one_by_one = tensors | first.transform(tensors)
    one_by_one |= second.transform(one_by_one)
    at_once = first.then(second).transform(tensors)
    assert all(torch.equal(at_once[name], one_by_one[name]) for name in tensors)
    other_way = second.then(first).transform(tensors)
    assert not any(torch.equal(at_once[name], other_way[name]) for name in tensors)


# ---- whole models


def test_selected_layers_only_and_several_on_one_block() -> None:
    model = model_of("llama")
    first, second = find_layouts(model)
    before = state_of(model)
    everything = [permutation(first), rotation(first), permutation(second)]
    changed = apply_interventions(model, everything, layers=[0])
    assert changed == tuple(permutation(first).moved_names())
    after = state_of(model)
    expected = before | permutation(first).then(rotation(first)).transform(before)
    assert all(torch.equal(after[key], expected[key]) for key in after)
    with pytest.raises(ValueError, match=r"no intervention on layers \[7\]; there are some on model.layers.0"):
        apply_interventions(model, everything, layers=[0, 7])
    assert all(torch.equal(value, after[key]) for key, value in state_of(model).items())


def test_a_state_dict_changes_as_the_model_does() -> None:
    model, tensors = model_of("gpt2"), state_of(model_of("gpt2"))
    interventions = [both(layout) for layout in find_layouts(tensors, num_attention_heads=4)]
    places = {key: value.data_ptr() for key, value in tensors.items()}
    assert apply_interventions(tensors, interventions) == apply_interventions(model, interventions)
    assert all(torch.equal(value, tensors[key]) for key, value in state_of(model).items())
    assert all(value.data_ptr() == places[key] for key, value in tensors.items())


def test_the_functions_leave_their_tensors_alone() -> None:
    tensors, layout = first_block("llama")
    before = {key: value.clone() for key, value in tensors.items()}
    drawn = haar_rotation(8, 0)
    assert rotate(tensors, layout, drawn).keys() == {layout.value, layout.output}
    assert permute_heads(tensors, layout, [1, 0]).keys() == {layout.query, layout.key, layout.value, layout.output}
    assert permute_heads(tensors, layout, [0, 1]) == {}
    assert permute_heads(tensors, layout, [0, 1], [[1, 0], [0, 1]]).keys() == {layout.query, layout.output}
    assert all(torch.equal(value, before[key]) for key, value in tensors.items())
    turn = Intervention.rotate_values(layout, drawn)
    drawn.zero_()  # the caller's tensor is the caller's
    assert turn.value_rotation is not None
    assert float(turn.value_rotation.abs().sum()) > 0


def test_a_block_is_written_whole_or_not_at_all() -> None:
    tensors = state_of(model_of("llama"))
    layouts = find_layouts(tensors, num_attention_heads=4, num_key_value_heads=2)
    with torch.inference_mode():  # a tensor that refuses to be written, after three others of its block
        tensors[layouts[0].output] = tensors[layouts[0].output].clone()
    before = base_bytes(Holder(tensors))
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        apply_interventions(tensors, [permutation(layout) for layout in layouts])
    assert base_bytes(Holder(tensors)) == before
    del tensors[layouts[1].output]  # seen before anything is written
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn: there is no tensor 'model\.layers\.1.*o_proj"):
        apply_interventions(tensors, [permutation(layout) for layout in layouts])
    assert base_bytes(Holder(tensors)) == {k: v for k, v in before.items() if "layers_1_self_attn_o" not in k}


class Holder(nn.Module):
    """Tensors as buffers, for `base_bytes`."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor)


# ---- refusals


def test_rotations_and_orders_that_are_none_are_refused() -> None:
    _, layout = first_block("llama")
    with pytest.raises(ValueError, match=r"shape \(4, 4\), but \(8, 8\) for all heads or \(2, 8, 8\)"):
        Intervention.rotate_values(layout, haar_rotation(4, 0))
    with pytest.raises(ValueError, match=r"not orthogonal within 1e-10: .* make it in fp64"):
        Intervention.rotate_values(layout, haar_rotation(8, 0).float())
    with pytest.raises(ValueError, match=r"kv_order = \(0, 0\) is no permutation of 0 to 1"):
        Intervention.permute(layout, [0, 0])
    with pytest.raises(ValueError, match=r"within\[1\] = \(0, 2\) is no permutation of 0 to 1"):
        Intervention.permute(layout, [1, 0], [[0, 1], [0, 2]])
    with pytest.raises(ValueError, match="within has 1 orders for 2 groups"):
        Intervention.permute(layout, [1, 0], [[0, 1]])
    with pytest.raises(ValueError, match="different layouts"):
        rotation(layout).then(rotation(replace(layout, name="other")))


def test_tensors_that_cannot_be_carried_are_refused() -> None:
    tensors, layout = first_block("llama", torch.float16)
    each = rotation(layout)
    weight = tensors[layout.value]
    with pytest.raises(ValueError, match=r"no head channels in a tensor 'lm_head.weight'; it has them in model"):
        each.carry_update(weight, "lm_head.weight")
    with pytest.raises(ValueError, match=r"shape \(8, 32\), but axis 0 must hold 16 head channels"):
        each.carry_update(weight[:8], layout.value)
    with pytest.raises(TypeError, match=r"a mask must be boolean, got torch\.float16"):
        each.carry_mask(weight, layout.value)
    with pytest.raises(ValueError, match=r"is torch\.bool, not floating point"):
        each.carry_update(weight != 0, layout.value)
    with pytest.raises(ValueError, match="has no data"):
        each.transform({key: value.to("meta") for key, value in tensors.items()})
    with pytest.raises(ValueError, match="NaN or infinite entries, which a rotation would spread"):
        each.carry_weight(weight / 0, layout.value)
    with pytest.raises(ValueError, match=r"rotated entries are too large for torch\.float16"):
        each.carry_weight(torch.full_like(weight, 60000.0), layout.value)
