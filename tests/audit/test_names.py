"""What a weight is, by its name: kind, layer, embedding or not, and where heads begin and end."""

import pytest

from offprincipal_peft.audit import ModelConfig, names

LLAMA = ModelConfig(num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "q_proj", 3),
        ("layers.12.mlp.down_proj.weight", "down_proj", 12),
        ("model.layers.0.self_attn.q_proj.bias", "q_proj.bias", 0),
        ("model.layers.7.mlp.experts.5.up_proj.weight", "up_proj", 7),  # the layer, not the expert
        ("model.layers.7.mlp.experts.gate_up_proj", "experts.gate_up_proj", 7),
        ("transformer.h.11.attn.c_attn.weight", "c_attn", 11),
        ("model.layers.1.input_layernorm.weight", "input_layernorm", 1),
        ("model.norm.weight", "norm", None),
        ("model.embed_tokens.weight", "embed_tokens", None),
        ("lm_head.weight", "lm_head", None),
        ("weight", "weight", None),
        ("0.weight", "weight", 0),
        ("model.layers.2.mlp.conv1d.weight", "conv1d", 2),
    ],
)
def test_kind_and_layer(name: str, kind: str, layer: int | None) -> None:
    assert names.place(name) == names.Place(kind, layer)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("lm_head.weight", True),
        ("model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("model.language_model.embed_tokens.weight", True),
        ("transformer.wpe.weight", False),  # positions are not the vocabulary's
        ("model.layers.0.attention.self.output.dense.weight", False),
        ("my_lm_head.weight", False),
        ("lm_head.bias", False),
    ],
)
def test_embeddings_and_heads_are_known_by_their_last_parts(name: str, is_one: bool) -> None:
    assert names.is_embedding(name) is is_one


@pytest.mark.parametrize(
    ("kind", "shape", "edges"),
    [
        ("q_proj", (64, 48), ([0, 16, 32, 48, 64], [])),
        ("k_proj", (32, 48), ([0, 16, 32], [])),
        ("v_proj", (32, 48), ([0, 16, 32], [])),
        ("o_proj", (48, 64), ([], [0, 16, 32, 48, 64])),
        ("q_proj", (66, 48), ([], [])),  # no whole heads
        ("q_proj", (64,), ([], [])),
        ("up_proj", (64, 48), ([], [])),
    ],
)
def test_heads_lie_among_outputs_or_inputs(
    kind: str, shape: tuple[int, ...], edges: tuple[list[int], list[int]]
) -> None:
    assert names.heads(f"model.layers.0.x.{kind}.weight", shape, LLAMA) == edges


def test_heads_without_a_config_and_without_groups() -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    assert names.heads(name, (32, 8), ModelConfig()) == ([], [])
    assert names.heads(name, (32, 8), ModelConfig(num_attention_heads=2)) == ([0, 16, 32], [])


@pytest.mark.parametrize("count", [0, -4])
def test_a_config_without_a_number_of_heads_has_no_boundaries(count: int) -> None:
    query, key = (f"model.layers.0.self_attn.{kind}.weight" for kind in ("q_proj", "k_proj"))
    assert names.heads(query, (64, 48), ModelConfig(num_attention_heads=count)) == ([], [])
    assert names.heads(key, (64, 48), ModelConfig(num_attention_heads=4, num_key_value_heads=-2)) == ([], [])


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "visual.blocks.0.attn.q_proj.weight",
        "audio_tower.layers.0.self_attn.out_proj.weight",
        "model.layers.0.mamba.out_proj.weight",
    ],
)
def test_heads_are_those_of_the_language_model_alone(name: str) -> None:
    """config.json's number is of its text part: it may divide another tower's rows and be wrong there."""
    assert names.heads(name, (64, 64), LLAMA) == ([], [])


def test_heads_of_a_known_size() -> None:
    config = ModelConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert names.heads(name, (64, 48), config) == ([0, 16, 32, 48, 64], [])
    assert names.heads(name, (128, 48), config) == ([0, 32, 64, 96, 128], [])  # each head's gate beside its query
    assert names.heads(name, (32, 48), config) == ([], [])  # four heads of 8 are others
