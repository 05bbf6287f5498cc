"""One rank: join the group, run the checks, write what they return. Started by launch.py."""

import faulthandler
import importlib
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = timedelta(seconds=60)  # of one collective, whose other side may have failed


def main(checks: str, folder: str) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=PATIENCE)
    module, _, function = checks.partition(":")
    found = getattr(importlib.import_module(module), function)(rank, Path(folder))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
