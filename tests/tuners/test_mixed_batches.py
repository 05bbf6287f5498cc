"""Batches whose samples name their adapters (`adapter_names`): each sample as with its own adapter alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedModel, T5Config, T5ForConditionalGeneration

from helpers import SPECIAL_TOKENS, assert_same_base, base_bytes, relative_error, token_batch
from lifecycle import config, gradients, logits, tiny, train, trainable
from offprincipal_peft.tuners.principal_sparse import PrincipalSparseLinear
from quantized import quantized
from sparse_models import SOME, masked, names, restored_bytes, same_bits, sparse_config, sparse_layers

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny,
    "gpt2": lambda: tiny("gpt2"),
    "bf16": lambda: tiny(dtype=torch.bfloat16),
    "nf4": lambda: quantized("nf4"),
    "nf4 double": lambda: quantized("nf4 double"),
    "int8": lambda: quantized("int8"),
}
METHODS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "off-principal": (
        lambda **options: config("pissa", **options),
        lambda **options: config("offprincipal", **options),
    ),
    "sparse": (
        lambda **options: sparse_config(mask="low", low_density=0.3, **options),
        lambda **options: sparse_config(mask="random(principal)", low_density=0.3, **options),
    ),
}
ORDER = ["two", "__base__", "default", "two", "default", "__base__"]
ROWS = token_batch(128, batch=len(ORDER), length=9, seed=4)


def two(method: str, base: Callable[[], Any] = tiny, first: Any = None, second: Any = None) -> PeftModel:
    """Adapters "default" (active) and "two", trained far enough to say other things, in eval mode."""
    make = METHODS[method]
    host = get_peft_model(base(), make[0](**(first or {})))
    train(host, 2, by=masked(host, 5e-2))
    host.add_adapter("two", make[1](**(second or {})))
    host.set_adapter("two")
    train(host, 2, by=masked(host, 5e-2))
    host.set_adapter("default")
    return host.eval()


def with_one(host: PeftModel, name: str, use: Callable[[], Tensor]) -> Tensor:
    if name == "__base__":
        with host.disable_adapter():
            return use()
    host.set_adapter(name)
    out = use()
    host.set_adapter("default")
    return out


def alone(host: PeftModel, use: Callable[[Tensor], Tensor], rows: Tensor = ROWS, order: Any = ORDER) -> list[Tensor]:
    """Each row's result with its adapter alone, in batches of one adapter as a mixed batch forms them."""
    results: dict[int, Tensor] = {}
    for name in dict.fromkeys(order):
        mine = [i for i, other in enumerate(order) if other == name]
        out = with_one(host, name, lambda mine=mine: use(rows[mine]))
        results.update(zip(mine, out, strict=True))
    return [results[i] for i in range(len(order))]


def assert_close(mixed: Tensor, single: list[Tensor], bar: float = 1e-6) -> None:
    """Seen 4.5e-8 in fp32, where products of other numbers of rows may be summed in another order; 0 in bf16."""
    for number, (row, want) in enumerate(zip(mixed, single, strict=True)):
        assert relative_error(row, want) <= bar, number


@torch.no_grad()
def mixed_logits(host: nn.Module, order: list[str] | None = None, rows: Tensor = ROWS) -> Tensor:
    return host(input_ids=rows, adapter_names=order or ORDER).logits


# -- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_each_sample_as_with_its_own_adapter(method, base):
    host = two(method, BASES[base])
    with host.disable_adapter():
        logits(host)  # quantised layers take their form for eval mode now
        before = base_bytes(host)
    want = logits(host)
    single = alone(host, lambda rows: logits(host, rows))
    assert_close(mixed_logits(host), single, 1e-6 if single[0].dtype == torch.float32 else 0.0)
    assert relative_error(single[0], single[3]) > 0.01 and relative_error(single[0], logits(host, ROWS[:1])[0]) > 0.01
    assert host.active_adapters == ["default"]
    assert torch.equal(logits(host), want)
    with host.disable_adapter():
        assert_same_base(before, base_bytes(host))
    assert {n.split(".default.")[0] for n in trainable(host)} and not [n for n in trainable(host) if ".two." in n]


