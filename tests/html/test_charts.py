"""Charts draw points where the data are, and numbers are readable."""

import re

import pytest

from offprincipal_peft.html.charts import Bar, Frame, Scale, Series, forest, layer_place, limits, lines, number
from offprincipal_peft.html.images import data_uri, png
from offprincipal_peft.html.marks import Mark, bars, marks
from offprincipal_peft.html.tables import Table, aligned, bytes_text, count_text, plain


def test_scales_and_ticks() -> None:
    scale = Scale(0.0, 10.0, 50.0, 150.0)
    assert [scale(v) for v in (0.0, 5.0, 10.0)] == [50.0, 100.0, 150.0]
    assert Scale(1.0, 100.0, 0.0, 2.0, log=True)(10.0) == pytest.approx(1.0)
    for low, high in ((0.0, 1.0), (0.03, 0.47), (-3.0, 9.0), (1e-6, 3e-6), (5.0, 5000.0)):
        ticks = Scale(low, high, 0.0, 1.0).ticks()
        assert 3 <= len(ticks) <= 8 and all(low - 1e-9 <= t <= high + 1e-9 for t in ticks), (low, high, ticks)
    whole = Scale(1.0, 3.0, 0.0, 1.0, whole=True).ticks()
    assert whole == [1, 2, 3]
    assert Scale(3e-5, 2e-3, 0.0, 1.0, log=True).ticks() == pytest.approx([5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3])
    assert Scale(1e-9, 1e3, 0.0, 1.0, log=True).ticks(5)


def test_chart_points_lie_where_the_data_are() -> None:
    frame = Frame("t", "x", "y", limits=(0.0, 1.0, 0.0, 1.0))
    drawn = lines(frame, [Series("a", 0, [0.0, 1.0], [0.0, 1.0])])
    assert "M50.0 230.0L428.0 12.0" in drawn
    with pytest.raises(ValueError, match="no points"):
        lines(Frame("empty", "x", "y"), [])
    assert "<circle" in lines(Frame("t", "x", "y"), [Series("alone", 0, [1.0], [2.0])])
    assert "<script" not in forest("t", "x", [Bar("<script>", 0, 1.0)])


def test_names_and_numbers_are_readable() -> None:
    assert [number(v) for v in (0, 2e-4, -0.25, 123456.0, 0.1 + 0.2)] == ["0", "2e−4", "−0.25", "1.23e5", "0.3"]
    assert [number(v) for v in (9999.4, 9999.7, 12345.6, -2e4)] == ["9999", "10000", "12346", "−20000"]
    assert layer_place("base_model.model.model.layers.3.mlp.up_proj") == ("up_proj", 3)
    assert layer_place("transformer.h.11.attn.c_attn") == ("c_attn", 11) and layer_place("lm_head") is None
    assert [count_text(v) for v in (950, 4_884_480, 1.5e9)] == ["950", "4.88 M", "1.5 B"]
    assert [bytes_text(v) for v in (5.8e7, 1.45e9)] == ["58.0 MB", "1.45 GB"]
    assert plain("a|b *c* <d>\n# e") == "a\\|b \\*c\\* \\<d\\> \\# e"


def test_logarithmic_values_lie_evenly() -> None:
    frame = Frame("t", "x", "y", limits=(0.0, 2.0, 1.0, 100.0), log_y=True)
    drawn = lines(frame, [Series("a", 0, [0.0, 1.0, 2.0], [1.0, 10.0, 100.0])])
    assert "M50.0 230.0L239.0 121.0L428.0 12.0" in drawn
    low, high = limits(Frame("t", "x", "y", log_y=True), [Series("a", 0, [0.0], [1e-5]), Series("b", 0, [1.0], [1.0])])[
        2:
    ]
    assert 0 < low < 1e-5 and high > 1


def test_long_ticks_push_the_axis_away_from_its_label() -> None:
    def start(values: list[float]) -> float:
        found = re.search(
            r'class="axis" x1="([\d.]+)"', lines(Frame("t", "x", "y"), [Series("a", 0, [0.0, 1.0], values)])
        )
        assert found
        return float(found[1])

    assert start([0.0, 8.0]) == 50.0 and start([0.9812, 0.9837]) > 60.0


def test_shares_need_no_axis_beyond_one() -> None:
    frame = Frame("t", "x", "y", percent=True)
    assert limits(frame, [Series("a", 0, [0.0], [1.0])])[3] == 1.0
    assert limits(frame, [Series("a", 0, [0.0], [1.2])])[3] > 1.2


