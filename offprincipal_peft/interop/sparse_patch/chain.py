"""A folder of patches that follow one another, with full anchors between them: every step can be restored.

``anchor-00000000.safetensors`` holds a whole state, ``patch-00000001.safetensors`` leads from the step before to its
own. The names are for people; what counts is inside. Beside them may lie the model's ``config.json`` and tokenizer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ...audit.checkpoints import open_checkpoint
from .applying import Applied, Positions, apply_patch, linked, write_checkpoint
from .file import BLOCK, PatchError, PatchFile, PatchInfo
from .states import Progress, checkpoint_hash
from .writer import told

_BESIDE = (".json", ".txt", ".model", ".jinja")


def anchor_path(folder: Path, step: int) -> Path:
    return folder / f"anchor-{step:08d}.safetensors"


def patch_path(folder: Path, step: int) -> Path:
    return folder / f"patch-{step:08d}.safetensors"


@dataclass(frozen=True)
class PatchChain:
    """The patches in a folder by their steps, as they were when it was read.

    Attributes:
        anchors, patches: full ones, and those that lead from one state to the next, ascending by step.
    """

    folder: Path
    anchors: tuple[PatchInfo, ...]
    patches: tuple[PatchInfo, ...]

    @staticmethod
    def read(folder: str | Path) -> PatchChain:
        """Read the headers of every patch in ``folder``; other safetensors files are passed over.

        Raises :class:`PatchError` for a folder without patches, a damaged header, and two patches to one step.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise PatchError(f"no folder {folder}; give the folder that holds the patches.")
        found = []
        for path in sorted(folder.glob("*.safetensors")):
            if path.name.startswith(("anchor-", "patch-")):
                with PatchFile(path) as patch:
                    found.append(patch.info)
        if not found:
            raise PatchError(f"{folder} holds no anchor-*.safetensors and no patch-*.safetensors: it is no chain.")
        found.sort(key=lambda info: info.step)
        groups = [info for info in found if info.kind == "full"], [info for info in found if info.kind != "full"]
        for group in groups:
            for one, other in itertools.pairwise(group):
                if one.step == other.step:
                    raise PatchError(f"{one.path.name} and {other.path.name} in {folder} both lead to step {one.step}.")
        for one, other in itertools.pairwise(found):
            if one.step == other.step and one.result != other.result:
                raise PatchError(f"{one.path.name} and {other.path.name} in {folder} lead to different states.")
        return PatchChain(folder, tuple(groups[0]), tuple(groups[1]))

    @property
    def steps(self) -> list[int]:
        """Every step that the folder names."""
        return sorted({info.step for info in (*self.anchors, *self.patches)})

    def way(self, step: int | None = None, state: str | None = None) -> list[PatchInfo]:
        """The patches that lead to a step (the last one by default): from ``state``, or from an anchor.

        From the last anchor before the step where ``state`` is not given, does not lie on the way, or lies so far back
        that more bytes would be read. Raises :class:`PatchError` for a step that the chain does not name, and a patch
        that is missing on the way.
        """
        wanted = self.steps[-1] if step is None else step
        if wanted not in self.steps:
            near = min(self.steps, key=lambda known: abs(known - wanted))
            raise PatchError(
                f"{self.folder} has no step {wanted}; it has {len(self.steps)} steps from {self.steps[0]} to "
                f"{self.steps[-1]}, the nearest is {near}."
            )
        anchors = {info.step: info for info in self.anchors}
        patches = {info.step: info for info in self.patches}
        at, need = wanted, (anchors.get(wanted) or patches[wanted]).result
        run: list[PatchInfo] = []
        from_anchor: list[PatchInfo] | None = None
        while state != need:
            whole, patch = anchors.get(at), patches.get(at)
            if from_anchor is None and whole is not None and whole.result == need:
                from_anchor = [whole, *run]
                if state is None:
                    return from_anchor
            if from_anchor is not None and sum(i.nbytes for i in run) >= sum(i.nbytes for i in from_anchor):
                return from_anchor
            if patch is None or patch.result != need or patch.base_step is None or patch.base is None:
                if from_anchor is not None:
                    return from_anchor
                raise PatchError(
                    f"the chain in {self.folder} is broken: no patch or anchor in it leads to step {at}"
                    + (f", where {run[0].path.name} begins" if run else "")
                    + ". Copy the missing one, or take another step."
                )
            run.insert(0, patch)
            at, need = patch.base_step, patch.base
        return run

    def apply(
        self,
        target: str | Path,
        step: int | None = None,
        *,
        out: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Applied:
        """Bring a checkpoint to a step of the chain, from whatever state of the chain it is in.

        The target is read twice: once for the state that it is in. Raises as :func:`apply_patch` does, and
        :class:`PatchError` for a target that is in none of the chain's states: an anchor would overwrite it.
        """
        with open_checkpoint(target) as opened:
            state = checkpoint_hash(opened)
        if not any(state in (info.base, info.result) for info in (*self.anchors, *self.patches)):
            raise PatchError(
                f"{target} is in the state {state}, which is none of the chain in {self.folder}: another model, "
                "another run, or changed files. Nothing was changed; to write a step into a new folder, restore it."
            )
        run = self.way(step, state)
        if not run and out is None:
            return Applied(Path(target), self.steps[-1] if step is None else step, state, 0, 0)
        if not run:
            raise PatchError(f"{target} is at the wanted step already; copy it.")
        return apply_patch(target, *(info.path for info in run), out=out, progress=progress)

    def restore(self, out: str | Path, step: int | None = None, *, progress: Progress | None = None) -> Applied:
        """Write the checkpoint of a step into a new folder, from the last anchor before it. Bit for bit.

        With copies of the model's ``config.json``, tokenizer and the like, where they lie beside the patches.
        """
        with told(out), ExitStack() as stack:
            opened = [stack.enter_context(PatchFile(info.path)) for info in self.way(step)]
            return write_checkpoint(linked(opened), Path(out), self._beside(), progress)

    def verify(self) -> None:
        """Read every file whole, and check that each patch follows from one before it.

        Raises :class:`PatchError` for the first that is damaged or leads from a state that the chain does not have.
        """
        states = {info.result for info in self.anchors}
        known = Positions()
        for info in sorted((*self.anchors, *self.patches), key=lambda info: (info.step, info.kind != "full")):
            _verify(info.path, known)
            if info.kind != "full" and info.base not in states:
                raise PatchError(
                    f"{info.path} begins at step {info.base_step}, in a state that no anchor or patch before it leads "
                    "to: one is missing."
                )
            states.add(info.result)

    def _beside(self) -> Iterator[Path]:
        for path in sorted(self.folder.iterdir()):
            weights = path.name.endswith(".index.json")  # of the files that it came from
            if path.is_file() and path.suffix in _BESIDE and not path.name.startswith(".") and not weights:
                yield path


def verify_patch(path: str | Path) -> PatchInfo:
    """Read a patch whole. Raises :class:`PatchError` for a byte that is not what was written, or bad positions."""
    return _verify(Path(path), Positions())


def _verify(path: Path, known: Positions) -> PatchInfo:
    with PatchFile(path) as patch:
        linked([patch], known)
        if patch.info.kind != "full":
            for name, shape in patch.info.shapes.items():
                reader, size = patch.entries(name), math.prod(shape)
                for start in range(0, size, BLOCK):
                    reader.take(min(start + BLOCK, size))
        return patch.info
