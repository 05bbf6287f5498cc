"""GeometryCallback inside real trainers: what it logs, when, and where to."""

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from grpo import tokenizer, trainer_for
from helpers import tiny_llama
from lifecycle import tiny
from offprincipal_peft.geometry.spectrum import WeightSpectrum
from offprincipal_peft.rlvr.callbacks import GeometryCallback
from watched import lora_config, run, small_model, trainer_of


def _weights(model: Any) -> dict[str, Tensor]:
    """Merged, in fp64, without PEFT's wrappers."""
    merged = copy.deepcopy(model).double()
    merged = merged.merge_and_unload() if isinstance(merged, peft.PeftModel) else merged
    return {name.removesuffix(".weight"): p.detach() for name, p in merged.named_parameters()}


Q = "model.layers.0.self_attn.q_proj"


class _Recorder(TrainerCallback):
    """A reporter: what it was told, and whether its run was still open."""

    made: list["_Recorder"]

    def __init__(self) -> None:
        self.logs: list[tuple[int, dict[str, float]]] = []
        self.open = False
        self.made.append(self)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.open = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        assert self.open, f"step {state.global_step} was logged to a run that is closed"
        self.logs.append((state.global_step, dict(logs)))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.open = False


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[_Recorder]:
    kind = type("Fresh", (_Recorder,), {"made": []})
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", kind)
    return kind


# -- where it logs ----------------------------------------------------------------------------------------------------


def test_grpo_logs_to_the_trainers_own_reporter(recorder: type[_Recorder], tmp_path: Path) -> None:
    trainer = trainer_for(tiny_llama(), tmp_path, lora_config(), steps=5, report_to=["recorder"])
    callback = GeometryCallback(interval=2)
    trainer.add_callback(callback)
    trainer.train()
    assert len(recorder.made) == 1  # no second reporter, and so no second run
    logs = recorder.made[0].logs
    assert [step for step, entry in logs if "geometry/update_norm" in entry] == [2, 4, 5]
    assert [step for step, entry in logs if "geometry/final/spectral_shift_mean" in entry] == [5]
    assert [step for step, entry in logs if "reward" in entry] == [1, 2, 3, 4, 5]  # TRL's own are all there
    assert [entry["step"] for entry in callback.history] == [2, 4, 5]
    for entry in callback.history:
        told = next(e for step, e in logs if step == entry["step"] and "geometry/update_norm" in e)
        assert told["geometry/update_norm"] == entry["geometry/update_norm"] > 0
    kept = [e["step"] for e in trainer.state.log_history if "geometry/share_output" in e]
    assert kept == [2, 4, 5]


def test_report_to_none_still_fills_the_history(tmp_path: Path) -> None:
    callback = GeometryCallback(interval=2)
    trainer = run("lora", tmp_path, callback)
    assert [entry["step"] for entry in callback.history] == [2, 4, 5]
    assert sum("geometry/update_norm" in entry for entry in trainer.state.log_history) == 3


def test_sft_with_the_callback_in_one_line(recorder: type[_Recorder], tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    callback = GeometryCallback()
    SFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to=["recorder"], max_steps=3, save_strategy="no",
            gradient_checkpointing=False, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": [f"w{i} w{i + 1} w{i + 2}" for i in range(64)]}),
        processing_class=tokenizer(),
        peft_config=lora_config(),
        callbacks=[callback],
    ).train()  # fmt: skip
    assert [entry["step"] for entry in callback.history] == [3]  # the default interval is longer than the run
    assert any("geometry/update_norm" in entry for _, entry in recorder.made[0].logs)


def test_per_layer_figures_reach_the_reporter_on_request(recorder: type[_Recorder], tmp_path: Path) -> None:
    run("lora", tmp_path, GeometryCallback(per_layer=True, layers="q_proj"), report_to=["recorder"])
    told = {name for _, entry in recorder.made[0].logs for name in entry if name.startswith("geometry/")}
    assert f"geometry/{Q}/share_input" in told
    assert not any("down_proj" in name for name in told)


def test_tensorboard_gets_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run("lora", tmp_path, GeometryCallback(interval=1), report_to=["tensorboard"])
    assert len(list((tmp_path / "board").iterdir())) == 1