def test_points_without_a_line_and_the_tinted_ground() -> None:
    frame = Frame("t", "x", "y", shade=1.0, shade_label="empty", limits=(0.0, 2.0, 0.0, 1.0))
    drawn = lines(frame, [Series("a", 3, [0.0, 1.5], [0.2, 0.8], path=False, hollow=True)])
    assert 'class="line hollow c3 d0"' in drawn and "<path" not in drawn and drawn.count("<circle") == 2
    assert '<rect class="stripe" x="239.0" y="12.0" width="189.0" height="218.0"/>' in drawn and ">empty<" in drawn
    frame.limits = (0.0, 1.05, 0.0, 1.0)  # a sliver that no words fit into
    sliver = lines(frame, [Series("a", 0, [0.5], [0.5])])
    assert "stripe" in sliver and "empty" not in sliver
    frame.limits = (0.0, 0.9, 0.0, 1.0)
    assert "stripe" not in lines(frame, [Series("a", 0, [0.5], [0.5])])


def test_marks_lie_on_their_axis() -> None:
    rows = [("a", [Mark("it", 0.5), Mark("other", 1.0, 8, "hollow")]), ("b", [Mark("it", 0.25, 0, "tick")])]
    drawn = marks("t", "x", rows, percent=True)
    x = [float(v) for v in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    left = 16 + 7.8
    assert x == pytest.approx([left + (426 - left) * value / 1.06 for value in (0.5, 1.0)], abs=0.1)
    assert "a, it: 50 %" in drawn and "b, it: 25 %" in drawn and "hollow c8" in drawn
    with pytest.raises(ValueError, match="has no marks"):
        marks("t", "x", [("a", [])])


def test_bars_stand_on_zero() -> None:
    drawn = bars("t", "x", "y", [("0", 0.5, 0.25), ("1", 0.0, None)])
    heights = [float(v) for v in re.findall(r'height="([\d.]+)"><title>', drawn)]
    assert heights == pytest.approx([188 / 1.08, 0.0], abs=0.1)
    assert len(re.findall('class="mark c1"', drawn)) == 1
    with pytest.raises(ValueError, match="has no columns"):
        bars("t", "x", "y", [])


def test_pictures_refuse_what_is_no_grid() -> None:
    for cells, width, height, top in ((b"", 0, 0, 1), (b"ab", 1, 1, 9), (b"a", 1, 1, 0)):
        with pytest.raises(ValueError, match="cells and a top in"):
            png(cells, width, height, top)
    assert data_uri(png(b"abc", 3, 1)).startswith("data:image/png;base64,iVBOR")


def test_tables_carry_their_kind() -> None:
    table = Table("c", ["a", "b"], [["<x>", "1"]], kind="dense")
    assert '<table class="dense">' in table.html() and "&lt;x&gt;" in table.html()
    assert aligned(table, 20) == "a    b\n------\n<x>  1\n"


def test_axes_have_numbers_that_differ() -> None:
    """A range between two powers, ticks closer than four digits tell, and values far below 1e-12."""

    def ticks(frame: Frame, values: list[float]) -> list[str]:
        drawn = lines(frame, [Series("a", 0, [0.0, 1.0], values)])
        return re.findall(r'text-anchor="end">([^<]*)<', drawn)

    for values in ([2.7e-5, 2.9e-5], [0.27, 0.271]):
        found = ticks(Frame("t", "x", "y", log_y=True), values)
        assert len(found) >= 3 and len(set(found)) == len(found), found
    for low, high in ((0.99990, 0.99998), (0.5, 0.50000001), (1e-15, 4e-15)):
        found = ticks(Frame("t", "x", "y", percent=True), [low, high])
        assert len(found) >= 3 and len(set(found)) == len(found), found
    drawn = marks("t", "x", [("a", [Mark("it", 0.99990), Mark("it", 0.99998)])], percent=True, zero=False)
    found = re.findall(r'text-anchor="middle">([^<]*)<', drawn)[:-1]
    assert len(found) >= 3 and len(set(found)) == len(found), found
    assert [number(v) for v in Scale(1e-15, 4e-15, 0.0, 1.0).ticks(2)] == [f"{i}e−15" for i in (1, 2, 3, 4)]


def test_counts_next_to_a_unit_take_it() -> None:
    assert [count_text(v) for v in (999, 999_499, 999_700, 999_700_000)] == ["999", "999 k", "1 M", "1 B"]


def test_marks_of_several_charts_can_share_their_scale() -> None:
    one, two = (marks("t", "x", [("a", [Mark("it", value)])], reach=[2.0]) for value in (0.5, 1.0))
    places = [re.findall(r'<text x="([\d.]+)"[^>]*>([^<]*)<', drawn) for drawn in (one, two)]
    assert places[0] == places[1] and "2" in [text for _, text in places[0]]
