"""Runs without the package: loads exported adapters with plain PEFT and writes their logits.

``plain_peft.py CASES.json OUT.safetensors``; a case is {"name", "base", "adapter"}, all with the same "ids".
"""

import json
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

warnings.filterwarnings("error", message=".*(missing adapter keys|Unexpected keyword)")


def main(cases_file: str, out_file: str) -> None:
    with open(cases_file) as file:
        given = json.load(file)
    ids, logits = torch.tensor(given["ids"]), {}
    for case in given["cases"]:
        base = AutoModelForCausalLM.from_pretrained(case["base"], dtype="auto")
        host = PeftModel.from_pretrained(base, case["adapter"]).eval()
        assert type(host.peft_config["default"]) is LoraConfig, case
        with safe_open(f"{case['adapter']}/adapter_model.safetensors", "pt") as file:
            assert set(file.keys()) == set(get_peft_model_state_dict(host)), case
        with torch.no_grad():
            logits[case["name"]] = host(input_ids=ids).logits.contiguous()
    loaded = [name for name in sys.modules if name.partition(".")[0] == "offprincipal_peft"]
    assert not loaded, loaded
    save_file(logits, out_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