def test_outside_of_a_trainer_it_says_that_no_reporter_hears_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, args = small_model("lora"), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    callback, state, control = GeometryCallback(interval=1), TrainerState(global_step=1), TrainerControl()
    with caplog.at_level(logging.WARNING):
        callback.on_train_begin(args, state, control, model=model)
    assert "no reporter" in caplog.text
    callback.on_step_end(args, state, control, model=model)
    assert [entry["step"] for entry in callback.history] == [1]


def test_only_the_first_process_measures(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    callback, control = GeometryCallback(interval=1), TrainerControl()
    state = TrainerState(global_step=1, is_world_process_zero=False)
    callback.on_train_begin(args, state, control, model=small_model("lora"))
    callback.on_step_end(args, state, control)
    callback.on_train_end(args, state, control)
    assert callback.history == []
    assert state.log_history == []


# -- when and what ----------------------------------------------------------------------------------------------------


class _Stop(TrainerCallback):
    """Asks for the end after the second step, or at the end of the epoch that has it (8 steps)."""

    def __init__(self, event: str) -> None:
        self.event = event

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.event == "step":
            control.should_training_stop = state.global_step >= 2

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True


@pytest.mark.parametrize("first", [True, False], ids=["asked for before", "asked for after"])
@pytest.mark.parametrize("event", ["step", "epoch"])
def test_an_early_stop_still_ends_with_a_report(
    event: str, first: bool, recorder: type[_Recorder], tmp_path: Path
) -> None:
    callback = GeometryCallback(interval=50)
    callbacks = [_Stop(event), callback] if first else [callback, _Stop(event)]
    trainer_of(small_model("lora"), tmp_path, callbacks, steps=20, report_to=["recorder"]).train()
    last = 2 if event == "step" else 8
    assert [entry["step"] for entry in callback.history] == [last]
    assert callback.summary["step"] == last
    assert len(callback.layers) == 4
    # at the very end of training the reporters' runs are closed, and a log would open new ones
    heard = any("geometry/update_norm" in entry for _, entry in recorder.made[0].logs)
    assert heard == (first or event == "step")


@pytest.mark.parametrize("method", ["lora", "offprincipal", "dora", "full"])
def test_the_report_is_that_of_the_merged_weights(method: str, tmp_path: Path) -> None:
    model = small_model(method)
    before = _weights(model)
    callback = GeometryCallback(k=3)
    trainer_of(model, tmp_path, [callback]).train()
    after = _weights(model)
    total = 0.0
    for layer in callback.layers:
        delta = after[layer["name"]] - before[layer["name"]]
        U = torch.linalg.svd(before[layer["name"]])[0][:, :3]
        total += float(delta.square().sum())
        assert layer["update_norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert layer["share_output"] == pytest.approx(float((U.T @ delta).norm() / delta.norm()) ** 2, abs=1e-6)
    assert callback.summary["update_norm"] == pytest.approx(math.sqrt(total), rel=1e-5)  # seen 2e-7
    last = callback.layer_history[-1]["layers"]
    assert {layer["name"] for layer in callback.layers} == last.keys()
    for layer in callback.layers:
        assert last[layer["name"]]["update_norm"] == pytest.approx(layer["update_norm"], rel=1e-12)


def test_off_principal_training_stays_off_and_lora_does_not(tmp_path: Path) -> None:
    shares = {}
    for method in ("lora", "offprincipal"):
        callback = GeometryCallback(k=5)  # that of the adapter
        run(method, tmp_path / method, callback)
        shares[method] = callback.summary
    assert shares["offprincipal"]["share_output"] <= 1e-12  # seen 2e-14
    assert shares["lora"]["share_output"] > 0.01
    assert shares["lora"]["random_output"] == pytest.approx(5 / 32, rel=0.2)


def test_a_record_is_json_and_repeats(tmp_path: Path) -> None:
    texts = []
    for name in ("first", "second"):
        callback = GeometryCallback(interval=2)
        run("lora", tmp_path / name, callback)
        record = callback.record()
        texts.append(json.dumps(record, allow_nan=False))
        assert set(record) == {"history", "layers", "summary"}
    assert texts[0] == texts[1]


def test_without_the_final_report_nothing_is_decomposed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(self: WeightSpectrum) -> Tensor:
        raise AssertionError("a whole spectrum was computed")

    monkeypatch.setattr(WeightSpectrum, "values", forbidden)
    callback = GeometryCallback(interval=2, final=False)
    run("lora", tmp_path, callback)
    assert callback.layers == []
    assert callback.summary["update_norm"] == callback.history[-1]["geometry/update_norm"]
    with pytest.raises(AssertionError, match="a whole spectrum"):
        run("lora", tmp_path, GeometryCallback())


def test_bases_come_from_the_cache_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = GeometryCallback(final=False, cache_dir=tmp_path / "cache")
    run("lora", tmp_path / "one", first)

    def forbidden(self: WeightSpectrum, k: int) -> Any:
        raise AssertionError("a basis was computed")

    monkeypatch.setattr(WeightSpectrum, "_top", forbidden)
    second = GeometryCallback(final=False, cache_dir=tmp_path / "cache")
    run("lora", tmp_path / "two", second)
    assert second.history == first.history
    with pytest.raises(AssertionError, match="a basis was computed"):
        run("lora", tmp_path / "three", GeometryCallback())


@pytest.mark.parametrize("method", ["lora", "sparse"])
def test_a_resumed_run_starts_at_its_checkpoint_or_at_the_base(method: str, tmp_path: Path) -> None:
    base = _weights(tiny())
    run(method, tmp_path, GeometryCallback(final=False), save_strategy="steps", save_steps=3, steps=6)
    norms = {}
    for since in ("start", "base"):
        callback = GeometryCallback(since=since, final=False)
        model = small_model(method)
        trainer = trainer_of(model, tmp_path, [callback], save_strategy="no", steps=6)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        norms[since] = callback.history[-1]["geometry/update_norm"]
        assert [entry["step"] for entry in callback.history] == [6]
    resumed = peft.PeftModel.from_pretrained(tiny(), tmp_path / "checkpoint-3")
    then, now = _weights(resumed), _weights(model)
    names = [layer for layer in now if layer.endswith("_proj")]
    for since, start in (("start", then), ("base", base)):
        truth = math.sqrt(sum(float((now[name] - start[name]).square().sum()) for name in names))
        assert norms[since] == pytest.approx(truth, rel=1e-5), since  # seen 3e-7
    assert norms["start"] != pytest.approx(norms["base"], rel=0.05)


class _Break(TrainerCallback):
    """Diverges at the third step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 3:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(torch.nan)


def test_a_diverged_run_is_reported_and_not_stopped(recorder: type[_Recorder], tmp_path: Path) -> None:
    callback = GeometryCallback(interval=1)
    trainer_of(small_model("lora"), tmp_path, [_Break(), callback], report_to=["recorder"]).train()
    norms = [entry["geometry/update_norm"] for entry in callback.history]
    assert [math.isfinite(norm) for norm in norms] == [True, True, True, False, False]
    assert all(layer["spectral_shift"] is None for layer in callback.layers)
    assert all(math.isfinite(v) for _, entry in recorder.made[0].logs for n, v in entry.items() if "geometry" in n)


def test_a_second_run_begins_anew(tmp_path: Path) -> None:
    callback = GeometryCallback(final=False)
    trainer = run("lora", tmp_path, callback, steps=4)
    first = callback.history[-1]["geometry/update_norm"]
    trainer.optimizer, trainer.lr_scheduler = None, None
    trainer.train()
    assert len(callback.history) == 1
    assert callback.history[0]["geometry/update_norm"] != first


def test_a_layer_that_cannot_be_read_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(tiny(), lora_config(target_modules=["q_proj", "embed_tokens"]))
    callback = GeometryCallback(interval=1, final=False)
    with caplog.at_level(logging.WARNING, "offprincipal_peft"):
        trainer_of(model, tmp_path, [callback]).train()
    assert sum("embed_tokens is not observed" in record.getMessage() for record in caplog.records) == 1
    assert list(callback.record()["not_observed"]) == ["model.embed_tokens"]
    assert len(callback.layer_history[0]["layers"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval=0"),
        ({"k": 0}, "k=0"),
        ({"k": 1.0}, "k=1.0"),
        ({"k": True}, "k=True"),
        ({"since": "init"}, "since='init'"),
        ({"sample_rows": 0}, "sample_rows=0"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeometryCallback(**options)


def test_a_pattern_without_a_match_stops_the_run_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'query' matches none"):
        run("lora", tmp_path, GeometryCallback(layers="query"))
