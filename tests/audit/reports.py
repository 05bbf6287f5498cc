"""Made-up audits for the tests of pages, tables and files: seeded, and of the sizes that the paper reports."""

import math
import random

import torch

from offprincipal_peft.audit.results import (
    Agreement,
    Angles,
    AuditReport,
    Change,
    Inequality,
    Magnitudes,
    Map,
    Matched,
    Overlap,
    Settings,
    Share,
    Source,
    Spectrum,
    Stripes,
    Verdict,
    WeightAudit,
)

KINDS = {
    "q_proj": (96, 96),
    "k_proj": (32, 96),
    "v_proj": (32, 96),
    "o_proj": (96, 96),
    "gate_proj": (256, 96),
    "up_proj": (256, 96),
    "down_proj": (96, 256),
}
SIDES = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}
PROBES = ("bf16", "masks", "stripes", "spectrum", "angles", "map", "consensus")
K = 12


def report(
    layers: int = 4,
    tuned: tuple[str, ...] = ("rl",),
    probes: tuple[str, ...] = PROBES,
    kinds: tuple[str, ...] = tuple(KINDS),
    outside: bool = True,
    still: bool = False,
    seed: int = 0,
) -> AuditReport:
    """An audit of ``layers`` layers. A checkpoint whose name begins with "sft" moves as supervised training does.

    ``outside``: with an embedding and a last norm; ``still``: nothing changed at all.
    """
    rng = random.Random(seed)
    weights = []
    for i in range(layers):
        for kind in kinds:
            name = f"model.layers.{i}.{SIDES.get(kind, 'mlp')}.{kind}.weight"
            weights.append(_weight(rng, name, kind, i, KINDS[kind], tuned, probes, still))
    if outside:
        weights.insert(
            0, _weight(rng, "model.embed_tokens.weight", "embed_tokens", None, (512, 96), tuned, ("bf16",), still)
        )
        weights.append(_weight(rng, "model.norm.weight", "norm", None, (96,), tuned, ("bf16",), still))
    sources = [Source("base", "/models/base", 3 + 7 * layers, 10**6 * layers)]
    sources += [Source(name, f"/models/{name}", 3 + 7 * layers, 10**6 * layers, "'model.' removed") for name in tuned]
    skipped = [("lm_head.weight", "tied: the same content as model.embed_tokens.weight in base, and missing in tuned")]
    skipped += [(f"model.layers.{i}.rotary.inv_freq", "missing in tuned") for i in range(3)]
    settings = Settings(probes, "fast", 0.125, ("*",), "cpu", 0.3, 0.3, seed)
    verdicts = [_verdict(name, still) for name in tuned]
    return AuditReport(settings, sources, weights, skipped, verdicts, "singular values to 2e-7 of the largest", 12.5)


def _verdict(name: str, still: bool) -> Verdict:
    if still:
        return Verdict("none", "unknown", "unknown", "unknown", "unknown", ["No stored weight differs from the base."])
    sentences = [
        f"{name}: 61.3 % of the bf16 weights are bit for bit those of the base.",
        "The update avoids the principal subspaces (a share of 0.61 of what its entries' sizes give).",
        "Magnitude <accounts> for most of it & more.",
    ]
    return Verdict("sparse", "part", "off-principal", "explained", "rows", sentences)


def _weight(
    rng: random.Random,
    name: str,
    kind: str,
    layer: int | None,
    shape: tuple[int, ...],
    tuned: tuple[str, ...],
    probes: tuple[str, ...],
    still: bool,
) -> WeightAudit:
    entries = math.prod(shape)
    changes = [_change(rng, label, shape, entries, probes, still, layer or 0) for label in tuned]
    agreement = _agreement(rng, changes, entries) if "consensus" in probes and len(tuned) > 1 else None
    notes = ["1-D: no spectrum"] if len(shape) < 2 else []
    stored = ["BF16"] * (1 + len(tuned))
    return WeightAudit(name, kind, layer, shape, stored, entries, 0.02 * entries**0.5, changes, agreement, notes)


