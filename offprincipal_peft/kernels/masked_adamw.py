"""AdamW for packed masked parameters, with a split master, 16-bit moments and rounding ablations.

For a plain fp32 parameter with fp32 moments this is torch's fused AdamW, bit for bit. A split master is updated in
chunks that stay in the cache: gather the bf16 halves, join, fused AdamW, split, scatter. Weight decay acts on the
update, the distance from the base weight, never on the weight itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from ..geometry.precision import join_master, round_stochastically, split_master
from .layout import CHUNK
from .packed_update import PackedMaster, master_of

_MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW that trains every precision of :class:`~offprincipal_peft.PrincipalSparseConfig`.

    Args:
        params: parameters or groups, as for any torch optimiser; those that are not packed train as usual.
        lr: learning rate.
        betas: decay of the first and second moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; of a packed parameter it decays the update towards zero.
        moments: ``"fp32"``, or ``"bf16"`` to store both moments in half the memory (rounded to nearest each step).
        seed: of the stochastic rounding, which depends on it, the parameter's position and the step alone, so that a
            resumed run repeats an uninterrupted one.

    Raises:
        ValueError: a hyperparameter out of range.
        RuntimeError: a split master whose weight is merged, or a sparse gradient.

    Source: AdamW is 1711.05101, Algorithm 2; the split master stores an fp32 value as its bf16 rounding (which is the
    weight) and a 16-bit remainder.
    """

    knows_packed_masters = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        moments: Literal["fp32", "bf16"] = "fp32",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "moments": moments,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, with every group's own options checked."""
        options = {**self.defaults, **param_group}
        if options["moments"] not in _MOMENTS:
            raise ValueError(f"moments must be 'fp32' or 'bf16', got {options['moments']!r}")
        for name in ("lr", "eps", "weight_decay"):
            if not options[name] >= 0:
                raise ValueError(f"{name} must not be negative, got {options[name]}")
        if not all(0 <= beta < 1 for beta in options["betas"]):
            raise ValueError(f"betas must lie in [0, 1), got {options['betas']}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        position = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                position += 1
                if parameter.grad is not None:
                    self._update(parameter, group, position)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], position: int) -> None:
        grad = parameter.grad
        assert grad is not None
        if grad.is_sparse:
            raise RuntimeError("MaskedAdamW takes dense gradients; a packed gradient is a dense vector of the entries")
        master = master_of(parameter)
        matrix = master.current() if master is not None and master.precision == "split" else None
        state = self.state[parameter]
        if not state:  # sharded like the parameter, so that a checkpoint of the optimiser is
            dtype = _MOMENTS[group["moments"]] if parameter.dtype != torch.float64 else torch.float64
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = _zeros(parameter, dtype)
            state["exp_avg_sq"] = _zeros(parameter, dtype)
        state["step"] += 1
        step = _Step(group, state["step"].to(grad.device))
        value, grad = _own_part(parameter.detach()), _own_part(grad)
        flat = [value.reshape(-1), grad.reshape(-1)]  # a packed parameter is a vector already
        moments = [_own_part(state[key]).view(-1) for key in ("exp_avg", "exp_avg_sq")]
        if master is None:
            _step_plain(value, flat[1].view(value.shape), moments, step)
        elif matrix is not None:
            _step_split(matrix, master, flat[0], flat[1], moments, step)
        else:
            generator = None
            if master.precision == "bf16-stochastic":
                generator = _generator(parameter.device, f"{group['seed']}/{position}/{int(state['step'])}")
            _step_rounded(master, flat[0], flat[1], moments, step, generator)
        torch.autograd.graph.increment_version(parameter)  # the fused kernel does not
        if master is not None:
            master.stepped()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but moments keep the dtype they were saved in, where torch casts them to the parameter's.

        Raises ``ValueError`` where they were saved in another precision than this optimiser keeps.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            kept = saved.get("moments", group["moments"])
            if kept != group["moments"]:
                raise ValueError(f"the saved state has {kept} moments, this optimiser was made with {group['moments']}")
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                saved = state_dict["state"][number]
                self.state[parameter]["step"] = saved["step"].detach().clone()
                for key in ("exp_avg", "exp_avg_sq"):
                    self.state[parameter][key] = saved[key].detach().to(parameter.device, copy=True)


def _own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that FSDP2 shards: the update is made entry by entry."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _zeros(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """In the parameter's shape, contiguous where it is not; sharded as it is."""
    if hasattr(parameter, "to_local"):
        return torch.zeros_like(parameter, dtype=dtype)
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