@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_every_precision_of_sparse_values(dtype, precision):
    host = two("sparse", lambda: tiny(dtype=dtype), {"precision": precision}, {"precision": precision})
    values = {name: p.detach().clone() for name, p in host.named_parameters() if "princsparse" in name}
    before = restored_bytes(host)
    single = alone(host, lambda rows: logits(host, rows))
    assert_close(mixed_logits(host), single, 1e-6 if dtype == torch.float32 else 0.0)
    assert_same_base(before, restored_bytes(host))
    assert all(same_bits(p.detach(), values[name]) for name, p in host.named_parameters() if name in values)


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_one_name_are_bit_equal(method):
    host = two(method)
    for name in ("default", "two", "__base__"):
        want = with_one(host, name, lambda: logits(host, ROWS))
        assert torch.equal(mixed_logits(host, [name] * len(ROWS)), want), name


@pytest.mark.parametrize("method", METHODS)
def test_adapters_on_different_layers(method):
    host = two(
        method,
        first={"target_modules": ["q_proj", "up_proj"]},
        second={"target_modules": ["up_proj", "down_proj"], "layers_to_transform": [1]},
    )
    assert_close(mixed_logits(host), alone(host, lambda rows: logits(host, rows)))


@pytest.mark.parametrize("method", METHODS)
def test_modules_to_save(method):
    targets = {"target_modules": ["q_proj", "up_proj"]}
    host = two(method, first=targets | {"modules_to_save": ["lm_head"]}, second=targets)
    heads = host.base_model.model.lm_head
    assert not torch.equal(heads.modules_to_save["default"].weight, heads.original_module.weight)
    order = ["default", "__base__", "default"]
    single = alone(host, lambda rows: logits(host, rows), ROWS[:3], order)
    assert_close(mixed_logits(host, order, ROWS[:3]), single)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_is_still_to_start_starts(method, tmp_path):
    host = two(method)
    host.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    loaded.load_adapter(tmp_path / "two", "two")
    assert torch.equal(mixed_logits(loaded), mixed_logits(host))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_a_mixed_batch_are_those_of_its_rows_or_refused(method):
    """In eval mode with gradients: what flows to the inputs comes through each row's own weights."""
    host = two(method)
    embeddings = host.get_input_embeddings()(ROWS).detach()

    def flow(order: list[str]) -> Tensor:
        inputs = embeddings.clone().requires_grad_()
        host(inputs_embeds=inputs, adapter_names=order).logits.square().mean().backward()
        assert inputs.grad is not None
        return inputs.grad

    want = {name: flow([name] * len(ORDER)) for name in ("default", "__base__")}
    order = ["__base__", "default"] * 3
    try:
        got = flow(order)
    except (RuntimeError, ValueError) as error:
        assert "adapter" in str(error)
        return
    for row, name in enumerate(order):
        assert relative_error(got[row], want[name][row]) < 1e-4, (row, name)


# -- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("base", ["llama", "gpt2", "nf4", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_generate(method, base, beams):
    host = two(method, BASES[base])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    ids = ROWS[:1].repeat(len(ORDER), 1)
    logits(host)  # quantised layers take their form for eval mode now
    before = restored_bytes(host)

    def one(rows: Tensor) -> Tensor:
        return host.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **options)

    single = alone(host, one, ids)
    got = host.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=ORDER, **options)
    assert torch.equal(got, torch.stack(single))
    assert len({tuple(row.tolist()) for row in got}) == 3
    assert_same_base(before, restored_bytes(host))
    assert not [h for m in host.modules() for h in m._forward_pre_hooks]


def tiny_t5() -> PreTrainedModel:
    settings = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=128, dropout_rate=0.0,
                        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)  # fmt: skip
    return T5ForConditionalGeneration(settings).eval()


def tiny_bart() -> PreTrainedModel:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
             (("layers", 2), ("ffn_dim", 64), ("attention_heads", 4))}  # fmt: skip
    settings = BartConfig(d_model=32, vocab_size=128, max_position_embeddings=64, decoder_start_token_id=2, dropout=0.0,
                          forced_eos_token_id=None, **SPECIAL_TOKENS, **sizes)  # fmt: skip
    return BartForConditionalGeneration(settings).eval()


