"""Chains with anchors between: every step bit for bit, from wherever a checkpoint is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from interop.patches.twins import (
    State,
    bytes_by_entry,
    changed,
    copy,
    craft,
    differences,
    hash_of,
    listing,
    load,
    model_state,
    next_state,
    same,
    write,
)
from offprincipal_peft.interop.sparse_patch import (
    PatchChain,
    PatchError,
    PatchFile,
    make_anchor,
    make_patch,
    verify_patch,
)
from tiny_models import save_tiny_model

STEPS, EVERY = 9, 4
Made = tuple[Path, list[State]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Steps 0 to 9 (numbered 0, 10, 20, …), anchors at every fourth; step 30 and 70 are values at the step before's."""
    root = tmp_path_factory.mktemp("chain")
    folder = root / "chain"
    folder.mkdir()
    states = [model_state()]
    for i in range(1, STEPS + 1):
        if i in (3, 7):  # within the positions of the patch before
            state = {name: copy(value) for name, value in states[-1].items()}
            positions, _ = differences(states[-2], states[-1])["a.weight"]
            bytes_by_entry(state["a.weight"])[positions[::3], 0] ^= 2
            states.append(state)
        else:
            states.append(next_state(states[-1], 100 * i))
    paths = [write(root / str(i), state, "file") for i, state in enumerate(states)]
    for i in range(STEPS + 1):
        if i % EVERY == 0:
            make_anchor(paths[i], folder / f"anchor-{10 * i:08d}.safetensors", step=10 * i)
        if i:
            before = folder / f"patch-{10 * (i - 1):08d}.safetensors" if i in (3, 7) else None
            make_patch(
                paths[i - 1], paths[i], folder / f"patch-{10 * i:08d}.safetensors", step=10 * i, base_step=10 * (i - 1),
                positions=before,
            )  # fmt: skip
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a", "y": "b"}}')  # came with the rest
    (folder / ".hidden.json").write_text("{}")
    save = folder / "adapter_model.safetensors"  # no patch, and not named like one
    save.write_bytes(paths[0].read_bytes())
    return folder, states


@pytest.fixture
def chain(made: Made, tmp_path: Path) -> tuple[Path, list[State]]:
    """A copy that may be damaged."""
    return Path(shutil.copytree(made[0], tmp_path / "chain")), made[1]


def steps(run: list) -> list[tuple[str, int]]:  # type: ignore[type-arg]
    return [(info.kind, info.step) for info in run]


def patch(step: int) -> str:
    return f"patch-{step:08d}.safetensors"


def test_every_step_is_restored(made: Made, tmp_path: Path) -> None:
    folder, states = made
    found = PatchChain.read(folder)
    assert found.steps == [10 * i for i in range(STEPS + 1)]
    assert [info.step for info in found.anchors] == [0, 40, 80] and len(found.patches) == STEPS
    for i, state in enumerate(states):
        done = found.restore(tmp_path / str(i), 10 * i)
        assert (done.step, done.state, done.path) == (10 * i, hash_of(state), tmp_path / str(i))
        assert same(load(tmp_path / str(i)), state)
        assert sorted(p.name for p in (tmp_path / str(i)).iterdir()) == [
            "config.json", "model.safetensors", "tokenizer.json",
        ]  # fmt: skip
    assert found.restore(tmp_path / "last").step == 10 * STEPS
    with pytest.raises(PatchError, match="exists; give the name of a new folder"):
        found.restore(tmp_path / "last")


