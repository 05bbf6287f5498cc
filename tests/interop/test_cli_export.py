"""``offprincipal export``: its forms, what it says, its exit codes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from interop.exporting import distance, load_base, plain, save_base, saved, settings, trained
from lifecycle import logits, train
from offprincipal_peft import cli
from sparse_models import sparse_config


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict:
    """Saved adapters by name, their base, and the logits of one."""
    root = tmp_path_factory.mktemp("made")
    base = save_base(root / "base")
    off, sparse = trained(base, "pissa"), get_peft_model(load_base(base), sparse_config())
    train(sparse, 1)
    lora = get_peft_model(load_base(base), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    folders = {name: saved(host, root / name) for name, host in (("off", off), ("sparse", sparse), ("plain", lora))}
    return {**folders, "base": base, "logits": {"off": logits(off), "sparse": logits(sparse)}}


def run(*words: object) -> int:
    return cli.main(["export", *map(str, words)])


def test_an_off_principal_adapter_becomes_a_lora(made, tmp_path, capsys):
    assert run(made["off"], tmp_path / "x") == cli.DONE
    told = capsys.readouterr().out
    size = (tmp_path / "x" / "adapter_model.safetensors").stat().st_size
    assert re.search(rf"^plain LoRA in {tmp_path}/x: 14 layers, rank 8, float32, {size:,} bytes; folded", told)
    assert f"PeftModel.from_pretrained(model, '{tmp_path}/x'), model being {made['base']}" in told
    assert distance(logits(plain(made["base"], tmp_path / "x")), made["logits"]["off"]) < 2e-6
    assert run(made["off"], tmp_path / "x", "--compress", "--dtype", "bfloat16", "--overwrite") == cli.DONE
    assert "bfloat16" in capsys.readouterr().out


def test_a_sparse_adapter_becomes_a_model(made, tmp_path, capsys):
    assert run(made["sparse"], tmp_path / "x") == cli.DONE
    told = capsys.readouterr().out
    assert f"merged model in {tmp_path}/x: PRINCIPAL_SPARSE on 14 layers of {made['base']}, float32" in told
    assert f"load it: LlamaForCausalLM.from_pretrained('{tmp_path}/x')" in told and "no tokenizer" in told
    assert torch.equal(logits(load_base(tmp_path / "x")), made["logits"]["sparse"])


def test_merged_on_request_with_a_base_and_a_dtype(made, tmp_path):
    words = (made["off"], tmp_path / "x", "--as", "merged", "--base", made["base"], "--dtype", "bfloat16")
    assert run(*words) == cli.DONE
    model = load_base(tmp_path / "x")
    assert model.dtype == torch.bfloat16 and distance(logits(model), made["logits"]["off"]) < 2e-2  # 8.2e-3 observed


def test_an_adapter_by_its_name(made, tmp_path):
    host = trained(made["base"], "pissa", steps=0)
    host.add_adapter("second", host.peft_config["default"])
    host.save_pretrained(tmp_path / "a")
    assert run(tmp_path / "a", tmp_path / "x", "--adapter-name", "second") == cli.DONE
    assert settings(tmp_path / "x")["r"] == 8


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere", "OUT"], "no folder nowhere"),
        (["base", "OUT"], "It holds a model: give the adapter's folder"),
        (["plain", "OUT"], "is a plain PEFT LoRA already"),
        (["sparse", "OUT", "--as", "lora"], "sparse adapter, whose update has full rank"),
        (["off", "off"], "is, or contains, the adapter that is read"),
        (["off", "base"], "exists and is not empty"),
        (["off", "OUT", "--dtype", "int8"], "the choices are float32, bfloat16, float16"),
        (["off", "OUT", "--base", "base"], "--base: a LoRA is written without its base model"),
        (["off", "OUT", "--as", "merged", "--compress"], "--compress: a merged model has no rank"),
        (["off", "OUT", "--as", "merged", "--base", "./none"], "no folder ./none; give the base model's folder"),
    ],
)
def test_mistakes_are_one_line(made, tmp_path, capsys, words, told):
    out = tmp_path / "x"
    given = [out if word == "OUT" else made.get(word, word) for word in words]
    assert run(*given) == cli.MISTAKE
    error = capsys.readouterr().err
    assert told in error and error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()


def test_a_form_that_does_not_exist_is_refused(made, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(made["off"], tmp_path / "x", "--as", "gguf")
    assert stop.value.code == cli.MISTAKE


def test_the_installed_command(made, tmp_path):
    command = [str(Path(sys.executable).with_name("offprincipal")), "export", str(made["off"]), str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "plain LoRA in" in done.stdout
