"""GRPO and RLOO by TRL's vLLM path, with an engine that generates from the weights it was sent."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from helpers import assert_same_base, base_bytes
from trainers import (
    CASES,
    TRAINERS,
    Case,
    adapter_state,
    assert_same_state,
    each,
    logged,
    merged_parameters,
    pretrained,
)
from trl_host.engine import Engine, install

STEPS = 3


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(case: Case) -> Engine:
        engine = Engine(case.base())
        install(monkeypatch, engine)
        return engine

    return make


def run(kind: str, case: Case, folder: Path, **options: Any) -> Trainer:
    model = pretrained(case)
    trainer = TRAINERS[kind](
        model, folder, steps=STEPS, more=case.optimizers(model), use_vllm=True, vllm_mode="colocate", **options
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("case", "checkpointing"), [*((case, False) for case in CASES), *((CASES[i], True) for i in (3, 4, 6))], ids=str
)
def test_the_engine_samples_from_the_policy(case: Case, checkpointing: bool, patched: Any, tmp_path: Path) -> None:
    engine = patched(case)
    own = base_bytes(case.base())
    trainer = run("grpo", case, tmp_path, gradient_checkpointing=checkpointing)
    assert len(engine.syncs) == STEPS
    assert logged(trainer, "kl")[0] == 0.0
    # The merged model's log-probabilities and the adapter's own. In bf16 a token alone and one of a batch may round
    # apart, as the processor's kernels have it; weights one step old are 0.11 away or more.
    tolerance = 1e-2 if case.dtype == torch.bfloat16 else 1e-5  # observed: 3.6e-3 at most, 9.5e-7 at most
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < tolerance
    model = trainer.model
    trainer.vllm_generation.sync_weights()
    assert_same_state(engine.last(), merged_parameters(model))
    assert_same_base(own, base_bytes(model.unload()))


@each([CASES[1], CASES[3], CASES[6]])
def test_rloo(case: Case, patched: Any, tmp_path: Path) -> None:
    engine = patched(case)
    trainer = run("rloo", case, tmp_path)
    assert len(engine.syncs) == STEPS
    assert logged(trainer, "kl")[0] == 0.0


@each([CASES[2], CASES[5], CASES[6]])
def test_accumulated_steps_share_a_sync(case: Case, patched: Any, tmp_path: Path) -> None:
    engine = patched(case)
    run("grpo", case, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert len(engine.syncs) == STEPS


@each([CASES[4], CASES[5], CASES[6]])
def test_the_same_training_without_the_engines_syncs(case: Case, patched: Any, tmp_path: Path) -> None:
    """The engine gets its weights by a merged copy instead; everything else is as before."""
    engine = patched(case)
    with_syncs = run("grpo", case, tmp_path)
    engine = patched(case)
    model = pretrained(case)
    trainer = TRAINERS["grpo"](
        model, tmp_path, steps=STEPS, more=case.optimizers(model), use_vllm=True, vllm_mode="colocate"
    )

    def by_copy() -> None:
        engine.load_weights(merged_parameters(model).items())
        engine.reset_prefix_cache()

    trainer.vllm_generation.sync_weights = by_copy
    trainer.train()
    assert len(engine.syncs) == STEPS
    assert_same_state(adapter_state(model), adapter_state(with_syncs.model))
