"""`disback report`: one self-contained HTML page of a run and the runs it is compared with. No torch, no process group."""

import html
import sys
import textwrap
from pathlib import Path

from trainer.checkpoint.files import write_text
from trainer.config.schema import RunSettings
from trainer.distributed.group import ALONE, set_environment
from trainer.entry import exit_with, settings_verb
from trainer.errors import UserError
from trainer.evaluation.plots import curves, prompt_rows, score_curves
from trainer.evaluation.report_page import (
    document,
    escaped,
    legend,
    path_table,
    picture,
    plot,
    prompt_cards,
    score_table,
    section,
)
from trainer.evaluation.results import SCORES, ProtocolId, Results, one_line
from trainer.evaluation.table import (
    Group,
    Table,
    as_json,
    as_text,
    differences,
    explanation,
    group_runs,
    tables,
)


def _grids(run: Results, stage: str, most: int = 6) -> list[str]:
    """At most `most` grids over time, including the first and the last."""
    grids = run.grids(stage)
    if len(grids) > most:
        grids = [grids[round(i * (len(grids) - 1) / (most - 1))] for i in range(most)]
    return [picture(file, f"{run.kind if stage == 'backtrack' else stage}, step {step}") for step, file in grids]


def _sources(groups: list[Group]) -> list[tuple[Results, str, str]]:
    """(run, what was evaluated, label) of the images that stand side by side: of the first run all, of others the generator."""
    first = groups[0].runs[0]
    teacher = f"teacher, {first.how('teacher').get('sampling_steps', 'many')} steps"
    steps = f"{first.student_steps} steps" if first.student_steps > 1 else "one step"
    own = ("teacher", "start", "generator")
    others = [what for what in first.evaluated() if what not in own and not what.startswith("step-")]
    found = [
        (first, "teacher", teacher),
        (first, "start", f"start, {steps}"),
        *((first, what, what) for what in others),
    ]
    for group in reversed(groups):
        if known := group.runs[0].generator_scores():
            found.append((group.runs[0], known[1], f"{group.label}, {steps}"))
    return found


def _score_section(groups: list[Group], table: Table, main: Table) -> str:
    """A protocol's table with its explanation, and its curves."""
    parts = [score_table(table), f"<p>{escaped(explanation(table))}</p>"]
    if table is not main:
        other = "; ".join(differences(table, main)) or "no difference in the recorded settings"
        heading = f"<h2>Under another protocol: {escaped(table.protocol)}</h2>"
        note = f"Not comparable with {main.protocol} above. Set differently: {other}."
        parts = [heading, f"<p>{escaped(note)}</p>", *parts]
    return "".join(parts)


def _curve_section(groups: list[Group], table: Table) -> str:
    rows = ["".join(map(plot, score_curves(groups, table, key))) for key in SCORES]
    rows = "".join(f'<div class="row">{row}</div>' for row in rows if row)
    if not rows:
        return ""
    note = (
        "Every evaluated checkpoint, over steps, GPU-hours and compute; the last two include the recording of the path."
    )
    title = f"Scores during training, protocol {table.protocol}"
    return f"<h2>{escaped(title)}</h2><p>{note}</p>{legend(groups, table)}{rows}"