def test_the_way_to_a_step(made: Made) -> None:
    folder, states = made
    found = PatchChain.read(folder)
    assert steps(found.way(20)) == [("full", 0), ("sparse", 10), ("sparse", 20)]
    assert steps(found.way(40)) == [("full", 40)]
    assert steps(found.way()) == [("full", 80), ("sparse", 90)]
    assert steps(found.way(20, hash_of(states[1]))) == [("sparse", 20)]
    assert steps(found.way(30, hash_of(states[1]))) == [("sparse", 20), ("values", 30)]
    assert found.way(20, hash_of(states[2])) == []
    assert steps(found.way(20, hash_of(states[3]))) == [("full", 0), ("sparse", 10), ("sparse", 20)]  # back
    assert steps(found.way(50, "0" * 32)) == [("full", 40), ("sparse", 50)]  # from an unknown state
    # Over an anchor, as long as the patches are fewer bytes than it.
    assert steps(found.way(50, hash_of(states[3]))) == [("sparse", 40), ("sparse", 50)]
    sizes = {info.step: info.nbytes for info in found.patches}
    anchor = found.anchors[2].nbytes
    assert sizes[80] + sizes[70] < anchor < sizes[80] + sizes[70] + sizes[60] + sizes[50] + sizes[40], sizes
    assert steps(found.way(80, hash_of(states[6]))) == [("values", 70), ("sparse", 80)]
    assert steps(found.way(80, hash_of(states[0]))) == [("full", 80)]
    with pytest.raises(PatchError, match=r"has no step 44; it has 10 steps from 0 to 90, the nearest is 40"):
        found.way(44)


def test_from_any_state_to_any_step(made: Made, tmp_path: Path) -> None:
    folder, states = made
    found = PatchChain.read(folder)
    targets = {"sharded": write(tmp_path / "s", states[0], "sharded"), "file": write(tmp_path / "f", states[0], "file")}
    at = 0
    for to in (5, 2, 9, 9, 3, 0, 7, 8, 1, 6, 4):
        for target in targets.values():
            done = found.apply(target, 10 * to)
            assert same(load(target), states[to]), (at, to)
            assert done.step == 10 * to and done.state == hash_of(states[to]) and (done.files == 0) == (at == to)
        at = to
    assert len(listing(targets["sharded"])) == 5  # three shards, the index, the config


def test_apply_to_a_copy(made: Made, tmp_path: Path) -> None:
    folder, states = made
    target = write(tmp_path / "t", states[0], "sharded")
    before = listing(target)
    PatchChain.read(folder).apply(target, out=tmp_path / "new")
    assert listing(target) == before and same(load(tmp_path / "new"), states[-1])
    with pytest.raises(PatchError, match="is at the wanted step already; copy it"):
        PatchChain.read(folder).apply(target, 0, out=tmp_path / "again")


def test_a_target_of_another_model_is_not_overwritten_by_an_anchor(made: Made, tmp_path: Path) -> None:
    folder, states = made
    target = write(tmp_path / "t", states[0] | {"e.long": changed(states[0]["e.long"], 1, 1)}, "sharded")
    before = listing(target)
    for step in (0, 90):
        with pytest.raises(PatchError, match=r"in the state .*, which is none of the chain in .*restore it"):
            PatchChain.read(folder).apply(target, step)
    assert listing(target) == before


def test_verify(made: Made) -> None:
    PatchChain.read(made[0]).verify()