SEQ2SEQ = {"t5": (tiny_t5, ["q", "v", "wo"]), "bart": (tiny_bart, ["q_proj", "v_proj", "fc2"])}


@pytest.mark.parametrize("family", SEQ2SEQ)
@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_and_a_decoder(method, family):
    build, targets = SEQ2SEQ[family]
    torch.manual_seed(0)
    base = build()
    options = {"target_modules": targets, "task_type": "SEQ_2_SEQ_LM"}
    host = get_peft_model(base, METHODS[method][0](**options))
    host.add_adapter("two", METHODS[method][1](**options))
    for name in ("default", "two"):
        host.set_adapter(name)
        by = torch.optim.AdamW(trainable(host).values(), lr=3e-2)
        for _ in range(2):
            host(input_ids=ROWS, labels=ROWS).loss.backward()
            by.step()
            by.zero_grad()
    host.set_adapter("default")
    host.eval()
    before = restored_bytes(host)
    with torch.no_grad():
        single = alone(host, lambda rows: host(input_ids=rows, labels=rows).logits)
        assert_close(host(input_ids=ROWS, labels=ROWS, adapter_names=ORDER).logits, single)
    for beams in (1, 2):
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
        single = alone(host, lambda rows, settings=settings: host.generate(input_ids=rows, **settings))
        assert torch.equal(host.generate(input_ids=ROWS, adapter_names=ORDER, **settings), torch.stack(single)), beams
    assert_same_base(before, restored_bytes(host))


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["llama", "nf4"])
def test_errors_leave_the_model_as_it_was(base, method):
    host = two(method, BASES[base])
    want, before = logits(host), restored_bytes(host)
    wrong = {
        "same as the number of inputs, but got (2 and 6|6 and 2)": ["default", "two"],
        "non-existing adapter.*nobody": ["default"] * 5 + ["nobody"],
    }
    for words, order in wrong.items():
        for use in (mixed_logits, lambda h, o: h.generate(input_ids=ROWS, adapter_names=o, max_new_tokens=2)):
            with pytest.raises(ValueError, match=words):
                use(host, order)
    with pytest.raises(ValueError, match="training mode"):
        mixed_logits(host.train())
    host.eval().merge_adapter(["default"])
    with pytest.raises(ValueError, match="merged adapters"):
        mixed_logits(host)
    host.unmerge_adapter()
    assert torch.equal(logits(host), want)
    assert_same_base(before, restored_bytes(host))
    assert not [h for m in host.modules() for h in m._forward_pre_hooks]


@pytest.mark.parametrize("method", METHODS)
def test_an_error_inside_the_batch_leaves_the_model_as_it_was(method):
    host = two(method)
    want, before = logits(host, ROWS), restored_bytes(host)
    last = host.base_model.model.model.layers[1].mlp.down_proj.base_layer

    def failing(*_: Any) -> None:
        raise MemoryError("no memory left")

    handle = last.register_forward_pre_hook(failing)
    with pytest.raises(MemoryError):
        mixed_logits(host)
    handle.remove()
    assert torch.equal(logits(host, ROWS), want)
    assert_same_base(before, restored_bytes(host))


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_after_a_mixed_batch(method):
    host, twin = two(method), two(method)
    want = gradients(twin)
    mixed_logits(host)
    got = gradients(host)
    assert all(torch.equal(got[name], gradient) for name, gradient in want.items())
    for model in (host, twin):
        train(model, 1, by=masked(model))
        if model is host:
            mixed_logits(host)
    assert torch.equal(logits(host), logits(twin))


def test_disabled_adapters_and_a_hand_made_call():
    host = two("sparse")
    base = logits(tiny(), ROWS)
    with host.disable_adapter():
        assert torch.equal(mixed_logits(host), base)
    assert all(isinstance(layer, PrincipalSparseLinear) for layer in sparse_layers(host).values())
    layer = next(iter(sparse_layers(host).values()))
    x = torch.randn(3, 32)
    with torch.no_grad():
        got = layer(x, adapter_names=["default", "two", "__base__"])
        for row, name in enumerate(("default", "two", "__base__")):
            want = with_one(host, name, lambda row=row: layer(x[row : row + 1]))
            assert relative_error(got[row], want[0]) < 1e-6
