"""The pieces of the report's HTML page: tables, figures, legends, and the document around them.

All text comes from files, captions and folder names: it is escaped, and stands in <bdi>, so that text written from right to
left does not turn its surroundings. The page refers to no other file.
"""

import base64
import html
import io
from pathlib import Path

from PIL import Image

from trainer.evaluation.plots import style, with_curves
from trainer.evaluation.results import Results
from trainer.evaluation.table import COLUMNS, Group, Row, Table, cell, used_columns

WIDEST = 1200  # pixels that a picture is shrunk to
TALLEST = 2400
SMALL = 400  # pictures up to this width are shown enlarged, with their pixels
PLAIN_BYTES = 400_000  # a PNG file up to this size is embedded as it is, if it need not be shrunk
LOWER, HIGHER = "\N{DOWNWARDS ARROW}", "\N{UPWARDS ARROW}"
BETTER = dict.fromkeys(("fid", "patch_fid", "kid", "pixel_fd", "fd_dinov2", "cmmd"), LOWER) | dict.fromkeys(
    "precision recall clip_score pick_score hps_v2_1 class_accuracy colour_accuracy heldout_class_accuracy "
    "heldout_colour_accuracy".split(),
    HIGHER,
)
STYLE = """
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1160px; margin: 1.5em auto; padding: 0 16px; color: #1a1a1a;
  background: #fff; overflow-wrap: anywhere }
h1 { font-size: 1.5em } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ccc } h3 { font-size: 1.05em }
.scroll { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; overflow-wrap: normal }
td, th { padding: .3em .5em; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top }
th { vertical-align: bottom; font-weight: 600 } small { font-size: 14px; color: #444; white-space: nowrap }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: #fff;
  min-width: 7.5em; max-width: 11em; overflow-wrap: break-word }
.published td { color: #771155 } .published td:first-child { font-style: italic }
td.images { min-width: 240px; text-align: left }
.row { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start }
figure { margin: 0; max-width: 100% } figcaption { font-size: 14px; color: #333 }
img { max-width: 100%; height: auto; display: block }
.plot img { width: 350px } .grid { width: 350px } .wide { width: 560px } .grid img, .wide img { width: 100% }
.pixels img, img.pixels { image-rendering: pixelated }
.prompt { width: 365px; border: 1px solid #ddd; padding: 8px } .prompt .row { gap: 6px } .prompt .row figure { width: calc((100% - 12px) / 3) } .prompt .row img { width: 100% }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 15px; margin: .5em 0 } .legend svg { vertical-align: middle }
.warning { border: 2px solid #b45309; background: #fff7e6; padding: .5em .8em; margin: .8em 0 } .warning ul { margin: 0 }
pre { background: #f6f6f6; padding: .8em; font-size: 14px; white-space: pre-wrap }
@page { size: A4 landscape; margin: 12mm }
@media print {
  body { max-width: none; margin: 0; padding: 0; font-size: 10.5pt }
  .scroll { overflow: visible } td:first-child, th:first-child { position: static; min-width: 0 }
  table { font-size: 7.5pt } small { font-size: 7pt } td, th { padding: .2em .25em }
  figure, tr, .warning, .prompt { break-inside: avoid } h2, h3, .legend { break-after: avoid } thead { display: table-header-group }
  td.images { min-width: 0 } .plot img { width: 300px }
  pre { background: none; border: 1px solid #ccc }
}
"""


def escaped(text: object) -> str:
    """Text that no markup and no direction of writing gets out of."""
    return f"<bdi>{html.escape(str(text))}</bdi>"


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(image: Image.Image) -> str:
    """PNG where that is small, as of drawings and tiny images, else JPEG."""
    file = io.BytesIO()
    if image.width <= SMALL:
        image.save(file, "png", optimize=True)
        if file.tell() <= PLAIN_BYTES // 4:
            return _data(file.getvalue(), "png")
    file = io.BytesIO()
    image.save(file, "jpeg", quality=88)
    return _data(file.getvalue(), "jpeg")


def plot(png: bytes | None) -> str:
    """A figure of curves."""
    return f'<figure class="plot"><img alt="" src="{_data(png, "png")}"></figure>' if png else ""


