"""Patches from a model while it trains, and a served model that follows them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...audit.headers import STORED_NAMES
from ...tuners.principal_sparse.layer import PrincipalSparseLinear
from .applying import linked
from .chain import PatchChain, anchor_path, patch_path
from .content import TensorMark, bits_of, hash_tensor, state_hash
from .file import BLOCK, PatchError, PatchFile, PatchInfo, positions_dtype
from .live_state import LiveState, LiveTensor
from .making import differing
from .writer import PatchWriter


@dataclass
class _Shadow:
    """What the last patch left of one tensor: all of it, or its values at the positions that training can change."""

    value: Tensor  # CPU, flat
    positions: Tensor | None = None  # (c,) of positions_dtype, ascending


class PatchRecorder:
    """Writes the patches of a training run into a folder, from which :class:`PatchChain` and followers read.

    The first :meth:`record` writes a full anchor; each later one the entries that changed since the one before. For
    this package's sparse method the first patch after an anchor lists every entry of the masks, and later ones are
    values alone, or the changed entries where those take fewer bytes.

    Works with full fine-tuning and any PEFT method that merges. Memory, on the CPU: a copy of every tensor that
    training can change, in the checkpoint's dtype; of masked layers the masked entries alone.

    Args:
        model: a PEFT model or a plain one; unwrapped (of DDP its ``.module``).
        folder: is made; must hold no patches of another run.
        anchor_every: a further anchor after so many records; 0: the first alone.
        dtype: of the written floating-point tensors, for training in fp32 what is served in bf16. Default: as they are.
        tokenizer: written beside the patches, so that a restored folder is complete.

    Raises :class:`PatchError` for what :class:`LiveState` refuses and a folder with patches.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | Path,
        *,
        anchor_every: int = 0,
        dtype: torch.dtype | None = None,
        tokenizer: Any = None,
    ) -> None:
        if anchor_every < 0:
            raise PatchError(f"anchor_every must not be negative, got {anchor_every}.")
        self.state, self.folder = LiveState(model), Path(folder)
        self.anchor_every, self.dtype = anchor_every, dtype
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.glob("patch-*.safetensors")) or any(self.folder.glob("anchor-*.safetensors")):
            raise PatchError(f"{self.folder} holds patches already; give an empty folder.")
        self._write_beside(tokenizer)
        self.last: PatchInfo | None = None
        self._shadows: dict[str, _Shadow] = {}
        self._frozen: dict[str, TensorMark] = {}
        self._since_anchor = 0
        self._positions_of: str | None = None  # digest of the patch that lists the masks

    def _write_beside(self, tokenizer: Any) -> None:
        """What a folder needs beside weights: these are merged and of float dtypes, whatever the model trains on."""
        config: Any = copy.deepcopy(getattr(self.state.model, "config", None))
        if hasattr(config, "save_pretrained"):
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            if self.dtype is not None:
                config.dtype = self.dtype
            config.save_pretrained(self.folder)
        generation: Any = getattr(self.state.model, "generation_config", None)
        for each in (generation, tokenizer):
            if each is not None and hasattr(each, "save_pretrained"):
                each.save_pretrained(self.folder)

    def record(self, step: int) -> PatchInfo:
        """Write the patch from the last record to the model as it is now, or the first anchor.

        Raises :class:`PatchError` for a step that does not come after the last one, and a frozen tensor that changed.
        """
        if self.last is None:
            return self._anchor(step)
        if step <= self.last.step:
            raise PatchError(f"step {step} does not come after step {self.last.step}, which was recorded last.")
        info = self._patch(step, self.last)
        self.last, self._since_anchor = info, self._since_anchor + 1
        if self.anchor_every and self._since_anchor >= self.anchor_every:
            self._anchor(step)
        return info

    # -- the whole state ----------------------------------------------------------------------------------------------

    def _stored(self, item: LiveTensor) -> Tensor:
        """As the checkpoint holds it: flat, on the CPU, in the written dtype; not a copy where it is so already."""
        value = item.value
        if self.dtype is not None and value.is_floating_point():
            value = value.to(self.dtype)
        return value.contiguous().view(-1).cpu()

    def _anchor(self, step: int) -> PatchInfo:
        whole = {item.name: (tuple(item.value.shape), self._dtype_of(item.value)) for item in self.state.tensors()}
        total = sum(torch.Size(shape).numel() for shape, _ in whole.values())
        path, marks = anchor_path(self.folder, step), {}
        with PatchWriter(path, "full", step=step, base_step=None, total=total, whole=whole) as writer:
            for item in self.state.tensors():
                value = self._stored(item)
                writer.add(item.name, item.value.shape, None, value)
                marks[item.name] = self._mark(item, value)
                if self.last is None:
                    self._remember(item, value, marks[item.name])
            info = writer.finish(base=None, result=state_hash(marks))
        self._since_anchor, self._positions_of = 0, None  # a chain that begins here needs the positions again
        self.last = self.last or info
        return info

    def _dtype_of(self, value: Tensor) -> torch.dtype:
        return self.dtype if self.dtype is not None and value.is_floating_point() else value.dtype

    def _mark(self, item: LiveTensor, value: Tensor) -> TensorMark:
        return TensorMark(STORED_NAMES[value.dtype], tuple(item.value.shape), hash_tensor(value))

    def _remember(self, item: LiveTensor, value: Tensor, mark: TensorMark) -> None:
        if not item.trained:
            self._frozen[item.name] = mark
            return
        positions = masked_positions(item)
        kept = value.clone() if positions is None else value.index_select(0, positions.long())
        self._shadows[item.name] = _Shadow(kept, positions)

    # -- what changed -------------------------------------------------------------------------------------------------

    def _patch(self, step: int, last: PatchInfo) -> PatchInfo:
        marks: dict[str, TensorMark] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        changes: dict[str, tuple[Tensor, Tensor]] = {}  # of whole tensors: positions, values
        values: dict[str, Tensor] = {}  # of masked ones, at every position of the mask
        for item in self.state.tensors():
            value = self._stored(item)
            marks[item.name], shapes[item.name] = self._mark(item, value), tuple(item.value.shape)
            shadow = self._shadows.get(item.name)
            if shadow is None:
                if self._frozen.get(item.name) != marks[item.name]:
                    raise PatchError(f"{item.name} changed though it is frozen; begin a new folder for what follows.")
            elif shadow.positions is not None:
                values[item.name] = value.index_select(0, shadow.positions.long())
            else:
                changes[item.name] = _changed(shadow.value, value, shapes[item.name])
        kind, entries = self._plan(changes, values)
        with PatchWriter(
            patch_path(self.folder, step),
            "values" if kind == "values" else "sparse",
            step=step,
            base_step=last.step,
            total=last.total,
            indices_of=self._positions_of if kind == "values" else None,
        ) as writer:
            for name, (positions, new) in entries.items():
                if len(new):
                    writer.add(name, shapes[name], positions, new)
            info = writer.finish(base=last.result, result=state_hash(marks))
        if kind == "positions":
            self._positions_of = info.digest
        for name, (positions, new) in changes.items():  # only now: a patch that was not written is not the past
            self._shadows[name].value.index_copy_(0, positions.long(), new)
        for name, new in values.items():
            self._shadows[name].value = new
        return info

    def _plan(
        self, changes: dict[str, tuple[Tensor, Tensor]], values: dict[str, Tensor]
    ) -> tuple[str, dict[str, tuple[Tensor, Tensor]]]:
        """What to write: "positions" (every entry of the masks), "values" at them, or "changed" entries alone."""
        masks = {name: self._shadows[name] for name in values}
        every = {name: (_known(masks[name].positions), new) for name, new in values.items()}
        if values and self._positions_of is None:
            return "positions", changes | every
        few = {}
        for name, new in values.items():
            at = differing(masks[name].value, new)
            few[name] = (_known(masks[name].positions).index_select(0, at), new.index_select(0, at))
        sparse = changes | few
        others = sum(len(new) for _, new in changes.values())
        if values and not others and _size(every.values(), alone=True) < _size(sparse.values()):
            return "values", every
        return "changed", sparse