def test_positions_are_read_once_for_a_whole_chain(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = PatchFile.check_digest
    monkeypatch.setattr(PatchFile, "check_digest", lambda self: (read.append(self.info.path.name), real(self))[1])
    PatchChain.read(made[0]).verify()
    assert len(read) == len(set(read)) == STEPS + 3


# -- broken chains ----------------------------------------------------------------------------------------------------


def test_a_missing_patch(chain: Made, tmp_path: Path) -> None:
    folder, states = chain
    (folder / patch(50)).unlink()
    found = PatchChain.read(folder)
    for step in (60, 70):
        with pytest.raises(PatchError, match="no patch or anchor in it leads to step 50, where patch-00000060"):
            found.restore(tmp_path / "out", step)
    assert not (tmp_path / "out").exists()
    assert same(load(found.restore(tmp_path / "after", 80).path), states[8])
    with pytest.raises(PatchError, match=r"patch-00000060.* begins at step 50, in a state that no anchor or patch"):
        found.verify()
    with pytest.raises(PatchError, match="has no step 50"):
        found.way(50)


def test_missing_positions(chain: Made, tmp_path: Path) -> None:
    folder, states = chain
    target = write(tmp_path / "t", states[2], "file")
    (folder / patch(20)).unlink()
    with pytest.raises(PatchError, match=r"patch-00000030.* holds values alone; the patch with digest"):
        PatchChain.read(folder).apply(target, 30)
    assert same(load(target), states[2])


def test_a_missing_anchor(chain: Made, tmp_path: Path) -> None:
    folder, states = chain
    for path in folder.glob("anchor-*"):
        path.unlink()
    found = PatchChain.read(folder)
    with pytest.raises(PatchError, match="no patch or anchor in it leads to step 0, where patch-00000010"):
        found.restore(tmp_path / "out")
    assert same(load(found.apply(write(tmp_path / "t", states[0], "file")).path), states[-1])


def test_two_patches_to_a_step(chain: Made) -> None:
    folder, _ = chain
    shutil.copyfile(folder / patch(20), folder / "patch-copy.safetensors")
    with pytest.raises(PatchError, match=r"patch-00000020.* and patch-copy.* both lead to step 20"):
        PatchChain.read(folder)


def test_an_anchor_and_a_patch_to_different_states(chain: Made) -> None:
    folder, _ = chain
    craft(folder / "anchor-00000040.safetensors", lambda h, d: h["__metadata__"].update(step="50"))
    with pytest.raises(PatchError, match=r"anchor-00000040.* and patch-00000050.* lead to different states"):
        PatchChain.read(folder)


def test_links_that_do_not_meet(chain: Made, tmp_path: Path) -> None:
    folder, _ = chain
    craft(folder / patch(60), lambda h, d: h["__metadata__"].update(base="1" * 32))
    found = PatchChain.read(folder)
    with pytest.raises(PatchError, match="no patch or anchor in it leads to step 50, where patch-00000060"):
        found.restore(tmp_path / "out", 60)
    with pytest.raises(PatchError, match="begins at step 50, in a state that no anchor or patch before it leads to"):
        found.verify()


def test_links_that_would_go_in_a_circle(chain: Made) -> None:
    folder, _ = chain
    craft(folder / patch(60), lambda h, d: h["__metadata__"].update(base_step="60", base=h["__metadata__"]["result"]))
    with pytest.raises(PatchError, match="it goes from step 60 to 60, which is not later"):
        PatchChain.read(folder)


def test_folders_that_are_no_chains(tmp_path: Path, chain: Made) -> None:
    with pytest.raises(PatchError, match=r"no folder .*; give the folder that holds the patches"):
        PatchChain.read(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PatchError, match=r"holds no anchor-\*\.safetensors and no patch-\*\.safetensors"):
        PatchChain.read(tmp_path / "empty")
    (chain[0] / patch(95)).write_bytes(b"short")
    with pytest.raises(PatchError, match=r"patch-00000095\.safetensors has 5 bytes"):
        PatchChain.read(chain[0])


# -- a model that transformers loads ----------------------------------------------------------------------------------


def test_a_restored_step_is_a_model(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", 0)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[..., 0] += 0.25
    model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 2
    folder = tmp_path / "chain"
    folder.mkdir()
    make_anchor(base, folder / "anchor-00000000.safetensors")
    made = make_patch(base, tmp_path / "tuned", folder / "patch-00000001.safetensors")
    for path in base.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    done = PatchChain.read(folder).restore(tmp_path / "restored")
    ids = torch.arange(5)[None]
    for target in (done.path, PatchChain.read(folder).apply(base).path):
        loaded = AutoModelForCausalLM.from_pretrained(target)
        assert same(dict(loaded.state_dict()), dict(model.state_dict()))
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert verify_patch(made.path).entries == made.entries
    PatchChain.read(folder).apply(tmp_path / "tuned", 0)  # sharded, back to the start
    index = json.loads((tmp_path / "tuned/model.safetensors.index.json").read_text())
    assert all((tmp_path / "tuned" / name).is_file() for name in index["weight_map"].values())
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    for parameter in start.parameters():
        parameter.data[..., 0] += 0.25
    assert same(dict(start.state_dict()), dict(model.state_dict()))
