"""The page shows every number that the report has, stands alone, and copes with what a report may lack."""

import base64
import dataclasses
import math
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from audit.reports import KINDS, PROBES, report
from offprincipal_peft.audit.figures import views
from offprincipal_peft.audit.page import page_of, write_page
from offprincipal_peft.audit.pooling import by_kind, total
from offprincipal_peft.audit.results import AuditReport, Change, Inequality, Map, WeightAudit
from offprincipal_peft.audit.tables import share_text
from pages import Page

FIVE = ("rl", "rl-b", "sft", "d", "e")


def changed(made: AuditReport, edit: Callable[[Change], Change]) -> AuditReport:
    """``made`` with every change replaced by what ``edit`` makes of it."""
    weights = [dataclasses.replace(w, changes=[edit(change) for change in w.changes]) for w in made.weights]
    return dataclasses.replace(made, weights=weights)


def broken_numbers(change: Change) -> Change:
    """What a checkpoint with NaN entries gives."""
    spectrum = change.spectrum and dataclasses.replace(change.spectrum, shift=math.nan, shifts=[math.nan] * 3)
    weyl = Inequality(math.nan, math.inf)
    return dataclasses.replace(
        change, norm=math.nan, largest=math.inf, nonfinite=(0, 3), spectrum=spectrum, bounds={"weyl": weyl}
    )


CASES = {
    "one": report(),
    "five": report(3, FIVE),
    "one layer": report(1, outside=False),
    "one kind": report(3, kinds=("q_proj",), outside=False),
    "deep": report(80, ("rl", "sft"), kinds=("q_proj", "down_proj")),
    "still": report(2, still=True),
    "two, still": report(2, ("a", "b"), still=True),
    "counts only": report(2, probes=("bf16",)),
    "spectra only": report(2, probes=("bf16", "spectrum", "angles")),
    "masks only": report(2, probes=("bf16", "masks")),
    "outside alone": report(0),
    "not a number": changed(report(2), broken_numbers),
    "nothing": dataclasses.replace(report(1), weights=[], skipped=[]),
    "no checkpoint": dataclasses.replace(report(0, outside=False), sources=[], verdicts=[]),
    "same names": report(1, ("rl", "rl")),
    "long names": report(1, ("a-checkpoint-with-a-long-name-and-no-space-anywhere-in-it/step-001000", "b" * 80)),
    "hostile": report(1, ('<script>alert(1)</script>" onload="x',)),
}


@pytest.mark.parametrize("case", CASES)
def test_pages_are_whole_and_stand_alone(case: str) -> None:
    text = page_of(CASES[case])
    page = Page(text)
    assert page.outside == [] and not {"script", "iframe", "object", "form"} & set(page.tags)
    assert "default-src 'none'" in text
    assert set(re.findall(r"https?://", text)) == set()
    assert page.tags.count("h1") == 1 and page.tags.count("caption") == page.tags.count("table")
    assert all(len({len(row) for row in table}) == 1 for table in page.tables)
    assert not re.search(r"\b(nan|None|inf)\b", page.text), re.findall(r".{30}\b(?:nan|None|inf)\b", page.text)[:3]
    assert not re.search(r'(?:[ "MLhv])(?:nan|inf)[ "LMZ]', text)  # in an attribute of a drawing


@pytest.mark.parametrize("case", ["one", "five", "counts only", "still", "outside alone", "not a number"])
def test_every_weight_stands_in_the_table_of_every_checkpoint(case: str) -> None:
    made = CASES[case]
    tables = [table for table in Page(page_of(made)).tables if table[0][0] == "weight"]
    assert len(tables) == len(made.sources) - 1
    for i, table in enumerate(tables):
        assert [row[0] for row in table[1:]] == [weight.name for weight in made.weights]
        at = table[0].index("unchanged in bf16, %")
        for row, weight in zip(table[1:], made.weights, strict=True):
            assert row[at] == share_text(1 - weight.changes[i].changed / weight.entries)