def page(groups: list[Group], found: list[Table]) -> str:
    """The whole page, without references to other files: tables, pictures, curves, the path, settings."""
    main = groups[0].runs[0]
    nodes = main.nodes()
    recorded = [node["step"] for node in nodes[1:]]
    sources = _sources(groups)
    if found:  # with the noise of one protocol
        sources = [each for each in sources if ProtocolId.of(each[0].evaluation(each[1]) or {}) == found[0].protocol]
    grids = [
        picture(file, label)
        for run, what, label in sources
        if found and (file := run.evaluations / what / "grid.png").exists()
    ]
    alone = [Group(main.kind, (main,))]
    return document(
        main.folder.name,
        f"<h1>{escaped(main.folder)}</h1>",
        *(_score_section(groups, table, found[0]) for table in found[:1]),
        section("Prompts", *prompt_cards(sources), note="The same prompts and seeds for all."),
        section(
            "Generated images",
            *grids,
            note="The same captions and noise in the same places.",
        ),
        *(_curve_section(groups, table) for table in found[:1]),
        *(_score_section(groups, table, found[0]) + _curve_section(groups, table) for table in found[1:]),
        section("Images during backtracking", *_grids(main, "backtrack"), note="Fixed captions and fixed noise."),
        section(
            "Backtracking",
            legend(groups),
            plot(curves(groups, "backtrack", "mismatch", "mismatch: target, fake score", log=True)),
            plot(curves(groups, "backtrack", "target_node", "target node (0: teacher)")),
            plot(curves(groups, "backtrack", "loss/fake_score", "fake-score loss")),
            plot(curves(groups, "backtrack", "grad_norm/generator", "generator gradient norm", log=True)),
        ),
        f"<h2>The path</h2>{path_table(nodes)}" if nodes else "",
        section(
            "Recording the path",
            plot(curves(alone, "record", "distance", "distance to the teacher", marks=recorded)),
            plot(curves(alone, "record", "loss/fake_score", "denoising loss, start's samples")),
            note="Vertical lines: the steps of the nodes.",
        ),
        section(
            "The teacher",
            plot(curves(alone, "pretrain", "loss/teacher", "denoising loss", log=True)),
            *_grids(main, "pretrain", 3),
        ),
        f"<h2>Configuration</h2><pre>{html.escape((main.folder / 'config.yaml').read_text())}</pre>",
    )


def _compared(settings: RunSettings, main: Results) -> list[Results]:
    """The other runs, each once. One that has no folder of the main run's results shows those of its own `evaluate.folder`."""
    found, name = {main.folder.resolve(): main}, settings.evaluate.folder
    for folder in map(Path, settings.report.compare):
        if not folder.exists():
            print(f"not there, left out: {one_line(str(folder))}")
        elif folder.resolve() not in found:
            own = None if not (folder / name).is_dir() else name
            found[folder.resolve()] = Results(folder, own, main.unit)
    return list(found.values())


def report(settings: RunSettings) -> None:
    """Writes report.html, figure.png and summary.json into the run folder and prints the tables. Under a launcher, rank 0
    does it."""
    rank, size, _ = set_environment()
    if rank:
        print(f"rank {rank} of {size}: rank 0 writes the report ({ALONE})", file=sys.stderr)
        return
    main = Results(settings.folder, settings.evaluate.folder)
    groups = group_runs(_compared(settings, main))
    found, out = tables(groups), main.folder / "report.html"
    try:
        figure = prompt_rows(main)
        if figure:
            (main.folder / "figure.png").write_bytes(figure)
        write_text(page(groups, found), out)
        write_text(as_json(found), main.folder / "summary.json")
    except OSError as error:
        raise UserError(f"{main.folder}: the report cannot be written: {error.strerror}") from error
    for table in found:
        _print(table, found[0])
    if not found:
        print("no evaluation yet: run `disback evaluate`")
    print(f"\npage:     {_path(out)}\npictures: {_path(main.evaluations)}/*/grid.png")


def _print(table: Table, main: Table) -> None:
    if table is not main:
        other = "; ".join(differences(table, main)) or "nothing in the recorded settings"
        labels = ", ".join(row.label for row in table.rows)
        print(f"\nkept apart from {main.protocol}: {labels} under {table.protocol} (set differently: {other})")
    print(f"{as_text(table)}\n\n{textwrap.fill(one_line(explanation(table)), 120)}")
    for text in table.warnings:
        print(f"warning: {one_line(text)}")


def _path(path: Path) -> str:
    return one_line(str(path.resolve()))


def main(argv: list[str] | None = None) -> int:
    return settings_verb("report", "One self-contained HTML page of a run.", report, argv)


if __name__ == "__main__":
    exit_with(main)
