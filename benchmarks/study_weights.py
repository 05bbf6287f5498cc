"""What the study's trials did to the weights, from the weights that they saved.

A spec with ``audits:`` keeps what its trials trained; ``study.py collect`` then adds one of these to its result file:

- ``pairs``: every trial against the model that it started from (:func:`pairs`);
- ``consensus``: whether trials changed the same entries, beside what chance, magnitudes and stripes alone would
  give (:func:`consensus`);
- ``interventions``: trials from a model in another basis against those from the model itself, entry by entry as they
  are and carried back (:func:`interventions`).

Masters are fp32 and the models that they start from hold numbers that bf16 can hold: an entry counts as changed
where its bf16 rounding did. Matrices of the layers only; embeddings, norms and the head are left out.

    python benchmarks/study_weights.py turn runs/study/model runs/study/turned
    python benchmarks/study_weights.py round smollm2-135m runs/study/smollm2

``turn`` writes the model in another basis: the values of one layer rotated, the heads of another one permuted.
``round`` writes a model rounded to bf16: weights dequantised from 4 bits lie between two bf16 numbers, from where any
step, however small, may cross a rounding boundary.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from audit_runs import save_as
from safetensors.torch import load_file
from torch import Tensor

from offprincipal_peft.audit import WeightAudit, audit
from offprincipal_peft.audit.pooling import Pooled, pool, ratio
from offprincipal_peft.geometry import Intervention, apply_interventions, find_layouts, unchanged
from offprincipal_peft.geometry.magnitude import KEYS, magnitude_keys, quantile_bins
from offprincipal_peft.geometry.rotations import haar_rotation
from offprincipal_peft.rlvr.config import TrialConfig

LARGE = 512  # channels from which on the audits' fast mode is taken, whose stated errors are in their reports
RANK = 1 / 16  # k of the audits, as a fraction of min(shape)
ROUNDS = 30  # of the proportional fitting
ROTATED, PERMUTED = 1, 2  # layers of the model in another basis
Matrices = dict[str, Tensor]
Saved = Callable[[TrialConfig], Path]


def matrices(folder: str | Path) -> Matrices:
    """The layers' matrices of a saved model, fp32."""
    tensors = load_file(Path(folder) / "model.safetensors")
    return {name: value.float() for name, value in sorted(tensors.items()) if ".layers." in name and value.ndim == 2}


def kind_of(name: str) -> str:
    """ "q_proj" of "model.layers.0.self_attn.q_proj.weight"."""
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def changes(before: Matrices, after: Matrices) -> Matrices:
    """Boolean: where the bf16 rounding is another."""
    return {name: ~unchanged(before[name].bfloat16(), after[name].bfloat16()) for name in before}


# ---- every trial against its start


def pairs(configs: Sequence[TrialConfig], saved: Saved) -> list[dict[str, Any]]:
    """One audit of each trial that saved a whole model (adapters and failures are left out), its matrices pooled."""
    found = []
    for config in configs:
        if not (saved(config) / "model.safetensors").is_file():
            continue
        large = min(max(weight.shape) for weight in matrices(config.model).values()) > LARGE
        report = audit(Path(config.model), saved(config), rank=RANK, mode="fast" if large else "exact")
        weights = [w for w in report.weights if w.layer is not None and len(w.shape) == 2]
        found.append({"id": config.trial_id, **pooled_figures(pool("all", weights, 0), weights)})
    return found


