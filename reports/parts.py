"""Parts of a page: pictures, tables, sections, for phones, light and dark mode, and print; and tables as text."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

STYLE = """
:root { --back: #fff; --text: #222; --line: #d4d4d4; --faint: #666; --box: #f4f4f4 }
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --back: #16181c; --text: #ddd; --line: #44484f; --faint: #a5a8ad; --box: #20242a } }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 1.5em auto;
       max-width: 78em; padding: 0 1em; overflow-wrap: anywhere }
h1 { font-size: 1.5em } h2, summary { font-size: 1.15em; font-weight: bold; margin: 1.2em 0 .6em }
summary { cursor: pointer } figure, p { margin: 0 } figcaption, .faint { color: var(--faint); font-size: .9em }
.strip { display: flex; flex-wrap: wrap; gap: 1em 2em } .strip > section { flex: 1 1 15em; min-width: 0 }
.strip > section:nth-child(2) { flex: 2 1 22em } .strip h2 { margin: 0 0 .4em }
.cards, .row { display: grid; gap: 1em; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16em), 1fr)) }
.row { grid-template-columns: repeat(auto-fill, minmax(min(100%, 30em), 1fr)) }
.cards > div { background: var(--box); border-radius: .5em; padding: .8em 1em } .cards b { font-size: 1.6em }
.wide { overflow-x: auto } td img { width: 28em; max-width: 55vw }
td:has(> b) { min-width: min(13em, 38vw); max-width: min(20em, 38vw); overflow-wrap: anywhere }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top;
       border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; min-width: 4.5em; max-width: 40em }
img, svg { max-width: 100%; height: auto } svg text { font-family: system-ui, sans-serif !important }
@media print { body { font-size: 11px; max-width: none } .wide { overflow: visible } table { font-size: .8em }
  figure, .cards > div { break-inside: avoid } details::details-content { content-visibility: visible; height: auto } }
"""


class Markup(str):
    """A cell of a table that is not escaped."""


def images(captions: Mapping[Path, str]) -> str:
    """Pictures with captions, embedded in the page; missing files are left out. Small pictures are enlarged by a whole
    factor, up to the width of a phone."""

    def figure(path: Path, text: str) -> str:
        source = f'data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}'
        with Image.open(path) as image:
            width = image.width
        # 358 pixels: a phone of 390 without the margins of the page
        larger = f' style="width: {358 // width * width}px; image-rendering: pixelated"' if 2 * width <= 358 else ''
        return f'<figure><img src="{source}" alt="{text}"{larger}><figcaption>{text}</figcaption></figure>'

    return ''.join(figure(path, html.escape(caption)) for path, caption in captions.items() if path.exists())


def escaped(value: Any) -> str:
    return html.escape(text_of(value))


def table(rows: Sequence[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Rows of cells, escaped, in a scrolling box."""

    def line(cells: Sequence[Any], tag: str) -> str:
        texts = (cell if isinstance(cell, Markup) else escaped(cell) for cell in cells)
        return '<tr>' + ''.join(f'<{tag}>{text}</{tag}>' for text in texts) + '</tr>'

    lines = [line(head, 'th')] * bool(head) + [line(row, 'td') for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>' if lines else ''


def text_of(value: Any) -> str:
    if isinstance(value, float):
        return f'{value:.4g}'
    return ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else '' if value is None else str(value)


def aligned(rows: Sequence[Sequence[Any]]) -> str:
    """A table as plain text; the first row is its head."""
    text = [[text_of(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    return '\n'.join('  '.join(map(str.ljust, line, widths)).rstrip() for line in text)


def blocks(columns: Sequence[Sequence[Any]], width: int = 120) -> str:
    """Columns as text, each with its head: tables below each other, no wider than `width` where possible. Each table
    begins with the first column."""
    first, *rest = columns
    parts, text = [[first]], lambda part: aligned(list(zip(*part, strict=True)))
    for column in rest:
        if len(parts[-1]) > 1 and max(map(len, text([*parts[-1], column]).split('\n'))) > width:
            parts.append([first])
        parts[-1].append(column)
    return '\n\n'.join(map(text, parts))


def row(parts: Sequence[str], kind: str = 'row') -> str:
    return f'<div class="{kind}">{"".join(parts)}</div>' if any(parts) else ''


def html_page(title: str, sections: Mapping[str, str], folded: Mapping[str, str] | None = None) -> str:
    """The whole document: sections, then folded sections; empty ones are left out."""
    heads = {name: f'<h2>{html.escape(name)}</h2>' if name else '' for name in sections}
    body = ''.join(heads[name] + text for name, text in sections.items() if text)
    for name, text in (folded or {}).items():
        body += f'<details><summary>{html.escape(name)}</summary>{text}</details>' if text else ''
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{html.escape(title)}</title><style>{STYLE}</style></head>'
        f'<body><h1>{html.escape(title)}</h1>{body}</body></html>\n'
    )
