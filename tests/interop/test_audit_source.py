"""A base with an adapter merged in, read as a checkpoint: against PEFT's own merge of a loaded model, in fp32."""

import shutil

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from helpers import relative_error, tiny_qwen2
from interop.exporting import load_base, save_base, saved, tensors
from interop.merging import TOLERANCE, adapter, check, lora, noisy, twin
from lifecycle import config, train
from offprincipal_peft import audit
from offprincipal_peft.audit import CheckpointError, bf16_sparsity, open_checkpoint, pair
from offprincipal_peft.interop import audit_source, layer_merge
from offprincipal_peft.interop.audit_source import MergedCheckpoint, open_adapter
from offprincipal_peft.tuners.offprincipal_lora.presets import PRESETS
from sparse_models import BLOCKS, sparse_config, sparse_layers, train_masked

UP = "model.layers.0.mlp.up_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of saved models: bases[family, dtype]; that of Qwen2 is tied and has biases."""
    folder = tmp_path_factory.mktemp("bases")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for family in ("llama", "gpt2"):
            found[family, dtype] = save_base(folder / f"{family} {dtype}", family, dtype)
        found["qwen2", dtype] = folder / f"qwen2 {dtype}"
        tiny_qwen2(dtype, hidden=32, tie=True).save_pretrained(found["qwen2", dtype])
    return found


@pytest.fixture
def llama(bases):
    return bases["llama", torch.bfloat16]


# -- methods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.bfloat16), ("gpt2", torch.float32), ("qwen2", torch.float32)],
    ids=["llama-bf16", "gpt2", "qwen2-tied"],
)
def test_off_principal_presets(bases, tmp_path, monkeypatch, family, dtype, preset):
    monkeypatch.setattr(layer_merge, "_CHUNK", 100)  # many parts, the last one short
    base = bases[family, dtype]
    host = get_peft_model(load_base(base), config(preset))
    train(host, 1)
    folder = saved(host, tmp_path / "a")
    check(base, open_adapter(folder, base), twin(base, folder), 8 if family == "gpt2" else 14)


@pytest.mark.parametrize("structure", ["element", "row", "column", "block"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sparse_structures_in_fp32(tmp_path, monkeypatch, family, structure):
    monkeypatch.setattr(layer_merge, "_CHUNK", 1000 if structure == "block" else 100)
    sizes = {key: size for key, size in BLOCKS.items() if family == "llama" or key != "intermediate"}
    base = save_base(tmp_path / "base", family, **(sizes if structure == "block" else {"layers": 1}))
    mask = {"mask": "random", "random_density": 0.7} if structure == "element" else {}  # the layout with a slot for all
    host = get_peft_model(load_base(base), sparse_config(structure=structure, **mask))
    train(host, 1)
    folder = saved(host, tmp_path / "a")
    check(base, open_adapter(folder, base), twin(base, folder), 4 if family == "gpt2" else 7)


@pytest.mark.parametrize("precision", ["fp32", "split", "bf16", "bf16-stochastic"])
def test_a_sparse_update_is_not_rounded_and_rounds_to_the_trained_bytes(llama, tmp_path, precision):
    host = get_peft_model(load_base(llama), sparse_config(precision=precision))
    train_masked(host)
    folder = saved(host, tmp_path / "a")
    updates = {f"{name}.weight": layer.get_delta_weight("default") for name, layer in sparse_layers(host).items()}
    merged, opened = twin(llama, folder, torch.bfloat16), open_adapter(folder, llama)
    assert opened.adapted == set(updates)
    with open_checkpoint(llama) as bare:
        for name, update in updates.items():
            found = opened.read(name)
            assert torch.equal(found, bare.read(name).float() + update)
            assert torch.equal(found.bfloat16(), merged[name]) and not torch.equal(merged[name], bare.read(name))
            if precision in ("fp32", "split"):
                assert not torch.equal(found, found.bfloat16().float())


def test_a_sparse_adapter_knows_its_base_by_the_dtype_it_was_trained_in(bases, tmp_path):
    base = bases["llama", torch.float32]
    host = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), sparse_config())
    train_masked(host)
    opened = open_adapter(saved(host, tmp_path / "a"), base)
    update = sparse_layers(host)["model.layers.0.mlp.up_proj"].get_delta_weight("default")
    with open_checkpoint(base) as bare:  # the stored values, not those rounded to bf16, plus the update
        assert torch.equal(opened.read(UP), bare.read(UP) + update)


