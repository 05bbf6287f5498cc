"""A run of four states, for the tests of what apply writes and of what it refuses."""

from pathlib import Path

import pytest

from interop.patches.twins import State, model_state, next_state, write
from offprincipal_peft.interop.sparse_patch import PatchInfo, make_patch


@pytest.fixture
def run(tmp_path: Path) -> tuple[list[State], list[PatchInfo]]:
    """Four states and the patches between them, in the folder "patches"."""
    found = [model_state()]
    for seed in (1, 20, 40):
        found.append(next_state(found[-1], seed))
    (tmp_path / "patches").mkdir()
    (tmp_path / "made").mkdir()
    paths = [write(tmp_path / "made" / str(i), state, "file") for i, state in enumerate(found)]
    infos = [
        make_patch(paths[i], paths[i + 1], tmp_path / f"patches/{i + 1}.safetensors", step=i + 1, base_step=i)
        for i in range(3)
    ]
    return found, infos
