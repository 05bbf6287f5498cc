"""Running a masked adapter: checkpointing, autocast, copies, casts, generation, the sync to an inference engine."""

import copy
import pickle

import peft
import pytest
import torch
from torch import nn
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

from helpers import assert_same_base, base_bytes, relative_error
from lifecycle import DTYPES, IDS, OTHER_IDS, assert_same_tensors, gradients, logits, tiny, trainable
from sparse_models import (
    BF16_PRECISIONS,
    SOME,
    STORED,
    adapted,
    counted_writes,
    deltas,
    masked,
    names,
    packed_values,
    pristine_weights,
    restored_bytes,
    same_bits,
    sparse_config,
    sparse_layers,
    train_masked,
    trained,
)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize(("family", "dtype", "precision"), [("llama", *STORED[2]), ("gpt2", *STORED[0])], ids=names)
def test_gradient_checkpointing_gives_the_same_gradients(family, dtype, precision, reentrant):
    host = trained(family, dtype, precision=precision).train()
    want = gradients(host)
    host.enable_input_require_grads()
    host.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same_tensors(gradients(host), want)


@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_training_under_bf16_autocast(dtype, precision):
    host = adapted(dtype=dtype, precision=precision).train()
    by = masked(host)
    losses = []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            out = host(input_ids=IDS, labels=IDS)
            with torch.no_grad():
                assert torch.equal(host(input_ids=IDS).logits, out.logits)
        out.loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trainable(host).values())
        by.step()
        by.zero_grad()
        losses.append(out.loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_gradients_accumulate(dtype, precision):
    host = trained(dtype=dtype, precision=precision)
    alone = [gradients(host, ids) for ids in (IDS, OTHER_IDS)]
    for ids in (IDS, OTHER_IDS):
        host(input_ids=ids, labels=ids).loss.backward()
    for name, p in trainable(host).items():
        assert torch.equal(p.grad, alone[0][name] + alone[1][name])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda host: pickle.loads(pickle.dumps(host))], ids=["deep", "pickle"]
)
@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_a_copy_is_its_own_model(dtype, precision, copied):
    host, alone = (trained(dtype=dtype, precision=precision) for _ in range(2))
    want, values = logits(host), packed_values(host)
    again = copied(host)
    assert torch.equal(logits(again), want)
    train_masked(again, 2)
    assert_same_tensors(packed_values(host), values)
    assert torch.equal(logits(host), want)
    train_masked(alone, 2)
    assert_same_tensors(packed_values(again), packed_values(alone))
    train_masked(host, 2)
    assert_same_tensors(packed_values(host), packed_values(alone))
    assert_same_base(restored_bytes(host), restored_bytes(again))


CASTS = {"bfloat16": lambda host: host.to(torch.bfloat16), "half": nn.Module.half, "float": nn.Module.float}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_a_cast_of_the_model_leaves_the_update_alone(dtype, cast):
    host = trained(dtype=dtype)
    values = {name: delta.values().clone() for name, delta in deltas(host).items()}
    CASTS[cast](host)
    for name, delta in deltas(host).items():
        assert delta.weight.dtype == torch.float32 and same_bits(delta.values(), values[name])
    bare = CASTS[cast](tiny(dtype=dtype))
    weights = pristine_weights(bare, host)
    for name, delta in deltas(host).items():
        layer, W0 = sparse_layers(host)[name], weights[name]
        layer.realise("default")
        want = (delta.layout.gather(W0) + values[name]).to(W0.dtype)
        assert same_bits(delta.layout.gather(layer.stored_matrix()), want)
    assert_same_base(base_bytes(bare), restored_bytes(host))


@pytest.mark.parametrize("written", [True, False], ids=["written", "disabled"])
@pytest.mark.parametrize("precision", BF16_PRECISIONS)
def test_a_model_that_is_cast_and_cast_back_keeps_its_16_bit_values(precision, written):
    host = trained(dtype=torch.bfloat16, precision=precision).to(torch.bfloat16)  # rotary frequencies too
    before, want, values = restored_bytes(host), logits(host), packed_values(host)
    host.float()
    with pytest.raises(RuntimeError, match=r"q_proj.*bfloat16 weight, which is torch.float32 now.*Cast the model back"):
        logits(host)
    if not written:
        with host.disable_adapter():
            logits(host)
    host.to(torch.bfloat16)
    assert torch.equal(logits(host), want)
    assert_same_tensors(packed_values(host), values)
    assert_same_base(before, restored_bytes(host))


@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_generate_writes_every_layer_once(dtype, precision):
    host = trained(dtype=dtype, precision=precision)
    greedy = {"max_new_tokens": 5, "do_sample": False, "use_cache": False}
    with counted_writes() as counts:
        out = host.generate(input_ids=IDS, output_logits=True, return_dict_in_generate=True, **greedy)
    assert set(counts.values()) == {1} and len(counts) == 14
    ids, scores = IDS, []
    for _ in range(5):
        scores.append(logits(host, ids)[:, -1].float())
        ids = torch.cat([ids, scores[-1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(out.sequences, ids)
    for got, want in zip(out.logits, scores, strict=True):
        assert relative_error(got, want) < 1e-6  # observed: 0.0
    merged = host.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=IDS, **greedy), ids)


# -- what TRL sends to an inference engine ----------------------------------------------------------------------------


def tiny_granite_moe():
    """Its experts lie in a module called block_sparse_moe, which a prefix "sparse_" would match too."""
    config = GraniteMoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return GraniteMoeForCausalLM(config).eval()


def sent(host, prefix: str) -> dict[str, torch.Tensor]:
    """The names and tensors of TRL's sync between merge_adapter() and unmerge_adapter() (vllm_generation.py)."""
    found = {}
    host.merge_adapter()
    for name, parameter in host.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if prefix in name or "original_module" in name:
            continue
        found[name.replace("modules_to_save.default.", "")] = parameter.detach().clone()
    host.unmerge_adapter()
    return found


@pytest.mark.parametrize("precision", ["fp32", "split"])
def test_a_sync_sends_every_tensor_with_the_merged_values(precision):
    bare = tiny_granite_moe().to(torch.bfloat16)
    before = base_bytes(bare)
    config = sparse_config(precision=precision, target_modules=["q_proj", "v_proj"])
    host = peft.get_peft_model(copy.deepcopy(bare), config)
    train_masked(host, 2)
    tensors = sent(host, host.base_model.prefix)
    assert tensors.keys() == dict(bare.named_parameters()).keys()
    assert any("block_sparse_moe" in name for name in tensors)
    assert_same_base(before, base_bytes(host))
    assert_same_tensors(tensors, dict(copy.deepcopy(host).merge_and_unload().named_parameters()))
    changed = {name for name, p in bare.named_parameters() if not torch.equal(p, tensors[name])}
    assert changed == {f"model.layers.{i}.self_attn.{part}.weight" for i in (0, 1) for part in ("q_proj", "v_proj")}
    lost = tensors.keys() - sent(host, "sparse_").keys()
    assert lost and all("block_sparse_moe" in name for name in lost)