def test_a_sparse_adapter_refuses_a_base_with_other_bytes(bases, llama, tmp_path):
    host = get_peft_model(load_base(llama), sparse_config())
    folder, other = saved(host, tmp_path / "a"), tmp_path / "other"
    shutil.copytree(llama, other)
    weights = load_file(llama / "model.safetensors")
    weights[UP][3, 5] += 1
    save_file(weights, other / "model.safetensors")
    opened = open_adapter(folder, other)  # the smallest layer is as it was
    assert torch.equal(opened.read(Q), weights[Q].float())
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mlp\.up_proj: the mask was made for a base weight with other"
    ):
        opened.read(UP)


FAMILY_TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "qwen2": ["q_proj", "down_proj"],
}
METHODS = {
    "lora": (LoraConfig, {"r": 4}),
    "rslora": (LoraConfig, {"r": 4, "use_rslora": True}),
    "dora": (LoraConfig, {"r": 4, "use_dora": True}),
    "pissa": (LoraConfig, {"r": 4, "init_lora_weights": "pissa"}),
    "olora": (LoraConfig, {"r": 4, "init_lora_weights": "olora"}),
    "adalora": (peft.AdaLoraConfig, {"init_r": 6, "target_r": 3, "total_step": 10}),
    "ia3": (peft.IA3Config, {}),
    "vera": (peft.VeraConfig, {"r": 8}),
    "vera, drawn again": (peft.VeraConfig, {"r": 8, "save_projection": False}),
    "shira": (peft.ShiraConfig, {"r": 2}),
    "loha": (peft.LoHaConfig, {"r": 4}),
    "lokr": (peft.LoKrConfig, {"r": 4}),
    "oft": (peft.OFTConfig, {"oft_block_size": 4}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4}),
    "hra": (peft.HRAConfig, {"r": 4}),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 50}),
    "miss": (peft.MissConfig, {"r": 4}),
    "randlora": (peft.RandLoraConfig, {"r": 4}),
    "vblora": (peft.VBLoRAConfig, {"r": 2, "num_vectors": 20, "vector_length": 8}),
    "vblora, top k": (
        peft.VBLoRAConfig,
        {"r": 2, "num_vectors": 20, "vector_length": 8, "save_only_topk_weights": True},
    ),
    "c3a": (peft.C3AConfig, {"block_size": 8}),
    "delora": (peft.DeloraConfig, {"r": 4}),
    "waveft": (peft.WaveFTConfig, {"n_frequency": 50}),
    "gralora": (peft.GraloraConfig, {"r": 4}),
    "unilora": (peft.UniLoraConfig, {}),
    "pvera": (peft.PveraConfig, {"r": 8}),
    "hira": (peft.HiraConfig, {}),
    "peanut": (peft.PeanutConfig, {}),
    "deft": (peft.DeftConfig, {}),
}
NOT_CONV1D = ("olora", "shira", "loha", "lokr", "ia3")  # IA3 would name feed-forward layers as well


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", name) for name in METHODS]
    + [("gpt2", name) for name in ("lora", "dora", "pissa", "vera", "adalora")]
    + [("qwen2", name) for name in ("lora", "dora", "ia3", "oft", "vera", "shira", "loha")],
)
def test_methods_of_peft(bases, tmp_path, family, name):
    base, targets = bases[family, torch.bfloat16], FAMILY_TARGETS[family]
    kind, options = METHODS[name]
    options = {"target_modules": targets, "task_type": "CAUSAL_LM"} | options
    if name == "ia3":
        options["feedforward_modules"] = ["down_proj"]
    folder = adapter(base, tmp_path / "a", kind(**options))
    biases = 2 * (name == "ia3" and family == "qwen2")  # IA3 scales the query's biases too
    check(base, open_adapter(folder, base), twin(base, folder), 2 * len(targets) + biases)


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        (peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], task_type="CAUSAL_LM"), 3),
        (peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 5], task_type="CAUSAL_LM"), 1),
    ],
    ids=["ln", "tokens"],
)
def test_methods_of_peft_on_norms_and_embeddings(llama, tmp_path, method, changed):
    folder = adapter(llama, tmp_path / "a", method)
    check(llama, open_adapter(folder, llama), twin(llama, folder), changed)