def picture(file: Path, text: str) -> str:
    """A figure of an image file, shrunk if it is large, with its caption; a note instead if the file cannot be read."""
    try:
        with Image.open(file) as image:
            width, fits = image.width, image.width <= WIDEST and image.height <= TALLEST
            if fits and file.stat().st_size <= PLAIN_BYTES:
                image.load()
                source = _data(file.read_bytes(), "png")
            else:
                image = image.convert("RGB")
                image.thumbnail((WIDEST, TALLEST), Image.Resampling.LANCZOS)
                source = _encoded(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, of a damaged PNG file
        return (
            f"<figure><figcaption>{escaped(text)}: {escaped(f'{file} cannot be read ({error})')}</figcaption></figure>"
        )
    kind = "grid pixels" if width <= SMALL else "wide"
    alt = html.escape(text)
    return f'<figure class="{kind}"><img alt="{alt}" src="{source}"><figcaption>{escaped(text)}</figcaption></figure>'


def prompt_cards(sources: list[tuple[Results, str, str]]) -> list[str]:
    """One figure per prompt: what each source, (run, what was evaluated, label), made of it, and the prompt as caption. The
    prompts are those of the last source that has any; sources of other prompts are left out."""
    found = [(label, made) for run, what, label in sources if (made := run.prompt_images(what))]
    if not found:
        return []
    prompts, columns = found[-1][1][1]["prompts"], {}
    for label, (file, settings) in found:
        if settings["prompts"] == prompts:
            try:
                with Image.open(file) as image:
                    columns[label] = _split(image.convert("RGB"), len(prompts))
            except (OSError, SyntaxError, Image.DecompressionBombError):
                continue  # without it the others still compare
    cards = []
    for number, prompt in enumerate(prompts):
        shown = "".join(
            f'<figure{" class=pixels" if pieces[number][1] else ""}><img alt="" src="{pieces[number][0]}">'
            f"<figcaption>{escaped(label)}</figcaption></figure>"
            for label, pieces in columns.items()
        )
        cards.append(
            f'<figure class="prompt"><div class="row">{shown}</div><figcaption><b>{escaped(prompt)}</b></figcaption></figure>'
        )
    return cards if columns else []


def _split(image: Image.Image, count: int) -> list[tuple[str, bool]]:
    """The images of a row, each with whether it is so small that its pixels shall show."""
    side, pieces = image.width // count, []
    for number in range(count):
        piece = image.crop((number * side, 0, (number + 1) * side, image.height))
        piece.thumbnail((336, 336), Image.Resampling.LANCZOS)  # three device pixels per pixel of the page
        pieces.append((_encoded(piece), side <= 112))
    return pieces


def section(title: str, *parts: str, note: str = "") -> str:
    """A heading, a note and the parts in a row; nothing without parts."""
    shown = "".join(part for part in parts if part)
    if not shown:
        return ""
    note = f"<p>{escaped(note)}</p>" if note else ""
    return f'<h2>{escaped(title)}</h2>{note}<div class="row">{shown}</div>'


def score_table(table: Table) -> str:
    """The table of a protocol, with the published numbers, and its warnings."""
    rows = [*table.rows, *table.published]
    names, seeds = used_columns(rows), any((row.seeds or 0) > 1 for row in rows)
    heads = ["", *(["seeds"] if seeds else []), *(f"{COLUMNS[n][0]} {BETTER.get(n, '')}" for n in names)]
    head = "".join(f"<th>{html.escape(text).replace('/', '/<wbr>')}</th>" for text in heads)
    lines = [_score_line(row, names, seeds) for row in rows]
    warnings = "".join(f"<li>{escaped(text)}</li>" for text in table.warnings)
    warnings = f'<div class="warning"><b>Warnings</b><ul>{warnings}</ul></div>' if warnings else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{"".join(lines)}</table></div>{warnings}'


def _score_line(row: Row, names: list[str], seeds: bool) -> str:
    values = [cell(row, name, "<br><small>&plusmn; ") + ("</small>" if name in row.std else "") for name in names]
    values = [str(row.seeds or "-"), *values] if seeds else values
    label = escaped(row.label) + (" (published)" if row.published else "")
    kind = ' class="published"' if row.published else ""
    return f"<tr{kind}><td>{label}</td>{''.join(f'<td>{value}</td>' for value in values)}</tr>"


def legend(groups: list[Group], table: Table | None = None) -> str:
    """What the lines of the curves are: the groups, and with a table also its teacher, start and published numbers."""
    shown = with_curves(groups, table.protocol) if table else groups
    entries = [(style(groups, group)[0], "", _seeds(group)) for group in shown]
    if table:
        labels = [row.label for row in table.rows]
        if with_curves(groups, table.protocol, raw=True):
            entries.append(("#1a1a1a", "6 4", "dashed: raw weights; solid: averaged (EMA)"))
        entries += [("#1a1a1a", "2 3", "teacher")] if "teacher" in labels else []
        entries += [("#aa3377", "", "published")] if table.published else []
        entries += [("", "", "start")] if "start" in labels else []
    return f'<div class="legend">{"".join(_legend_entry(*entry) for entry in entries)}</div>'


def _seeds(group: Group) -> str:
    return f"{group.label}, mean and deviation of {len(group.runs)} seeds" if len(group.runs) > 1 else group.label


def _legend_entry(colour: str, dashes: str, text: str) -> str:
    shape = f'<line x1="0" y1="6" x2="30" y2="6" stroke="{colour}" stroke-width="3" stroke-dasharray="{dashes}"/>'
    shape = shape if colour else '<rect x="10" y="1" width="10" height="10"/>'
    return f'<span><svg width="30" height="12">{shape}</svg> {escaped(text)}</span>'


def path_table(nodes: list[dict]) -> str:
    """The nodes of a path, each with its row of images if there is one."""
    pictures = any(node["images"] for node in nodes)
    heads = ["node", "step", "distance to the teacher", "distance to the node before", "file"]
    lines = []
    for node in nodes:
        before = node.get("distance_to_neighbour") if node["index"] else None
        numbers = [node["step"], _number(node.get("distance_to_node_0")), _number(before), _size(node.get("bytes"))]
        name = "0 (teacher)" if node["index"] == 0 else str(node["index"])
        row = "".join(f"<td>{html.escape(str(text))}</td>" for text in (name, *numbers))
        if pictures:
            row += f'<td class="images">{picture(node["images"], "") if node["images"] else "-"}</td>'
        lines.append(f"<tr>{row}</tr>")
    head = "".join(f"<th>{text}</th>" for text in [*heads, *(["diffusion samples"] if pictures else [])])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{"".join(lines)}</table></div>'


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def document(title: str, *parts: str) -> str:
    """The whole page. In ASCII, other characters as references: it can be written and read in any encoding, whatever the
    bytes of a folder's name."""
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    return text.encode("ascii", "xmlcharrefreplace").decode()
