"""Training does not notice GeometryCallback: weights, random numbers, modes and gradients are those without it."""

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from grpo import trainer_for
from offprincipal_peft.rlvr.callbacks import GeometryCallback
from watched import METHODS, small_model, trainer_of


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in numpy.random.get_state()]


class _Watched(GeometryCallback):
    """Compares what training consists of before and after each of the callback's events."""

    broken: str | None = None

    def _guarded(self, event: str, *args: Any, **kwargs: Any) -> None:
        model = kwargs["model"]

        def now() -> tuple[Any, ...]:
            modes = [module.training for module in model.modules()]
            flags = [(name, p.requires_grad, p.grad is None, p._version) for name, p in model.named_parameters()]
            trained = [p.detach().clone() for p in model.parameters() if p.requires_grad]
            return _random_states(), modes, flags, [tensor.view(torch.uint8).tolist() for tensor in trained]

        before = now()
        getattr(super(), event)(*args, **kwargs)
        if self.broken == "random":
            torch.rand(1)
        elif self.broken == "mode":
            model.eval()
        assert now() == before, event

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._guarded("on_train_begin", *args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._guarded("on_step_end", *args, **kwargs)


def _trained(method: str, folder: Path, callbacks: list[TrainerCallback]) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    trainer = trainer_of(small_model(method), folder, callbacks, steps=4)
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}, _random_states()


@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_same_with_and_without(method: str, tmp_path: Path) -> None:
    plain, plain_random = _trained(method, tmp_path, [])
    callback = _Watched(interval=1)
    watched, watched_random = _trained(method, tmp_path, [callback])
    assert len(callback.history) == 4
    assert watched_random == plain_random
    assert watched.keys() == plain.keys()
    assert all(torch.equal(watched[name].view(torch.uint8), plain[name].view(torch.uint8)) for name in plain)


@pytest.mark.parametrize("broken", ["random", "mode"])
def test_a_callback_that_disturbs_training_is_caught(broken: str, tmp_path: Path) -> None:
    callback = _Watched(interval=1)
    callback.broken = broken
    with pytest.raises(AssertionError):
        _trained("lora", tmp_path, [callback])


@pytest.mark.parametrize("method", ["lora", "offprincipal", "sparse"])
def test_grpo_with_its_reference_adapter_is_the_same(method: str, tmp_path: Path) -> None:
    """A ready PEFT model: TRL adds a "ref" adapter and switches between the two in every step."""
    runs = []
    for callbacks in ([], [GeometryCallback(interval=1, final=False)]):
        trainer = trainer_for(small_model(method), tmp_path, steps=3)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        runs.append((kl, {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])
    assert callbacks[0].history[0]["geometry/update_norm"] > 0
