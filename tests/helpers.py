"""Devices, tolerances, tiny models of real architectures, bit-exact comparison of base weights."""

import hashlib
from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

# The CPU always runs; parametrize a test over this and a GPU is used where there is one.
DEVICES: tuple[str, ...] = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

# One rounding to the dtype, nothing more: a test starts from here and widens by a factor that it justifies
# with the value it observed.
LOWEST_TOLERANCES: dict[torch.dtype, float] = {
    dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}

WEIGHT_STD = 0.05
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tolerances(dtype: torch.dtype, ulps: float = 1.0, scale: float = 1.0) -> dict[str, float]:
    """`rtol` and `atol` for `torch.testing.assert_close`.

    `ulps`: the roundings to `dtype` granted; `scale`: the magnitude of the compared values, for `atol`.
    """
    rtol = ulps * LOWEST_TOLERANCES[dtype]
    return {"rtol": rtol, "atol": rtol * scale}


def relative_error(
    actual: Tensor,  # any shape
    expected: Tensor,  # the same shape
) -> float:
    """‖actual − expected‖ / ‖expected‖ (Frobenius) in fp64; the plain difference where `expected` is zero."""
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    truth = expected.detach().to("cpu", torch.float64)
    difference = (actual.detach().to("cpu", torch.float64) - truth).norm().item()
    size = truth.norm().item()
    return difference / size if size else difference


def _with_drawn_weights(
    build: Callable[[PreTrainedConfig], PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    seed: int,
) -> PreTrainedModel:
    """Every matrix and bias from N(0, 0.05), every norm's gain from N(1, 0.05).

    Drawn in fp32 and then rounded, so that a bf16 model is the rounding of the fp32 one. Square Gaussian
    matrices have no repeated singular values, which a freshly initialised model's zeros and ones would give.
    The global random state stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        model = build(config)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            mean = 1.0 if is_norm and name == "weight" else 0.0
            drawn = torch.normal(mean, WEIGHT_STD, parameter.shape, generator=generator)
            parameter.data = drawn.to(dtype)  # not model.to(dtype): rotary frequencies stay fp32
    if model.config.tie_word_embeddings:
        model.tie_weights()
    model.config.dtype = dtype
    return model.eval()


def tiny_llama(
    dtype: torch.dtype = torch.float32,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 176,
    vocab: int = 128,
    tie: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Wide and tall matrices, grouped key and value heads, no biases."""
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        **SPECIAL_TOKENS,
    )
    return _with_drawn_weights(LlamaForCausalLM, config, dtype, seed)


def tiny_qwen2(
    dtype: torch.dtype = torch.float32,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 176,
    vocab: int = 128,
    tie: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Like `tiny_llama`, with biases on the query, key and value projections."""
    config = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        **SPECIAL_TOKENS,
    )
    return _with_drawn_weights(Qwen2ForCausalLM, config, dtype, seed)


def tiny_gpt2(
    dtype: torch.dtype = torch.float32,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    vocab: int = 128,
    tie: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """`Conv1D` layers: the weight is stored transposed, [in, out]. No dropout."""
    config = GPT2Config(
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        vocab_size=vocab,
        n_positions=128,
        tie_word_embeddings=tie,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **SPECIAL_TOKENS,
    )
    return _with_drawn_weights(GPT2LMHeadModel, config, dtype, seed)


def token_batch(vocab: int, batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Token ids [batch, length], int64, without the special tokens (a padding row has no gradient)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL_TOKENS), vocab, (batch, length), generator=generator)


def _adapter_scopes(model: nn.Module) -> list[tuple[str, str]]:
    """(a PEFT wrapper's path, the path of the base module in it); what is only in the first is adapter."""
    scopes = []
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BaseTunerLayer):
            scopes.append((f"{path}.", f"{path}.base_layer."))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            scopes.append((f"{path}.", f"{path}.original_module."))
    return scopes


def _digest(tensor: Tensor) -> str:
    """A hash of dtype, shape and bytes: −0.0 and 0.0 differ, NaNs compare by their bits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    header = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.blake2b(header + flat.numpy().tobytes(), digest_size=16).hexdigest()


def base_bytes(model: nn.Module) -> dict[str, str]:
    """A hash for every parameter and buffer of the base model, by its name without PEFT's wrappers.

    The names are the same for the bare model, with adapters on it, and after they are unloaded.
    """
    scopes = _adapter_scopes(model)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    found = {}
    for name, tensor in tensors:
        if any(name.startswith(outer) and not name.startswith(inner) for outer, inner in scopes):
            continue
        plain = name.removeprefix("base_model.model.")
        plain = plain.replace(".base_layer.", ".").replace(".original_module.", ".")
        if plain in found:
            raise ValueError(f"two base tensors are both called {plain!r}")
        found[plain] = _digest(tensor)
    return found


def assert_same_base(before: dict[str, str], after: dict[str, str]) -> None:
    """Two results of `base_bytes` are equal bit for bit; otherwise names every tensor that is not."""
    assert before, "nothing to compare: `before` holds no tensor"
    complaints = {
        "gone": sorted(before.keys() - after.keys()),
        "new": sorted(after.keys() - before.keys()),
        "changed": sorted(name for name in before.keys() & after.keys() if before[name] != after[name]),
    }
    assert not any(complaints.values()), "base tensors differ: " + "; ".join(
        f"{kind}: {', '.join(names)}" for kind, names in complaints.items() if names
    )
