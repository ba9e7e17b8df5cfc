"""`disback report`: one self-contained HTML page of a run and the runs it is compared with. No torch, no process group."""

import base64
import html
import json
import os
import textwrap
from pathlib import Path

from trainer.checkpoint.files import write_text
from trainer.config.schema import RunSettings
from trainer.entry import exit_with, settings_verb
from trainer.errors import UserError
from trainer.evaluation.plots import curves, evaluated, prompt_rows
from trainer.evaluation.results import Results, Row, as_json, as_text, cells, explanation, table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: .25em .9em; text-align: right; border-bottom: 1px solid #eee }
td:first-child, th:first-child { text-align: left } .row { display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start }
figure { margin: 0 } figcaption { font-size: .85em; color: #555 } img { max-width: 100%; image-rendering: auto }
.small img { width: 340px; image-rendering: pixelated } pre { background: #f6f6f6; padding: .8em; overflow-x: auto; font-size: .85em }
"""


def _figure(png: bytes | None, caption: str = "") -> str:
    if png is None:
        return ""
    data = base64.b64encode(png).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _section(title: str, *figures: str, small: bool = False, note: str = "") -> str:
    shown = "".join(f for f in figures if f)
    if not shown:
        return ""
    note = f"<p>{html.escape(note)}</p>" if note else ""
    return f'<h2>{html.escape(title)}</h2>{note}<div class="row{" small" if small else ""}">{shown}</div>'


def _table(rows: list[Row]) -> str:
    lines = []
    for line, tag in zip(cells(rows), ["th", *["td"] * len(rows)], strict=True):
        lines.append("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _grids(run: Results, stage: str, most: int = 6) -> list[str]:
    """At most `most` grids over time, including the first and the last."""
    grids = run.grids(stage)
    if len(grids) > most:
        grids = [grids[round(i * (len(grids) - 1) / (most - 1))] for i in range(most)]
    return [
        _figure(file.read_bytes(), f"{run.label if stage == 'backtrack' else stage}, step {step}")
        for step, file in grids
    ]


def _evaluation_grids(runs: list[Results]) -> list[str]:
    shown = [(runs[0], "teacher", "teacher, many steps"), (runs[0], "start", "untrained generator, one step")]
    shown += [(run, "generator", f"{run.label}, one step") for run in reversed(runs)]
    files = [(run.folder / "eval" / what / "grid.png", text) for run, what, text in shown]
    return [_figure(file.read_bytes(), text) for file, text in files if file.exists()]


def page(runs: list[Results], rows: list[Row], figure: bytes | None) -> str:
    """The whole page, without references to other files: table, pictures, curves, settings."""
    main = runs[0]
    nodes = []
    manifest = Path(main.config["path"] or main.folder / "path") / "path.json"
    if manifest.exists():
        nodes = json.loads(manifest.read_text())["nodes"]
    recorded = [n["step"] for n in nodes[1:]]
    spots = "; ".join(f"node {n['index']}: step {n['step']}, distance {n['distance_to_node_0']:.4f}" for n in nodes)
    parts = [
        f"<h1>{html.escape(str(main.folder))}</h1>",
        _table(rows) if rows else "",
        f"<p>{html.escape(explanation(main))}</p>",
        _section("Prompts", _figure(figure)),
        _section(
            "Generated images",
            *_evaluation_grids(runs),
            small=True,
            note="Rows cycle through the held-out captions; all use the same noise.",
        ),
        _section(
            "Evaluation over steps",
            _figure(evaluated(runs, "fid", "Frechet distance")),
            _figure(evaluated(runs, "class_accuracy", "class accuracy")),
            note="Of the averaged (EMA) weights.",
        ),
        _section("Backtracking over time", *_grids(main, "backtrack"), small=True),
        _section(
            "Backtracking",
            _figure(curves(runs, "backtrack", "mismatch", "mismatch: target against fake score", log=True)),
            _figure(curves(runs, "backtrack", "target_node", "target node (0 is the teacher)")),
            _figure(curves(runs, "backtrack", "loss/fake_score", "fake-score loss")),
            _figure(curves(runs, "backtrack", "grad_norm/generator", "generator gradient norm", log=True)),
        ),
        _section(
            "Recording the path",
            _figure(curves([main], "record", "distance", "score distance to the teacher", marks=recorded)),
            _figure(curves([main], "record", "loss/fake_score", "denoising loss on the untrained generator's samples")),
            note=spots,
        ),
        _section(
            "The teacher",
            _figure(curves([main], "pretrain", "loss/teacher", "denoising loss", log=True)),
            *_grids(main, "pretrain", 3),
        ),
        f"<h2>Configuration</h2><pre>{html.escape((main.folder / 'config.yaml').read_text())}</pre>",
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(main.folder.name)}</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def report(settings: RunSettings) -> None:
    """Writes report.html, figure.png and summary.json into the run folder and prints the table. Under a launcher, rank 0
    does it."""
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0):
        return
    main = settings.folder
    others = [Path(p) for p in settings.report.compare if Path(p) != main and Path(p).exists()]
    runs = [Results(folder) for folder in (main, *others)]
    rows, out = table(runs), main / "report.html"
    try:
        figure = prompt_rows(runs[0])
        if figure:
            (main / "figure.png").write_bytes(figure)
        write_text(page(runs, rows, figure), out)
        write_text(as_json(rows), main / "summary.json")
    except OSError as error:
        raise UserError(f"{main}: the report cannot be written: {error.strerror}") from error
    print(as_text(rows) if rows else "no evaluation yet: run `disback evaluate`")
    print(f"\n{textwrap.fill(explanation(runs[0]), 120)}")
    print(f"\npage:     {out.resolve()}\npictures: {(main / 'eval').resolve()}/*/grid.png")


def main(argv: list[str] | None = None) -> int:
    return settings_verb("report", "One self-contained HTML page of a run.", report, argv)


if __name__ == "__main__":
    exit_with(main)
