"""The page around a report's parts: its CSS, for light and dark, wide and narrow, screen and paper."""

from __future__ import annotations

from collections.abc import Sequence

from .charts import escape, style

_LIGHT = ("#2563eb", "#c2410c", "#15803d", "#9333ea", "#0e7490", "#dc2626", "#8a6100", "#db2777", "#52525b", "#4338ca")
_DARK = ("#7aa7ff", "#ff9552", "#5fd38a", "#c99bff", "#4fd0e7", "#ff7b7b", "#e2b84a", "#ff8cc3", "#b4b4bd", "#a5a0ff")

_CSS = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1c1e22;--soft:#5b6270;--rule:#e3e6eb;--tint:#f5f7fa;--cell:#eef0f3;
--hot:#d9480f;--cold:#1864ab;--accent:#7048e8}
@media(prefers-color-scheme:dark){:root{--bg:#14161a;--ink:#e8eaee;--soft:#9aa3b2;--rule:#2c3038;--tint:#1c1f25;
--cell:#22262d;--hot:#ff922b;--cold:#4dabf7;--accent:#b197fc}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:28px 20px 64px;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .2em;letter-spacing:-.01em}
h2{font-size:1.25rem;margin:2.4em 0 .5em;line-height:1.3}
header+h2{margin-top:1.6em}
h3{font-size:1.05rem;margin:2.2em 0 .6em}
.lead{color:var(--soft);margin:0}
.facts{display:flex;flex-wrap:wrap;gap:10px;margin:18px 0 0;padding:0;list-style:none}
.facts li{background:var(--tint);border-radius:8px;padding:8px 14px;min-width:92px}
.facts b{display:block;font-size:1.25rem;line-height:1.25;font-variant-numeric:tabular-nums}
.facts span{font-size:.8rem;color:var(--soft)}
.findings{padding-left:1.2em;margin:.4em 0;max-width:78ch}
.findings li{margin:.35em 0}
.cautions{border-left:3px solid var(--hot);background:var(--tint);border-radius:0 8px 8px 0;
margin:14px 0;padding:10px 16px}
.cautions p{margin:0;font-weight:600}
.cautions ul{margin:.2em 0 0;padding-left:1.2em;font-size:.93rem;max-width:82ch}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:8px 36px}
.pair>*{min-width:0;max-width:560px}
figure{margin:18px 0;min-width:0;max-width:760px}
figure.wide{max-width:none}
figure.one{max-width:560px}
figcaption{font-size:.88rem;color:var(--soft);margin:0 0 8px;line-height:1.4}
figcaption b{color:var(--ink)}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
svg .name{fill:var(--ink)}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .axis,svg .tick{stroke:var(--soft);stroke-width:1}
svg .base{stroke:var(--soft);stroke-width:1.3;stroke-dasharray:4 4}
svg .stripe{fill:var(--tint)}
svg .band{fill:var(--c);fill-opacity:.13}
svg .line path{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .line circle{fill:var(--c)}
svg .line circle.ring{fill:none;stroke:var(--c);stroke-width:1.6}
svg .faint path{stroke:var(--soft);stroke-opacity:.25;stroke-width:1;stroke-dasharray:none}
svg .faint circle{fill:none}
svg .line.pale path{stroke-width:1;stroke-opacity:.45}
svg .pale circle{fill-opacity:.55}
svg .bar{fill:var(--c);fill-opacity:.75}
svg image{image-rendering:pixelated}
svg .head{stroke:var(--soft);stroke-width:.6;stroke-opacity:.75}
svg .frame{fill:none;stroke:var(--rule);stroke-width:1}
svg .profile{fill:none;stroke:var(--accent);stroke-width:1.2;stroke-linejoin:round}
svg .mark path{stroke:var(--c);stroke-width:2;fill:none}
svg .mark circle{fill:var(--c)}
svg .hollow circle{fill:none;stroke:var(--c);stroke-width:1.5}
svg .cell{fill:var(--cell)}
svg .hot{fill:var(--hot)} svg .cold{fill:var(--cold)} svg .accent{fill:var(--accent)}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;margin:6px 0 0;padding:0;font-size:.85rem}
.legend li{display:flex;align-items:center}
.swatch{display:inline-block;width:14px;height:0;border-top:4px solid var(--c);border-radius:2px;margin-right:7px;
vertical-align:middle;flex:none}
tbody th>span{display:flex;align-items:baseline}
tbody th .swatch{align-self:flex-start;margin-top:.6em}
.key{font-size:.8rem;color:var(--soft);margin:0 0 10px;display:flex;align-items:center;gap:8px}
.key i{display:inline-block;width:160px;height:10px;border-radius:3px}
.key .shares{background:linear-gradient(to right,var(--cold),var(--cell),var(--hot))}
.key .sizes{background:linear-gradient(to right,var(--cell),var(--accent))}
.swatch.d1{border-top:3px dashed var(--c);width:22px;border-radius:0}.swatch.d2{border-top-style:dotted;border-radius:0}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,210px),1fr));gap:14px 22px}
.maps{grid-template-columns:repeat(auto-fill,minmax(min(100%,290px),1fr))}
.panels>div{min-width:0;max-width:380px}
.panel{margin:0 0 2px;font-size:.85rem;font-weight:600;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
table{position:relative}
.scroll{overflow-x:auto;margin:0 0 4px;border-radius:6px}
table{overflow-wrap:normal;border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;width:100%}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.caption{font-weight:600;font-size:.95rem;margin:24px 0 6px}
th,td{padding:6px 10px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
thead th{color:var(--soft);font-weight:500;font-size:.78rem;line-height:1.3;white-space:normal;vertical-align:bottom;
min-width:64px}
th:first-child{text-align:left;position:sticky;left:0;background:var(--bg)}
tbody th{font-weight:600}
tbody th.long{min-width:130px;max-width:230px;white-space:normal}
tbody th.long span{min-width:0;overflow-wrap:anywhere}
table.dense{font-size:.78rem}
table.dense th,table.dense td{padding:6px 4px}
table.dense thead th{min-width:44px}
tbody tr:hover>*{background:var(--tint)}
table.text th{text-align:left}
table.text td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.small{font-size:.82rem;color:var(--soft);max-width:92ch;margin:6px 0 0;line-height:1.45}
details{margin:22px 0;border:1px solid var(--rule);border-radius:8px;padding:10px 16px}
summary{cursor:pointer;font-weight:600}
pre{font-size:.78rem;white-space:pre-wrap;overflow-wrap:anywhere;margin:.6em 0}
nav{font-size:.9rem;margin-top:14px}
a{color:inherit}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
@media(max-width:560px){main{padding:18px 14px 48px}h1{font-size:1.4rem}tbody th.long{max-width:130px}
svg.big text{font-size:13.5px}.panels:not(.maps){grid-template-columns:1fr 1fr;gap:10px 12px}
.panels:not(.maps) svg text{font-size:13px}}
@media print{main{max-width:none}figure,.panels>div{break-inside:avoid}.scroll{overflow:visible}}
"""


def _colours(values: tuple[str, ...]) -> str:
    return "".join(f".c{i}{{--c:{value}}}" for i, value in enumerate(values))


def page(title: str, body: str) -> str:
    """A whole document. Its policy lets a browser load nothing, so that the page stays self-contained by force."""
    css = (
        _CSS
        + _colours(_LIGHT)
        + f"@media(prefers-color-scheme:dark){{{_colours(_DARK)}}}"
        + "svg .line.d1 path{stroke-dasharray:6 4}svg .line.d2 path{stroke-dasharray:1.5 4}"
        + "svg .line.faint path{stroke-dasharray:none}"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{css}</style></head>\n'
        f"<body><main>{body}</main></body></html>\n"
    )


def figure_html(title: str, text: str, body: str, kind: str = "") -> str:
    """A titled figure with its explanation."""
    return (
        f'<figure class="{kind}"><figcaption><b>{escape(title)}</b> {escape(text)}</figcaption>{body}</figure>'
        if body
        else ""
    )


def legend(items: Sequence[tuple[str, int]]) -> str:
    """Names beside their colours."""
    found = "".join(f'<li><i class="swatch {style(colour)}"></i>{escape(name)}</li>' for name, colour in items)
    return f'<ul class="legend">{found}</ul>'