def masked_positions(item: LiveTensor) -> Tensor | None:  # -> (c,) ascending, CPU; None: all entries may change
    """The entries of a sparse layer's weight that its active adapter trains."""
    layer = item.layer
    if not isinstance(layer, PrincipalSparseLinear) or not item.name.endswith(".weight"):
        return None
    active = [name for name in layer.active_adapters if name in layer.princsparse_delta]
    if len(active) != 1:
        return None
    mask = layer.delta(active[0]).layout.mask().reshape(-1).cpu()
    return mask.nonzero().view(-1).to(positions_dtype(tuple(item.value.shape)))


def _changed(before: Tensor, after: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    parts = [
        differing(old, new) + start
        for start, old, new in zip(
            range(0, max(len(before), 1), BLOCK), before.split(BLOCK), after.split(BLOCK), strict=True
        )
    ]
    positions = torch.cat(parts)
    return positions.to(positions_dtype(shape)), after.index_select(0, positions)


def _known(positions: Tensor | None) -> Tensor:
    assert positions is not None
    return positions


def _size(entries: Any, *, alone: bool = False) -> int:
    return sum(new.nbytes + (0 if alone else positions.nbytes) for positions, new in entries)


class PatchFollower:
    """A plain model that follows a chain of patches: its weights become those of each step, bit for bit.

    Args:
        model: as it was loaded from the chain's base or from an anchor, in the chain's dtype; on any device.
        folder: the chain, which may grow while it is followed.

    Raises :class:`PatchError` where the model is in no state of the chain and there is no anchor to load.
    """

    def __init__(self, model: nn.Module, folder: str | Path) -> None:
        self.model, self.folder = model, Path(folder)
        self._tensors = {item.name: item.value for item in LiveState(model).tensors()}
        self._marks = {name: _mark_of(value) for name, value in self._tensors.items()}
        self.step: int | None = None
        self._seen: set[str] | None = None  # the files of the last look, which led to the last step

    @classmethod
    def load(cls, folder: str | Path, step: int | None = None, **options: Any) -> PatchFollower:
        """Load the model of a step, by default the last, as transformers' ``AutoModelForCausalLM``, in eval mode.

        The folder must hold a ``config.json``, as :class:`PatchRecorder` writes it. ``options`` are those of
        ``from_pretrained``, for instance ``device_map``.
        """
        from transformers import AutoModelForCausalLM

        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch) / "model"
            PatchChain.read(folder).restore(place, step)
            if not (place / "config.json").is_file():
                raise PatchError(f"{folder} holds no config.json; copy the model's into it.")
            model = AutoModelForCausalLM.from_pretrained(place, **{"dtype": "auto", **options}).eval()
        follower = cls(model, folder)
        follower.poll(step)
        return follower

    @property
    def state(self) -> str:
        """The content hash of the model's weights as this follower left them."""
        return state_hash(self._marks)

    def poll(self, step: int | None = None) -> int | None:
        """Go to a step, by default the last one in the folder; the step, or None where it was reached before.

        Every patch is checked whole before the first byte of the model changes. Raises :class:`PatchError` for a chain
        that does not lead there; the model keeps its last step.
        """
        names = {path.name for path in self.folder.glob("*.safetensors")}
        if step is None and names == self._seen:
            return None
        chain = PatchChain.read(self.folder)
        wanted = chain.steps[-1] if step is None else step
        run = chain.way(wanted, self.state)
        if not run:
            new = self.step != wanted
            self.step, self._seen = wanted, names if step is None else None
            return wanted if new else None
        opened = [PatchFile(info.path) for info in run]
        try:
            patches = linked(opened)
            self._check(patches)
            for patch in patches:
                self._apply(patch)
        finally:
            for patch in opened:
                patch.close()
        self.step, self._seen = wanted, names if step is None else None
        return wanted

    def _check(self, patches: list[PatchFile]) -> None:
        for patch in patches:
            for name, shape in patch.info.shapes.items():
                mark = self._marks.get(name)
                if mark is None or (mark.shape, mark.stored) != (shape, patch.stored(name)):
                    raise PatchError(
                        f"{patch.info.path} changes {name} ({patch.stored(name)} {shape}); the model has "
                        f"{'no such tensor' if mark is None else f'{mark.stored} {mark.shape}'}."
                    )

    @torch.no_grad()
    def _apply(self, patch: PatchFile) -> None:
        for name in patch.names:
            value = self._tensors[name]
            flat = value.view(-1)
            for start, positions, new in _parts(patch, name, value.numel()):
                if patch.info.kind == "full":
                    flat[start : start + len(new)] = new.to(value.device)
                elif len(positions):
                    bits_of(flat).index_copy_(0, positions.to(value.device), bits_of(new).to(value.device))
            self._marks[name] = _mark_of(value)
        if self.state != patch.info.result:
            raise PatchError(f"{patch.info.path} should lead to the state {patch.info.result} and led to {self.state}.")


def _parts(patch: PatchFile, name: str, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    none = torch.empty(0, dtype=torch.int64)
    reader = patch.entries(name) if patch.info.kind != "full" else None
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        if reader is None:
            yield start, none, patch.read(name, "values", start, stop)
        else:
            yield start, *reader.take(stop)


def _mark_of(value: Tensor) -> TensorMark:
    return TensorMark(STORED_NAMES[value.dtype], tuple(value.shape), hash_tensor(value))