def test_every_method_that_is_accepted_is_compared():
    tested = {kind(**options).peft_type.value for kind, options in METHODS.values()}
    tested |= {"LN_TUNING", "TRAINABLE_TOKENS", config().peft_type.value, sparse_config().peft_type.value}
    assert tested == {*audit_source._WEIGHTS_ONLY, *audit_source._BIASES_TOO}


@pytest.mark.parametrize("method", [lora(use_dora=True), config("offprincipal", target_modules=["q_proj"])])
def test_an_adapter_that_was_saved_in_bf16_is_merged_in_fp32(llama, tmp_path, method):
    host = get_peft_model(load_base(llama), method, autocast_adapter_dtype=False)
    train(host, 1)
    folder = saved(host, tmp_path / "a")
    assert tensors(folder)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].dtype == torch.bfloat16
    check(llama, open_adapter(folder, llama), twin(llama, folder), 2)


@pytest.mark.parametrize("method", [lora(target_modules="all-linear"), config("pissa"), config("offprincipal")])
def test_an_untrained_adapter_is_exactly_the_base(llama, tmp_path, method):
    folder = saved(get_peft_model(load_base(llama), method), tmp_path / "a")
    check(llama, open_adapter(folder, llama), load_file(llama / "model.safetensors"), 0)


def test_an_audit_reads_it_like_any_checkpoint(llama, tmp_path):
    folder = adapter(llama, tmp_path / "a", lora(target_modules="all-linear"))
    with open_checkpoint(llama) as bare, open_adapter(folder, bare) as tuned:
        found, pairing = bf16_sparsity(bare, tuned), pair(bare, tuned)
        assert not pairing.skipped and {m.name for m in pairing.matched} == set(bare.tensors)
        merged = {name: tensor.bfloat16() for name, tensor in twin(llama, folder).items()}
        assert found.changed == sum(int((merged[name] != bare.read(name)).sum()) for name in bare.tensors) > 0
        whole = tuned.read(UP)
        for read, size in ((tuned.read_rows, len(whole)), (tuned.read_entries, whole.numel())):
            first, last = read(UP, 0, 40), read(UP, 40, size)
            assert torch.equal(torch.cat([first, last]).view_as(whole), whole)
            first.zero_()  # the caller's own memory
            assert torch.equal(read(UP, 0, 40).view(-1), whole.view(-1)[: first.numel()])
        tuned.read(UP).zero_()
        assert torch.equal(tuned.read(UP), whole)
    for name in (UP, "model.norm.weight"):
        with pytest.raises(CheckpointError, match="was closed"):
            tuned.read(name)


def test_one_layer_is_held_at_a_time(llama, tmp_path, monkeypatch):
    folder, made, held = adapter(llama, tmp_path / "a", lora(target_modules="all-linear")), [], []
    real = MergedCheckpoint._merge

    def merge(self, unit):
        made.append(unit.name)
        held.append(len(self._held))
        return real(self, unit)

    monkeypatch.setattr(MergedCheckpoint, "_merge", merge)
    opened = open_adapter(folder, llama)
    assert len(made) == 1  # the smallest, so that a fault shows at once
    made.clear()
    for _ in audit.iterate(pair(open_checkpoint(llama), opened), 500, flat=True):
        assert len(opened._held) <= 1
    assert not any(held)  # the one before is freed first
    assert len(made) == len(set(made)) == 14
    unit = opened._units[UP][0]
    assert all(value.is_meta for path, value in unit.module.named_parameters() if path not in unit.base)
    assert all(value.untyped_storage().nbytes() == 4 for value in unit.module.get_base_layer().parameters())