def pooled_figures(row: Pooled, weights: Sequence[WeightAudit], position: int = 0) -> dict[str, Any]:
    """What the study's tables show of one tuned checkpoint, the ``position``-th of its audit (from 0)."""
    angles = [found for weight in weights if (found := weight.changes[position].angles) is not None]
    largest = [math.degrees(max(found.output[-1], found.input[-1])) for found in angles]
    matched = row.matched
    return {
        "sparsity": row.sparsity,
        "relative_norm": row.relative_norm,
        "shift": row.shift,
        "angle": sorted(largest)[len(largest) // 2] if largest else None,  # degrees, the matrices' median
        "angle_largest": max(largest, default=None),
        "principal": ratio(row.principal),
        "low": ratio(row.low),
        "matched": matched.ratio if matched is not None else None,
        "coverage": matched.coverage if matched is not None else None,
        **{f"share_{side}": share.value for side, share in row.shares.items()},
        **{f"share_{side}_sizes": share.value / share.sizes for side, share in row.shares.items() if share.sizes},
        **{f"share_{side}_random": share.value / share.random for side, share in row.shares.items() if share.random},
    }


# ---- trials against each other


def magnitude_bins(weight: Tensor) -> Tensor:  # any shape -> int64, the same: 64 quantile bins of |weight|
    keys = magnitude_keys(weight).long()
    return quantile_bins(torch.bincount(keys.flatten(), minlength=KEYS))[keys]


def by_magnitude(changed: Tensor, bins: Tensor) -> Tensor:  # bool, int64 (d_out, d_in) -> fp64, the same
    """The probability that magnitude alone gives each entry: the rate of its bin."""
    counts = torch.bincount(bins.flatten())
    hits = torch.bincount(bins[changed], minlength=counts.numel())
    return (hits.double() / counts.clamp(min=1))[bins]


def by_stripes(changed: Tensor, bins: Tensor) -> Tensor:  # bool, int64 (d_out, d_in) -> fp64, the same
    """The same of magnitude, row and column together: proportional fitting to all three margins, at most 1 each."""
    fitted = by_magnitude(changed, bins)
    hits = torch.bincount(bins[changed], minlength=int(bins.max()) + 1).double()
    rows, columns = changed.sum(1, keepdim=True).double(), changed.sum(0, keepdim=True).double()
    for _ in range(ROUNDS):
        fitted *= rows / fitted.sum(1, keepdim=True).clamp(min=1e-12)
        fitted *= columns / fitted.sum(0, keepdim=True).clamp(min=1e-12)
        held = torch.zeros_like(hits).index_add_(0, bins.flatten(), fitted.flatten())
        fitted = (fitted * (hits / held.clamp(min=1e-12))[bins]).clamp_(max=1)
    return fitted


class Model:
    """One trial's changed entries and the probabilities that each explanation gives them, by matrix."""

    def __init__(self, changed: Matrices, bins: Matrices, stripes: bool = True) -> None:
        self.changed = changed
        self.magnitude = {name: by_magnitude(each, bins[name]) for name, each in changed.items()}
        self.stripes = {name: by_stripes(each, bins[name]) for name, each in changed.items()} if stripes else {}


def agreement(a: Model, b: Model, names: Iterable[str]) -> dict[str, float | None]:
    """Jaccard of two trials' changed entries over some matrices, and what each explanation predicts of it.

    An explanation takes the two as independent given its probabilities: sum of p q over |a| + |b| - sum of p q.
    """
    names = list(names)
    total = float(sum(a.changed[n].sum() + b.changed[n].sum() for n in names))

    def index(common: float) -> float | None:
        return common / (total - common) if total > common else None

    found = {"observed": float(sum((a.changed[n] & b.changed[n]).sum() for n in names))}
    found["independent"] = sum(
        float(a.changed[n].sum()) * float(b.changed[n].sum()) / a.changed[n].numel() for n in names
    )
    found["magnitude"] = sum(float((a.magnitude[n] * b.magnitude[n]).sum()) for n in names)
    if a.stripes and b.stripes:
        found["stripes"] = sum(float((a.stripes[n] * b.stripes[n]).sum()) for n in names)
    return {name: index(common) for name, common in found.items()}


def consensus(configs: Sequence[TrialConfig], saved: Saved) -> dict[str, Any]:
    """Every pair of trials of one model: all matrices together, and means over the pairs by kind; stripes by kind."""
    base = matrices(configs[0].model)
    bins = {name: magnitude_bins(weight) for name, weight in base.items()}
    models = [Model(changes(base, matrices(saved(config))), bins) for config in configs]
    kinds = list(dict.fromkeys(map(kind_of, base)))
    rows, by_kind = [], []
    for (i, a), (j, b) in itertools.combinations(enumerate(models), 2):
        rows.append({"first": i, "second": j, **agreement(a, b, base)})
        for kind in kinds:
            names = [name for name in base if kind_of(name) == kind]
            by_kind.append({"kind": kind, "first": i, "second": j, **agreement(a, b, names)})
    trials = [
        {"id": c.trial_id, "task": c.task, "seed": c.seed, "density": _density(m.changed)}
        for c, m in zip(configs, models, strict=True)
    ]
    return {"trials": trials, "pairs": rows, "by_kind": by_kind, "unevenness": _unevenness(models, kinds)}


def _density(changed: Matrices) -> float:
    return float(sum(each.sum() for each in changed.values())) / sum(each.numel() for each in changed.values())


def _unevenness(models: Sequence[Model], kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """By kind: the spread of the rows' (columns') shares of changed entries over what magnitudes alone give it.

    Root of the mean squared deviation from what :func:`by_magnitude` expects, over the same of independent draws:
    1 without stripes. Means over trials and matrices.
    """
    found = {}
    for kind in kinds:
        sides: dict[str, list[float]] = {"rows": [], "columns": []}
        for model in models:
            for name in (n for n in model.changed if kind_of(n) == kind):
                p, seen = model.magnitude[name], model.changed[name].double()
                for side, dim in (("rows", 1), ("columns", 0)):
                    expected, variance = p.sum(dim), (p * (1 - p)).sum(dim)
                    if float(variance.sum()) > 0:
                        spread = ((seen.sum(dim) - expected).square().sum() / variance.sum()).sqrt()
                        sides[side].append(float(spread))
        found[kind] = {side: sum(values) / len(values) for side, values in sides.items() if values}
    return found


# ---- trials in another basis


def turn(source: Path, target: Path) -> dict[str, Any]:
    """Write the model of ``source`` in another basis: values of layer 1 rotated, heads of layer 2 permuted.

    Rotated weights are rounded to bf16, as the model's are: what that and the rotation change of the logits is noted.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    layouts = find_layouts(model)
    each = changes_of_basis(layouts)
    text = AutoTokenizer.from_pretrained(source)((source / "other_text.txt").read_text(), return_tensors="pt")
    ids = text["input_ids"][:, :512]
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        apply_interventions(model, each)
        turned = model(ids).logits.log_softmax(-1)
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        rounded = model(ids).logits.log_softmax(-1)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    (target / "other_text.txt").write_text((source / "other_text.txt").read_text())
    summary = {
        "rotated": ROTATED,
        "permuted": PERMUTED,
        "largest_change_of_log_probability": float((turned - before).abs().max()),
        "after_rounding": float((rounded - before).abs().max()),
        "kl_after_rounding": float((before.exp() * (before - rounded)).sum(-1).mean()),
    }
    (target / "turned.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def changes_of_basis(layouts: Sequence[Any]) -> list[Intervention]:
    """The rotation of one layer and the permutation of another, from fixed seeds."""
    rotated, permuted = layouts[ROTATED], layouts[PERMUTED]
    rotation = haar_rotation(rotated.head_dim, 0, heads=rotated.n_kv_heads)
    order = list(reversed(range(permuted.n_kv_heads)))
    within = [list(reversed(range(permuted.n_rep)))] * permuted.n_kv_heads
    return [Intervention.rotate_values(rotated, rotation), Intervention.permute(permuted, order, within)]


def interventions(configs: Sequence[TrialConfig], saved: Saved) -> dict[str, Any]:
    """Each seed's trial from the turned model against its trial from the model itself, by place.

    ``as_is``: changed entries compared position by position; ``carried``: the update carried back into the old basis
    and rounded there first. ``cosine``: of the two updates, which no rounding and no magnitude enters.
    """
    from transformers import AutoModelForCausalLM

    plain, turned = sorted({config.model for config in configs}, key=lambda m: (Path(m) / "turned.json").is_file())
    by_model = {(c.model, c.learning_rate, c.seed): c for c in configs}
    each = changes_of_basis(find_layouts(AutoModelForCausalLM.from_pretrained(plain)))
    moved = {name: one for one in each for name in one.moved_names()}
    starts = {model: matrices(model) for model in (plain, turned)}
    bins = {name: magnitude_bins(weight) for name, weight in starts[plain].items()}
    bins_turned = {name: magnitude_bins(weight) for name, weight in starts[turned].items()}
    rows: list[dict[str, Any]] = []
    for (model, rate, seed), config in by_model.items():
        if model != plain or (turned, rate, seed) not in by_model:
            continue
        ends = {plain: matrices(saved(config)), turned: matrices(saved(by_model[turned, rate, seed]))}
        first = {name: ends[plain][name] - starts[plain][name] for name in bins}
        other = {name: ends[turned][name] - starts[turned][name] for name in bins}
        carried = {n: moved[n].inverse().carry_update(d, n) if n in moved else d for n, d in other.items()}
        base = Model(changes(starts[plain], ends[plain]), bins, stripes=False)
        as_is = Model(changes(starts[turned], ends[turned]), bins_turned, stripes=False)
        back = {n: starts[plain][n] + d for n, d in carried.items()}
        there = Model(changes(starts[plain], back), bins, stripes=False)
        for place, names in places(list(bins), moved).items():
            row = {"rate": rate, "seed": seed, "place": place}
            row["as_is"], row["carried"] = agreement(base, as_is, names), agreement(base, there, names)
            row["cosine"] = {"as_is": _cosine(first, other, names), "carried": _cosine(first, carried, names)}
            rows.append(row)
    return {"turned": json.loads((Path(turned) / "turned.json").read_text()), "rows": rows}


def places(names: Sequence[str], moved: dict[str, Intervention]) -> dict[str, list[str]]:
    """Matrices by what was done to them: rotated, permuted, attention elsewhere, MLPs."""
    found: dict[str, list[str]] = {"rotated": [], "permuted": [], "other attention": [], "MLPs": []}
    for name in names:
        if name in moved:
            found["permuted" if moved[name].is_permutation else "rotated"].append(name)
        else:
            found["other attention" if "self_attn" in name else "MLPs"].append(name)
    return found


def _cosine(a: Matrices, b: Matrices, names: Iterable[str]) -> float | None:
    one, two = (torch.cat([each[name].flatten() for name in names]).double() for each in (a, b))
    product = float(one.norm() * two.norm())
    return float(one @ two) / product if product else None


AUDITS: dict[str, Callable[[Sequence[TrialConfig], Saved], Any]] = {
    "pairs": pairs,
    "consensus": consensus,
    "interventions": interventions,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=["turn", "round"])
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    if (options.target / "model.safetensors").is_file():
        print(f"{options.target} is there already; remove it to make it again")
    elif options.command == "turn":
        print(json.dumps(turn(Path(options.source), options.target)))
    else:
        save_as("bfloat16", options.source, options.target)


if __name__ == "__main__":
    main()
