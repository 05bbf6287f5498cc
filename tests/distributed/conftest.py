"""The one-process side of every comparison, and the one run of two ranks that the folder's tests read."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distributed.cases import CASES, LOADED, batches, optimizer, train
from distributed.launch import LIMIT, run_ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder with what was saved, and what each of two ranks found. Workers of pytest-xdist share one run."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tmp_path_factory.mktemp("ranks")
        return folder, run(folder)
    folder, failed = tmp_path_factory.getbasetemp().parent / "ranks", "the run of two ranks failed in another worker"
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + LIMIT + 60
        while not (folder / "ended").exists() and time.monotonic() < end:
            time.sleep(0.2)
        assert (folder / "found.json").exists(), failed
        return folder, json.loads((folder / "found.json").read_text())
    try:
        found = run(folder)
        (folder / "found.json").write_text(json.dumps(found))
    finally:
        (folder / "ended").touch()
    return folder, found


def run(folder: Path) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    (folder / "one").mkdir()
    for name in LOADED:
        host = CASES[name].adapted()
        train(host, optimizer("masked", host))
        host.eval()
        with torch.no_grad():
            save_file({"logits": host(input_ids=batches()[0]).logits}, folder / "one" / f"{name}.safetensors")
        host.save_pretrained(folder / "one" / name)
    return run_ranks("distributed.trainer_checks:everything", folder)