def _change(
    rng: random.Random, label: str, shape: tuple[int, ...], entries: int, probes: tuple[str, ...], still: bool, at: int
) -> Change:
    sft = label.startswith("sft")
    rate = 0.0 if still else min(1.0, (0.95 if sft else 0.3) * rng.uniform(0.9, 1.05) + 0.004 * at)
    changed = int(rate * entries)
    norm = 0.0 if still else (3e-2 if sft else 2e-4) * 0.02 * entries**0.5 * rng.uniform(0.8, 1.2)
    found = {}
    if "masks" in probes and not still:
        low = 0.318 if sft else 0.7 * rng.uniform(0.9, 1.1)
        principal = 0.297 if sft else 0.267 * rng.uniform(0.95, 1.05)
        found |= {"low": Overlap(low, 0.3), "principal": Overlap(principal, 0.3)}
        other = rate * rng.uniform(0.97, 1.12)
        found["matched"] = Matched(rate, other, 1e-10, 1.1e-10, 0.62, 0.02)
        bins = [math.exp(-6 + 4 * i / 31) for i in range(32)]
        rates = [min(1.0, rate * (2.2 - 1.9 * i / 31)) for i in range(32)]
        on_mask = [None if i < 4 else 0.95 * r for i, r in enumerate(rates)]
        found["magnitudes"] = Magnitudes(bins, [entries // 32] * 32, rates, on_mask)
    if "stripes" in probes:
        found |= {"rows": _stripes(rng, rate, 1.9), "columns": _stripes(rng, rate, 1.1)}
    if "spectrum" in probes:
        found |= _spectral(rng, min(shape), norm, sft, still)
    if "angles" in probes:
        found |= _angles(rng, norm, sft, still)
    if "map" in probes:
        grid = torch.Generator().manual_seed(rng.randrange(2**31))
        cells = (torch.rand(shape[0] // 8, shape[1] // 8, generator=grid) * 0.5 + 0.5) * 255 * rate
        heads = list(range(0, shape[0] + 1, 16)) if shape[0] <= 96 else []
        found["map"] = Map(cells.to(torch.uint8), heads, [])
    return Change(changed, int(changed * 1.02), norm, norm / 50, **found, route="fast", notes=["smooth"] if at else [])


def _stripes(rng: random.Random, mean: float, factor: float) -> Stripes:
    std = 0.02
    profile = [max(0.0, min(1.0, mean + factor * std * rng.gauss(0, 1))) for _ in range(48)]
    return Stripes(mean, factor * std, std, min(profile), max(profile), 0.4 * factor, 0.4, profile)


def _spectral(rng: random.Random, rank: int, norm: float, sft: bool, still: bool) -> dict[str, object]:
    positions = list(range(0, rank, 2))
    before = [2.0 * 0.97**i for i in positions]
    shifts = [0.0 if still else 0.1 * norm * rng.gauss(0, 1) for _ in positions]
    total = math.sqrt(sum(b * b for b in before))
    shift = math.sqrt(sum(s * s for s in shifts)) / total
    spectrum = Spectrum(shift, max(map(abs, shifts)), 0.4 * norm, 6.0 if norm else 0.0, 1e-8, positions, before, shifts)
    factor = 1.4 if sft else 0.6
    shares = (
        {}
        if still
        else {
            "output": Share(0.12 * factor * rng.uniform(0.8, 1.2), 0.12, 0.11),
            "input": Share(0.13 * factor * rng.uniform(0.8, 1.2), 0.12, 0.11),
            "both": Share(0.015 * factor * rng.uniform(0.8, 1.2), 0.0144, 0.013),
        }
    )
    bounds = {
        "weyl": Inequality(spectrum.largest, 0.4 * norm, 1e-15),
        "mirsky": Inequality(shift * total, norm, 1e-15),
        "ky_fan": Inequality(abs(sum(shifts[:6])), K * 0.4 * norm, 1e-15),
    }
    return {"spectrum": spectrum, **shares, "bounds": bounds}


def _angles(rng: random.Random, norm: float, sft: bool, still: bool) -> dict[str, object]:
    top = 0.0 if still else (0.25 if sft else 0.006) * rng.uniform(0.4, 1.3)
    output, input = ([top * side * ((i + 1) / K) ** 3 for i in range(K)] for side in (1.0, 0.8))
    gap = 0.0 if still else 0.4 * norm / top / rng.uniform(1.0, 4.5)
    paper = 0.4 * norm / gap if gap else math.inf
    always = math.sin(math.asin(2 * paper) / 2) if 2 * paper < 1 else 1.0
    bounds = Inequality(math.sin(top), paper, 1e-9, True), Inequality(math.sin(top), always, 1e-9)
    return {"angles": Angles(K, output, input, 1e-7, gap, *bounds)}


def _agreement(rng: random.Random, changes: list[Change], entries: int) -> Agreement:
    n = len(changes)
    rates = [change.changed / entries for change in changes]
    pairs = []
    for i in range(n):
        for j in range(i + 1, n):
            p, q = rates[i], rates[j]
            chance = p * q / (p + q - p * q) if p + q else 0.0
            pairs.append((i, j, chance * rng.uniform(1.2, 1.4), chance))
    weights = [rng.uniform(0.5, 2.0) for _ in range(n + 1)]
    frequencies = [int(entries * w / sum(weights)) for w in weights]
    frequencies[0] += entries - sum(frequencies)
    p = sum(rates) / n
    expected = [entries * math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = [sum(pair[at] for pair in pairs) / len(pairs) for at in (2, 3)]
    map = next((change.map for change in changes if change.map), None)
    return Agreement(mean[0], mean[1], pairs, frequencies, expected, map)