def test_the_numbers_are_those_of_the_report() -> None:
    made = report(3)
    page = Page(page_of(made))
    for sentence in made.verdicts[0].sentences:
        assert sentence in page.text
    row = total(made, 0)
    assert row.sparsity is not None and row.matched is not None and row.matched.ratio is not None
    assert f"{100 * row.sparsity:.1f} %unchanged in bf16" in page.text
    assert f"{row.matched.ratio:.2f} ×changed on / off M_princ, at equal size" in page.text
    assert made.error in page.text
    table = next(t for t in page.tables if t[0][0] == "kind")
    assert [cells[0] for cells in table[1:]] == [*KINDS, "embed_tokens", "norm", "all"]
    for cells, pooled in zip(table[1:], by_kind(made, 0), strict=False):
        assert cells[3] == f"{100 * (pooled.sparsity or 0):.1f}"
        if pooled.principal is not None:
            assert cells[8] == f"{100 * pooled.principal.value:.1f} (30.0)"
    layer = next(t for t in page.tables if t[0][0] == "layer")
    assert [cells[0] for cells in layer[1:]] == ["layer 0", "layer 1", "layer 2", "outside"]
    skipped = next(t for t in page.tables if t[0][0] == "reason")
    assert ["missing in tuned", "3", ", ".join(f"model.layers.{i}.rotary.inv_freq" for i in range(3))] in skipped


def test_what_was_asked_for_and_of_what() -> None:
    made = report(1, FIVE)
    tables = {table[0][0]: table for table in Page(page_of(made)).tables}
    settings = dict(tables["setting"][1:])
    assert settings["probes"] == ", ".join(PROBES) and settings["mode"] == "fast" and settings["rank"] == "0.125"
    paths = [row[1] for row in tables["checkpoint"][1:]]
    assert paths == [source.path for source in made.sources]


def figures(text: str) -> list[str]:
    return re.findall(r"<figcaption><b>(.*?)</b>", text)


def test_a_whole_report_has_all_figures_and_an_empty_one_none() -> None:
    names = figures(page_of(report(4, ("a", "b"))))
    assert names == [
        "Update sparsity.",
        "By magnitude.",
        "Which entries changed.",
        "Controlled for magnitude.",
        "Principal angles, U.",
        "Principal angles, V.",
        "Largest angle and its bound.",
        "Spectral shift.",
        "Shifts of singular values.",
        "Energy in the principal subspaces.",
        "Energy by layer.",
        "Where entries changed.",
        "Stripes.",
        "Agreement by layer.",
        "Agreement by kind.",
        "How many changed an entry.",
        "Consensus.",
    ]
    assert figures(page_of(CASES["counts only"])) == ["Update sparsity."]
    assert figures(page_of(CASES["nothing"])) == []
    still = page_of(CASES["still"])
    assert "No principal subspace turned at all" in still and "Where entries changed" not in still


def test_charts_of_several_checkpoints_share_their_scale() -> None:
    text = page_of(report(4, ("rl", "sft")))
    figure = next(f for f in re.findall(r"<figure.*?</figure>", text, re.DOTALL) if "<b>Spectral shift.</b>" in f)
    charts = re.findall(r"<svg.*?</svg>", figure, re.DOTALL)
    assert len(charts) == 2
    ticks = [re.findall(r'text-anchor="end">([^<]*)<', chart) for chart in charts]
    assert ticks[0] == ticks[1] != []


def test_a_kind_keeps_its_colour() -> None:
    made = report(4, ("rl", "sft"))
    text = page_of(made)
    colours = views(made)[0].colours
    assert list(colours) == list(KINDS)
    for kind, colour in colours.items():
        found = re.findall(rf'class="line (c\d d\d)"><title>{kind}</title>', text)
        assert len(found) == 4 and set(found) == {f"c{colour} d0"}  # sparsity and NSS, twice


def one_bound(paper: Inequality, always: Inequality) -> AuditReport:
    def edit(change: Change) -> Change:
        angles = change.angles and dataclasses.replace(change.angles, wedin=paper, wedin_always=always)
        return dataclasses.replace(change, angles=angles)

    return changed(report(1, kinds=("q_proj",), outside=False), edit)


