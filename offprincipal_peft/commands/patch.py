"""``offprincipal patch``: make, apply, verify and look at sparse patches between states of a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import DONE, Refused

if TYPE_CHECKING:
    from ..interop.sparse_patch import Applied, PatchInfo
    from ..interop.sparse_patch.states import Progress


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    make = actions.add_parser("make", help="write what differs between two checkpoints", allow_abbrev=False)
    make.add_argument("base", type=Path, metavar="BASE", help="a model's folder or a .safetensors file")
    make.add_argument("tuned", type=Path, metavar="TUNED", help="the same tensors later")
    make.add_argument("out", type=Path, metavar="PATCH", help="the .safetensors file to write")
    make.add_argument("--base-step", type=int, default=0, metavar="N", help="number of BASE in a chain (default 0)")
    make.add_argument("--step", type=int, metavar="N", help="number of TUNED (default: one more)")
    make.add_argument("--positions", type=Path, metavar="PATCH", help="write values alone, at this patch's positions")
    make.add_argument("--overwrite", action="store_true", help="replace PATCH")
    make.set_defaults(run=_make)

    anchor = actions.add_parser("anchor", help="write a whole checkpoint as the start of a chain", allow_abbrev=False)
    anchor.add_argument("model", type=Path, metavar="MODEL", help="a model's folder or a .safetensors file")
    anchor.add_argument("out", type=Path, metavar="PATCH", help="the .safetensors file to write")
    anchor.add_argument("--step", type=int, default=0, metavar="N", help="its number in the chain (default 0)")
    anchor.add_argument("--overwrite", action="store_true", help="replace PATCH")
    anchor.set_defaults(run=_anchor)

    apply = actions.add_parser(
        "apply", help="bring a checkpoint to another state, in place or as a copy", allow_abbrev=False
    )
    apply.add_argument("target", type=Path, metavar="TARGET", help="a model's folder or a .safetensors file")
    apply.add_argument(
        "patches",
        type=Path,
        nargs="+",
        metavar="PATCH",
        help="patches in their order, or one folder that holds a chain",
    )
    apply.add_argument("--step", type=int, metavar="N", help="of a chain: the step to go to (default: the last)")
    apply.add_argument("--out", type=Path, metavar="NEW", help="write a copy; TARGET stays as it is")
    apply.set_defaults(run=_apply)

    verify = actions.add_parser("verify", help="read patches or a chain whole and check every byte", allow_abbrev=False)
    verify.add_argument("patches", type=Path, nargs="+", metavar="PATCH", help="patches, or folders that hold chains")
    verify.add_argument(
        "--target", type=Path, metavar="TARGET", help="also: a checkpoint that must be in one of their states"
    )
    verify.set_defaults(run=_verify)

    info = actions.add_parser("info", help="what patches say of themselves", allow_abbrev=False)
    info.add_argument("patches", type=Path, nargs="+", metavar="PATCH", help="patches, or folders that hold chains")
    info.add_argument("--tensors", action="store_true", help="a row for each tensor")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)

    restore = actions.add_parser("restore", help="write the checkpoint of a chain's step", allow_abbrev=False)
    restore.add_argument("chain", type=Path, metavar="CHAIN", help="a folder with anchors and patches")
    restore.add_argument("out", type=Path, metavar="NEW", help="the folder to write")
    restore.add_argument("--step", type=int, metavar="N", help="default: the last")
    restore.set_defaults(run=_restore)


def _make(options: argparse.Namespace) -> int:
    from ..interop.sparse_patch import make_patch

    with _percent() as progress:
        info = make_patch(
            options.base,
            options.tuned,
            options.out,
            step=options.base_step + 1 if options.step is None else options.step,
            base_step=options.base_step,
            positions=options.positions,
            overwrite=options.overwrite,
            progress=progress,
        )
    print(_line(info))
    return DONE


def _anchor(options: argparse.Namespace) -> int:
    from ..interop.sparse_patch import make_anchor

    with _percent() as progress:
        info = make_anchor(
            options.model, options.out, step=options.step, overwrite=options.overwrite, progress=progress
        )
    print(_line(info))
    return DONE


def _apply(options: argparse.Namespace) -> int:
    from ..interop.sparse_patch import PatchChain, apply_patch

    folders = [path for path in options.patches if path.is_dir()]
    if folders and len(options.patches) > 1:
        raise Refused(f"{folders[0]} is a folder; give one folder that holds a chain, or patch files")
    if options.step is not None and not folders:
        raise Refused("--step chooses a step of a chain; give the chain's folder, or leave it out")
    with _percent() as progress:
        if folders:
            chain = PatchChain.read(folders[0])
            done = chain.apply(options.target, options.step, out=options.out, progress=progress)
        else:
            done = apply_patch(options.target, *options.patches, out=options.out, progress=progress)
    _say(done)
    return DONE


def _verify(options: argparse.Namespace) -> int:
    from ..audit import open_checkpoint
    from ..interop.sparse_patch import PatchChain, PatchError, checkpoint_hash, verify_patch

    states: set[str | None] = set()
    for path in options.patches:
        if path.is_dir():
            chain = PatchChain.read(path)
            chain.verify()
            infos = [*chain.anchors, *chain.patches]
            counts = f"{_number(len(chain.anchors), 'anchor')} and {_number(len(chain.patches), 'patch', 'patches')}"
            print(f"{path}: {counts}, whole and without a gap")
        else:
            infos = [verify_patch(path)]
            print(f"{path}: whole")
        states |= {info.base for info in infos} | {info.result for info in infos}
    if options.target is not None:
        with _percent() as progress, open_checkpoint(options.target) as target:
            state = checkpoint_hash(target, progress)
        if state not in states:
            raise PatchError(f"{options.target} is in the state {state}, with which none of these begins or ends.")
        print(f"{options.target}: in one of these states")
    return DONE


def _info(options: argparse.Namespace) -> int:
    from ..interop.sparse_patch import PatchChain, PatchFile

    infos: list[PatchInfo] = []
    for path in options.patches:
        if path.is_dir():
            chain = PatchChain.read(path)
            infos += sorted((*chain.anchors, *chain.patches), key=lambda info: (info.step, info.kind != "full"))
        else:
            with PatchFile(path) as patch:
                infos.append(patch.info)
    if options.json:
        print(json.dumps([_plain(info) for info in infos], indent=2))
        return DONE
    for info in infos:
        print(_line(info))
        if options.tensors:
            for name, count in info.entries.items():
                shape = info.shapes[name]
                size = math.prod(shape)
                print(f"  {name:60s} {shape!s:>16s} {count:>12,}  {100 * count / max(size, 1):8.4f} %")
    return DONE


def _restore(options: argparse.Namespace) -> int:
    from ..interop.sparse_patch import PatchChain

    with _percent() as progress:
        done = PatchChain.read(options.chain).restore(options.out, options.step, progress=progress)
    _say(done)
    return DONE


def _line(info: PatchInfo) -> str:
    way = f"step {info.step}" if info.base_step is None else f"step {info.base_step} to {info.step}"
    size = f"{info.nbytes:,} bytes"
    return (
        f"{info.path}: {info.kind}, {way}, {info.count:,} of {info.total:,} entries ({100 * info.density:.4f} %) in "
        f"{_number(len(info.entries), 'tensor')}, {size}; state {info.result}"
    )


def _plain(info: PatchInfo) -> dict[str, Any]:
    return {**dataclasses.asdict(info), "path": str(info.path), "count": info.count, "density": info.density}


def _say(applied: Applied) -> None:
    if not applied.files:
        print(f"{applied.path} is at step {applied.step} already; nothing was written")
        return
    entries, files = _number(applied.entries, "entry", "entries"), _number(applied.files, "file")
    print(f"{applied.path}: step {applied.step}, {entries} set, {files} written; state {applied.state}")


def _number(count: int, one: str, more: str = "") -> str:
    return f"{count:,} {one if count == 1 else more or one + 's'}"


@contextmanager
def _percent() -> Iterator[Progress | None]:
    """On a terminal, one line that is written over, and that is ended also where the work fails."""
    if not sys.stderr.isatty():
        yield None
        return
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        if (percent := 100 * done // max(total, 1)) != shown:
            shown = percent
            print(f"\r{percent:3d} %", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if shown >= 0:
            print(file=sys.stderr)