# -- what else an adapter's folder holds ------------------------------------------------------------------------------

Extra = dict[str, object]
EXTRAS: dict[str, tuple[Extra, int]] = {  # options of LoRA on the queries of a tied Qwen2, tensors that change
    "all biases": ({"bias": "all"}, 2 + 6),
    "its layers' biases": ({"bias": "lora_only"}, 2 + 2),
    "a bias of its own": ({"lora_bias": True}, 2 + 2),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, 3),
    "embedding saved": ({"modules_to_save": ["embed_tokens"]}, 3),
    "head saved": ({"modules_to_save": ["lm_head"]}, 3),
    "both saved": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, 4),
    "norms saved": ({"modules_to_save": ["input_layernorm", "model.norm"]}, 2 + 3),
    "tokens": ({"trainable_token_indices": [3, 5]}, 3),
    "one layer": ({"layers_to_transform": [1], "rank_pattern": {"q_proj": 3}}, 1),
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_biases_embeddings_heads_and_tokens(bases, tmp_path, extra):
    base, (options, changed) = bases["qwen2", torch.bfloat16], EXTRAS[extra]
    folder = adapter(base, tmp_path / "a", lora(**options))
    check(base, open_adapter(folder, base), twin(base, folder), changed)


@pytest.mark.parametrize("method", [config("pissa"), sparse_config()], ids=["off-principal", "sparse"])
def test_this_package_s_methods_with_saved_heads_and_tokens(bases, tmp_path, method):
    base = bases["qwen2", torch.float32]
    method.target_modules, method.modules_to_save = {"q_proj"}, ["lm_head", "model.norm"]
    if hasattr(method, "trainable_token_indices"):
        method.modules_to_save, method.trainable_token_indices = ["model.norm"], [3, 4]
    host = get_peft_model(load_base(base), method)
    train(host, 1)
    folder = saved(host, tmp_path / "a")
    check(base, open_adapter(folder, base), twin(base, folder), 4)


def test_an_adapter_on_a_tied_head_leaves_the_embedding(bases, tmp_path):
    base = bases["qwen2", torch.float32]
    folder = adapter(base, tmp_path / "a", lora(target_modules=["lm_head"]))
    opened = open_adapter(folder, base)
    update = tensors(folder)
    product = [update[f"base_model.model.lm_head.lora_{factor}.weight"] for factor in "BA"]
    with open_checkpoint(base) as bare:
        embedding = bare.read("model.embed_tokens.weight")
        assert opened.adapted == {"lm_head.weight"} and "lm_head.weight" not in bare.tensors
        assert relative_error(opened.read("lm_head.weight"), embedding + 2 * product[0] @ product[1]) < TOLERANCE
        assert torch.equal(opened.read("model.embed_tokens.weight"), embedding)
        (skipped,) = pair(bare, opened).skipped
        assert skipped.name == "lm_head.weight" and "untied there" in skipped.reason


def test_embeddings_that_a_resized_model_saved(llama, tmp_path):
    model = load_base(llama)
    model.resize_token_embeddings(140, mean_resizing=False)
    folder = saved(noisy(model, lora()), tmp_path / "a")
    opened = open_adapter(folder, llama)
    assert opened.tensors["model.embed_tokens.weight"].shape == (140, 32)
    assert torch.equal(opened.read("lm_head.weight"), tensors(folder)["base_model.model.lm_head.weight"])
    skipped = pair(open_checkpoint(llama), opened).skipped
    assert {skip.name for skip in skipped} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all("shape" in skip.reason for skip in skipped)


def test_a_new_classification_head_is_listed(bases, tmp_path):
    base = bases["llama", torch.float32]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5, pad_token_id=0)
    folder = saved(noisy(model, lora(task_type="SEQ_CLS")), tmp_path / "a")
    opened = open_adapter(folder, base)
    assert set(opened.tensors) - set(open_checkpoint(base).tensors) == {"score.weight"}
    assert torch.equal(opened.read("score.weight"), tensors(folder)["base_model.model.score.weight"])
    assert len(opened.adapted) == 3
