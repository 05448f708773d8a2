"""The style of report pages and of plots; colours are those of the search page, with the same contrast."""

from __future__ import annotations

import re

_LIGHT = (
    "--bg:#f7f7f5;--card:#fff;--text:#1d1f23;--soft:#5c626c;--line:#d5d7db;--edge:#858b95;--accent:#1b5fc1;"
    "--up:#17693a;--down:#a8261c;--c1:#1b5fc1;--c2:#b4560b;--c3:#6b4fbb;--c4:#0f7f8c;--c5:#17693a;--c6:#a8261c"
)
_DARK = (
    "--bg:#15171a;--card:#1e2125;--text:#e7e8ea;--soft:#a3aab4;--line:#33373d;--edge:#767d88;--accent:#7fb0ff;"
    "--up:#7fd6a0;--down:#ffb4ab;--c1:#7fb0ff;--c2:#f0a868;--c3:#b39df1;--c4:#5fc8d4;--c5:#7fd6a0;--c6:#ffb4ab"
)
_FONTS = (
    'system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","PingFang SC","Hiragino Sans GB","Microsoft YaHei",'
    '"Noto Sans CJK SC","Source Han Sans SC","WenQuanYi Micro Hei",sans-serif'
)
# By name, since a renderer without a browser knows no `system-ui`, and writes nothing where it knows none of a list.
_NAMED_FONTS = (
    "'Noto Sans','DejaVu Sans','Liberation Sans',Arial,Helvetica,'Segoe UI',Roboto,'Noto Sans CJK SC','PingFang SC',"
    "'Microsoft YaHei','WenQuanYi Micro Hei',sans-serif"
)
_COLOURS = f":root{{color-scheme:light dark;{_LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
_SHAPES = (
    f".plot text{{font:12px {_FONTS};fill:var(--text)}}"
    ".plot .tick,.plot .name{fill:var(--soft);font-size:11px}.plot .count{font-size:10px}"
    ".plot .grid{stroke:var(--line);stroke-width:.75}.plot .axis{stroke:var(--edge)}"
    ".plot .guide{stroke:var(--edge);stroke-dasharray:4 4}.plot .line{fill:none;stroke-width:2;stroke-linejoin:round}"
    ".plot .band{fill-opacity:.16}.plot .bar{stroke-width:3;stroke-linecap:round;stroke-opacity:.45}"
    ".plot .empty{fill:var(--line);fill-opacity:.35}.plot .dot{stroke:var(--card);stroke-width:1}"
    + "".join(
        f".plot .line.c{n},.plot .bar.c{n}{{stroke:var(--c{n})}}"
        f".plot .band.c{n},.plot .dot.c{n},.plot .cell.c{n}{{fill:var(--c{n})}}"
        for n in range(1, 7)
    )
)
PLOT_STYLE = f"{_COLOURS}{_SHAPES}.ground{{fill:var(--card)}}"
"""Of a plot in a file of its own."""
_BY_NAME = dict(rule.removeprefix("--").split(":") for rule in _LIGHT.split(";"))
FLAT_PLOT_STYLE = re.sub(
    r"var\(--(\w+)\)",
    lambda found: _BY_NAME[found[1]],
    f"{_SHAPES}.ground{{fill:var(--card)}}".replace(
        f"font:12px {_FONTS}", f"font-size:12px;font-family:{_NAMED_FONTS}"
    ),
)
"""The same, light, for renderers that know no variables."""
STYLE = (
    f"{_COLOURS}{_SHAPES}*{{box-sizing:border-box}}"
    f"body{{margin:0;background:var(--bg);color:var(--text);font:16px/1.6 {_FONTS}}}"
    "main{max-width:66rem;margin:0 auto;padding:2rem 1.25rem 4rem}"
    "h1{font-size:1.6rem;font-weight:650;letter-spacing:-.01em;margin:0;overflow-wrap:anywhere}"
    "h2{font-size:1.1rem;margin:2.5rem 0 .75rem}h3{font-size:.95rem;margin:0 0 .5rem}p{margin:.25rem 0}"
    ".interval{font-weight:400}.lede,.note,.interval,figcaption{color:var(--soft)}.lede{overflow-wrap:anywhere}"
    ".note,figcaption,.interval{font-size:.85rem}"
    ".cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin:1.5rem 0 0;"
    "padding:0}.cards div{background:var(--card);border:1px solid var(--line);border-radius:.6rem;"
    "padding:.7rem .9rem}.cards dt{color:var(--soft);font-size:.85rem}"
    ".cards dd{margin:0;font-variant-numeric:tabular-nums}.cards .value{font-size:1.55rem;font-weight:650;"
    "line-height:1.3}"
    ".plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem;"
    "align-items:start}"
    "figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.9rem 1rem;"
    "min-width:0}.plot{display:block;width:100%;height:auto}"
    ".scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:.6rem;"
    "padding:.25rem .5rem;margin:.5rem 0}"
    "table{border-collapse:collapse;width:100%;font-size:.9rem}"
    "th,td{padding:.4rem .6rem;text-align:left;vertical-align:top;border-top:1px solid var(--line);"
    "overflow-wrap:break-word;min-width:3.5rem}tr:first-child>th,tr:first-child>td{border-top:0}"
    "th{font-weight:600}thead th{color:var(--soft);font-weight:500}"
    ".text{min-width:12rem;overflow-wrap:anywhere}.id{overflow-wrap:anywhere;min-width:6rem}"
    ".number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}"
    '.found{font-weight:600}.found>.id::before{content:"✓ ";color:var(--up)}'
    ".up{color:var(--up)}.down{color:var(--down)}"
    "details{border-top:1px solid var(--line);padding:.55rem 0}figure details{border:0;padding:.3rem 0 0}"
    "figure summary{color:var(--soft);font-size:.85rem}summary{cursor:pointer;overflow-wrap:anywhere}"
    "ul{margin:.25rem 0;padding-left:1.25rem;overflow-wrap:anywhere}"
    ":focus-visible{outline:2px solid var(--accent);outline-offset:2px;border-radius:.25rem}"
    "@media(max-width:30rem){main{padding:1.25rem .75rem 3rem}figure{padding:.75rem .5rem}.plot text{font-size:14px}"
    ".plot .tick,.plot .name{font-size:13px}}"
    "@media print{body{background:#fff}figure,details{break-inside:avoid}}"
)
"""Of a page."""