@pytest.mark.parametrize(
    ("right", "holds", "drawn"),
    [
        (0.4, "yes", False),
        (0.2, "no", False),
        (3.0, "yes (says nothing for 1 of 1)", True),
        (math.inf, "yes (says", True),
    ],
)
def test_bounds_that_break_or_say_nothing_are_shown_so(right: float, holds: str, drawn: bool) -> None:
    text = page_of(one_bound(Inequality(0.3, right, 1e-9, True), Inequality(0.3, 0.31)))
    table = next(t for t in Page(text).tables if t[0][0] == "inequality")
    row = next(row for row in table if row[0].startswith("Wedin, the paper's"))
    assert row[table[0].index("holds")].startswith(holds)
    assert row[table[0].index("broken by")] == f"{int(right < 0.3)} of 1"
    assert ("says nothing</text>" in text) == drawn


def test_a_broken_inequality_is_the_worst_case_of_its_kind() -> None:
    made = report(3, kinds=("q_proj",), outside=False)
    # Large and nearly tight; broken by little; beyond its right side by no more than rounding.
    bounds = [Inequality(5.0, 5.1), Inequality(0.0102, 0.01, 1e-5), Inequality(1.05, 1.0, 0.1)]
    for i, (weight, bound) in enumerate(zip(made.weights, bounds, strict=True)):
        change = dataclasses.replace(weight.changes[0], bounds={"weyl": bound})
        made.weights[i] = dataclasses.replace(weight, changes=[change])
    for table in (t for t in Page(page_of(made)).tables if t[0][0].startswith("inequality")):
        row = next(row for row in table if row[0].startswith("Weyl"))
        assert row[1:] == ["0.0102", "0.01", "−2e−4", "102 %", "no", "1 of 3", "model.layers.1.self_attn.q_proj.weight"]


def pixels(uri: str) -> list[list[int]]:
    """The palette indices of a PNG with four bits a cell, each chunk's checksum checked."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(name + body)
        chunks[name] = body
        at += 12 + length
    width, height, depth, kind = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, kind) == (4, 3) and len(chunks[b"PLTE"]) == 48 and list(chunks[b"tRNS"]) == list(range(0, 256, 17))
    rows, stride = zlib.decompress(chunks[b"IDAT"]), 1 + (width + 1) // 2
    found = []
    for y in range(height):
        row = rows[y * stride : (y + 1) * stride]
        assert row[0] == 0
        found.append([nibble for byte in row[1:] for nibble in (byte >> 4, byte & 15)][:width])
    assert len(rows) == stride * height
    return found


def with_map(density: torch.Tensor, rows: list[int], columns: list[int], shape: tuple[int, int]) -> AuditReport:
    made = report(1, kinds=("q_proj",), outside=False)
    weight: WeightAudit = made.weights[0]
    change = dataclasses.replace(weight.changes[0], map=Map(density, rows, columns))
    return dataclasses.replace(made, weights=[dataclasses.replace(weight, shape=shape, changes=[change])])


def test_maps_show_the_densities_and_the_heads() -> None:
    density = torch.tensor([[0, 51, 102], [153, 204, 204]], dtype=torch.uint8)
    text = page_of(with_map(density, [0, 8, 16], [0, 8, 16, 24], (16, 24)))
    (uri,) = re.findall(r'<image[^>]* href="([^"]*)"', text)
    assert pixels(uri) == [[0, 4, 8], [11, 15, 15]]
    assert "full colour: 80.0 %" in text
    one, two = re.findall(r'<path class="head" d="([^"]*)"', text)
    # 200 units wide, 133.3 high; boundaries inside only
    assert one == "M1 67.7h200.0" and two == "M67.7 1v133.3M134.3 1v133.3"
    assert text.count('class="profile"') == 2


def test_too_many_heads_are_not_drawn_over_the_map() -> None:
    density = torch.full((4, 4), 9, dtype=torch.uint8)
    assert 'class="head"' not in page_of(with_map(density, list(range(0, 201)), [], (200, 200)))


def test_pages_of_large_models_stay_small() -> None:
    size = len(page_of(report(80, FIVE)))
    assert size < 4e6, size  # 2.1e6


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "audit.html"
    write_page(report(1), path)
    assert path.read_text(encoding="utf-8") == page_of(report(1)) and len(list(path.parent.iterdir())) == 1