def _generator(device: torch.device, what: str) -> torch.Generator:
    """Seeded by a hash, of which the low 32 bits are all that a CPU generator takes."""
    digest = hashlib.blake2b(what.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


_LANES = 16  # fp32 numbers that torch's kernel takes at once; it rounds the few left over differently


class _Step:
    """One step's scalars and torch's fused kernel on flat fp32 (or fp64) tensors."""

    def __init__(self, group: dict[str, Any], number: Tensor) -> None:
        self.group, self.number = group, number
        self.lr, self.weight_decay = float(group["lr"]), float(group["weight_decay"])
        self._scratch: dict[int, Tensor] = {}

    def scratch(self, key: int, like: Tensor) -> Tensor:
        """Memory in the size and dtype of ``like``, the same for every chunk: fresh memory would double the time."""
        held = self._scratch.get(key)
        if held is None or held.numel() < like.numel():
            held = self._scratch[key] = torch.empty_like(like)
        return held[: like.numel()]

    def __call__(self, value: Tensor, grad: Tensor, moments: list[Tensor], weight_decay: float = 0.0) -> None:
        beta1, beta2 = self.group["betas"]
        torch._fused_adamw_(
            [value],
            [grad],
            [moments[0]],
            [moments[1]],
            [],
            [self.number],
            lr=self.lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=self.group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def chunk(self, value: Tensor, grad: Tensor, moments: list[Tensor], weight_decay: float = 0.0) -> None:
        """The same on a chunk, converting where dtypes differ, so that the result does not depend on the chunks."""
        wide = [m if m.dtype == value.dtype else self.scratch(i, value).copy_(m) for i, m in enumerate(moments)]
        grad = grad.to(value.dtype)
        whole = value.numel() // _LANES * _LANES
        if whole:
            self(value[:whole], grad[:whole], [m[:whole] for m in wide], weight_decay)
        if whole < value.numel():
            rest = [torch.nn.functional.pad(t[whole:], (0, _LANES)) for t in (value, grad, *wide)]
            self(rest[0], rest[1], rest[2:], weight_decay)
            for target, padded in zip((value, *wide), (rest[0], *rest[2:]), strict=True):
                target[whole:] = padded[: value.numel() - whole]
        for stored, new in zip(moments, wide, strict=True):
            if stored is not new:
                stored.copy_(new)

    def decay(self, value: Tensor, original: Tensor) -> None:
        """In place: pull ``value`` towards ``original``, by the decay that AdamW would apply to their difference."""
        if self.weight_decay:
            value.sub_((value - original).mul_(self.lr * self.weight_decay))  # two roundings, the same in every lane


def _step_plain(value: Tensor, grad: Tensor, moments: list[Tensor], step: _Step) -> None:
    """A parameter that is its own master. Whole where nothing has to be converted, else in chunks."""
    if value.dtype == moments[0].dtype and value.is_contiguous():
        step(value, grad, [m.view(value.shape) for m in moments], step.weight_decay)
        return
    if not value.is_contiguous():
        wide = value.contiguous().to(torch.promote_types(value.dtype, torch.float32))
        step.chunk(wide.view(-1), grad.reshape(-1), moments, step.weight_decay)
        value.copy_(wide)
        return
    flat, gradient = value.view(-1), grad.view(-1)
    for start in range(0, flat.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        wide = flat[part].to(torch.promote_types(value.dtype, torch.float32))
        step.chunk(wide, gradient[part], [m[part] for m in moments], step.weight_decay)
        if wide.data_ptr() != flat[part].data_ptr():
            flat[part].copy_(wide)


def _step_split(
    matrix: Tensor, master: PackedMaster, parameter: Tensor, grad: Tensor, moments: list[Tensor], step: _Step
) -> None:
    low, layout = parameter.view(torch.int16), master.layout
    original = master.original() if step.weight_decay else None
    for part, where in layout.chunks():
        high = layout.gather_chunk(matrix, where, part.stop - part.start)
        gradient = grad[part].to(torch.float32)
        value = join_master(high, low[part], out=step.scratch(2, gradient))
        if original is not None:
            step.decay(value, original[part].float())
        step.chunk(value, gradient, [m[part] for m in moments])
        high, new_low = split_master(value, consume=True)
        layout.scatter_chunk_(matrix, where, high)
        low[part] = new_low


def _step_rounded(
    master: PackedMaster,
    values: Tensor,
    grad: Tensor,
    moments: list[Tensor],
    step: _Step,
    generator: torch.Generator | None,
) -> None:
    original = master.original() if step.weight_decay else None
    for start in range(0, values.numel(), CHUNK):
        part = slice(start, min(start + CHUNK, values.numel()))
        value = values[part].float()
        if original is not None:
            step.decay(value, original[part].float())
        step.chunk(value, grad[part], [m[part] for m in moments])
        values[part] = value.to(torch.bfloat16) if generator is None else round_stochastically(value, generator)
