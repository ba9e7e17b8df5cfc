"""The tables of a report: runs that differ only in their seed as one row, and one table per protocol. No torch."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

from trainer.checkpoint.directory import step_of
from trainer.evaluation.results import SCORES, Cost, ProtocolId, Results, one_line

KINDS = ("none", "warm", "path")  # the order of the generators' rows
# Of an evaluation's settings, what says where and in which portions it ran, not what was measured.
ASIDE = (
    "what watch poll_seconds folder batch chunk protocol weights list_weights cache keep node_images classifier"
).split()
COLUMNS = {
    "sampling_steps": ("steps/image", "d"),
    "generator_updates": ("updates", "d"),
    "compute": ("compute", ".0f"),
    "gpu_hours": ("GPU-h", ".3g"),
    "fid": ("FID", ".2f"),
    "patch_fid": ("patch FID", ".2f"),
    "kid": ("KID", ".3f"),
    "pixel_fd": ("pixel FD", ".2f"),
    "fd_dinov2": ("FD-DINOv2", ".1f"),
    "cmmd": ("CMMD", ".3f"),
    "precision": ("precision", ".2f"),
    "recall": ("recall", ".2f"),
    "clip_score": ("CLIP", ".4f"),
    "pick_score": ("PickScore", ".2f"),
    "hps_v2_1": ("HPSv2.1", ".4f"),
    "class_accuracy": ("class", ".3f"),
    "colour_accuracy": ("colour", ".3f"),
    "heldout_class_accuracy": ("class, new", ".3f"),
    "heldout_colour_accuracy": ("colour, new", ".3f"),
    "images": ("images", "d"),
    "train_seconds": ("train, s", ".0f"),
}


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, or a single run."""

    label: str
    runs: tuple[Results, ...]

    @property
    def kind(self) -> str:
        return self.runs[0].kind


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table. values: by the names in COLUMNS. compute: forward passes of training, in batches of the first
    run, gpu_hours and train_seconds: its device-hours and time; for the teacher those of pretraining, for a generator those
    of backtracking, plus recording if it uses the path. seeds: how many runs it is the mean of; None for what was not trained
    here. std: sample standard deviations over these runs, of scores."""

    label: str
    values: dict[str, float | None]
    protocol: ProtocolId
    seeds: int | None = 1
    std: dict[str, float] = field(default_factory=dict)
    published: bool = False


@dataclass(frozen=True)
class Table:
    """The rows of one protocol. scores and settings: metrics.json and settings.yaml of one of its evaluations, for what they
    say of all."""

    protocol: ProtocolId
    rows: list[Row]
    published: list[Row]
    scores: dict
    settings: dict
    warnings: list[str]


def group_runs(runs: list[Results]) -> list[Group]:
    """Groups of runs that differ only in `seed`, in the order of their first runs. A seed that occurs again is a group of its
    own: its difference is no spread over seeds. Labels are those of the runs' kinds, with folder names where two are alike."""
    found: list[list[Results]] = []
    for run in runs:
        for members in found:
            if members[0].recipe == run.recipe and run.seed not in [member.seed for member in members]:
                members.append(run)
                break
        else:
            found.append([run])
    kinds = [members[0].kind for members in found]
    names = [members[0].folder.name for members in found]
    groups = []
    for members, kind, name in zip(found, kinds, names, strict=True):
        name = name if names.count(name) == 1 else str(members[0].folder)
        label = kind if kinds.count(kind) == 1 else f"{kind}: {one_line(name)}"
        groups.append(Group(label, tuple(members)))
    return groups


def tables(groups: list[Group]) -> list[Table]:
    """One table per protocol, first that of the first run's generator. Rows: teacher, start and other pipelines of the
    first run, then the groups: none, warm, path. A run that trained for longer than the first one, as one without a
    recording may at equal compute, has a second row: its checkpoint at the first run's last step, if that was
    evaluated. Raises UserError for a damaged metrics.json."""
    buckets: dict[tuple, list[tuple[Row, Results, str]]] = {}
    for order, row, run, what in _entries(groups):
        key = order, row.label, row.protocol, row.values["generator_updates"], row.values["images"]
        buckets.setdefault(key, []).append((row, run, what))
    first = groups[0].runs[0]
    main = main_protocol(first)
    protocols = [main, *(key[2] for key in buckets)]
    found = []
    for protocol in dict.fromkeys(protocols):
        parts = [part for key, part in buckets.items() if key[2] == protocol]
        if parts:
            found.append(_table(protocol, parts, first))
    return found


def main_protocol(run: Results) -> ProtocolId:
    """The protocol of a run's generator, or of whatever else was evaluated."""
    known = run.generator_scores()
    others = (scores for what in ("teacher", "start", *run.evaluated()) if (scores := run.evaluation(what)))
    return ProtocolId.of(known[2] if known else next(others, {}))


def _entries(groups: list[Group]) -> Iterator[tuple[int, Row, Results, str]]:
    """(place in the table, row, run, what was evaluated) of every single evaluation."""
    first, cost = groups[0].runs[0], Cost()
    teachers = {run.config["pipeline"] or str(run.folder): run for run in reversed(groups[0].runs)}
    for run in reversed(teachers.values()):  # a teacher that several seeds share counts once
        if scores := run.evaluation("teacher"):
            steps = run.how("teacher").get("sampling_steps") or run.config["sample"]["steps"]
            yield 0, _row("teacher", steps, 0, run.teacher_cost(), scores), run, "teacher"
        if scores := run.evaluation("start"):
            yield 1, _row("start", run.student_steps, 0, cost, scores), run, "start"
    for what in first.evaluated():
        known = what in ("teacher", "start", "generator") or step_of(what.removesuffix("-raw")) is not None
        if not known and (scores := first.evaluation(what)):
            steps = first.how(what).get("sampling_steps")
            yield 2, _row(one_line(what), steps, None, None, scores, seeds=None), first, what
    for number, group in enumerate(sorted(groups, key=lambda group: KINDS.index(group.kind))):
        for run in group.runs:
            for step in (first.last_step, None) if run.last_step > first.last_step else (None,):
                if known := run.generator_scores(step):
                    step, what, scores = known
                    updates = step // run.config["backtrack"]["fake_updates"]
                    cost = run.generator_cost(step)
                    yield 3 + number, _row(group.label, run.student_steps, updates, cost, scores), run, what


def _row(
    label: str, steps: int | None, updates: int | None, cost: Cost | None, scores: dict, seeds: int | None = 1
) -> Row:
    values = dict.fromkeys(COLUMNS) | {key: scores.get(key) for key in (*SCORES, "images")}
    values |= {"sampling_steps": steps, "generator_updates": updates}
    if cost:
        values |= {"train_seconds": round(cost.seconds, 1), "gpu_hours": cost.gpu_hours}
        values["compute"] = None if cost.compute is None else round(cost.compute, 1)
    return Row(label=label, values=values, protocol=ProtocolId.of(scores), seeds=seeds)


def _table(protocol: ProtocolId, parts: list[list[tuple[Row, Results, str]]], first: Results) -> Table:
    entries = [entry for part in parts for entry in part]
    _, run, what = next((e for e in entries if e[1] is first and e[2] not in ("teacher", "start")), entries[-1])
    warnings: dict[str, dict[str, None]] = {}
    published: dict[str, dict] = {}
    for row, owner, name in entries:
        scores = owner.evaluation(name)
        published |= scores.get("published") or {}
        for text in scores.get("warnings") or []:
            warnings.setdefault(text, {})[row.label] = None
    known = [
        Row(
            label=one_line(label),
            values=dict.fromkeys(COLUMNS) | numbers,
            protocol=protocol,
            seeds=None,
            published=True,
        )
        for label, numbers in published.items()
    ]
    rows = [mean_row([row for row, *_ in part]) for part in parts]
    return Table(
        protocol,
        rows,
        known,
        run.evaluation(what),
        run.how(what),
        [f"{text} ({', '.join(labels)})" for text, labels in warnings.items()],
    )


def mean_row(rows: list[Row]) -> Row:
    """The mean over runs that differ only in their seed; of a value that not all of them have, none."""
    if len(rows) == 1:
        return rows[0]
    values, std = dict(rows[0].values), {}
    for name in values:
        column = [row.values[name] for row in rows]
        if None in column:
            values[name] = None
        elif len(set(column)) > 1:
            values[name] = statistics.fmean(column)
        if name in SCORES and values[name] is not None:
            std[name] = statistics.stdev(column)
    return Row(label=rows[0].label, values=values, protocol=rows[0].protocol, seeds=len(rows), std=std)


def used_columns(rows: list[Row]) -> list[str]:
    """The columns that a row has a value for."""
    return [name for name in COLUMNS if any(row.values.get(name) is not None for row in rows)]


def cell(row: Row, name: str, plus_minus: str = " +- ") -> str:
    """A value as text, with its standard deviation."""
    value, style = row.values.get(name), COLUMNS[name][1]
    if value is None:
        return "-"
    spread = f"{plus_minus}{format(row.std[name], style)}" if name in row.std else ""
    return format(value, style) + spread


def as_text(table: Table) -> str:
    """A table as plain text."""
    rows = [*table.rows, *table.published]
    names, seeds = used_columns(rows), any((row.seeds or 0) > 1 for row in rows)
    lines = [["", *(["seeds"] if seeds else []), *(COLUMNS[name][0] for name in names)]]
    for row in rows:
        count = [str(row.seeds or "-")] if seeds else []
        lines.append(
            [f"{row.label} (published)" if row.published else row.label, *count, *(cell(row, n) for n in names)]
        )
    widths = [max(len(text) for text in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{c:{'<' if i == 0 else '>'}{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def explanation(table: Table) -> str:
    """What the numbers of a table are, in sentences."""
    scores = table.scores
    features, reference = scores.get("features") or "not recorded", scores.get("reference") or "not recorded"
    text = [f"Protocol: {table.protocol}. Features: {features}. Reference: {reference}."]
    if scores.get("pixel_fd") is not None:
        text.append("Pixel FD: Frechet distance on principal components of the pixels.")
    text.append(
        "Compute: forward passes of the denoiser on one batch. GPU-h: device-hours of training. Both include the recording "
        "where the path is used; a run without recording stands there at equal updates and, trained on, at equal compute."
    )
    if any(row.std for row in table.rows):
        text.append(
            "Where several seeds are given: mean and sample standard deviation over runs that differ only in seed."
        )
    if scores.get("heldout_class_accuracy") is not None:
        text.append('"new": combinations of object and colour that training did not show.')
    if scores.get("credit"):
        text.append(f"Training images: {scores['credit']}.")
    return " ".join(text)


def differences(table: Table, main: Table) -> list[str]:
    """What was set differently in the evaluations of two tables: "images 10000 instead of 64"."""

    def facts(one: Table) -> dict:
        settings = one.settings.get("evaluate") or {}
        found = {key: one.scores.get(key) for key in ("features", "reference", "images", "seed")}
        return {key: value for key, value in settings.items() if key not in ASIDE} | {
            key: value for key, value in found.items() if value is not None
        }

    mine, theirs = facts(table), facts(main)
    keys = [key for key in dict.fromkeys((*mine, *theirs)) if mine.get(key) != theirs.get(key)]
    return [f"{key} {_shown(mine.get(key))} instead of {_shown(theirs.get(key))}" for key in keys]


def _shown(value: object) -> str:
    return "(not recorded)" if value is None else one_line(str(value)) or "(empty)"


def as_json(found: list[Table]) -> str:
    """summary.json: rows of all tables, and the published numbers of their protocols."""

    def record(row: Row) -> dict:
        name, digest = row.protocol
        about = {"protocol": name, "protocol_hash": digest, "seeds": row.seeds}
        return {"label": row.label} | row.values | {f"{key}_std": value for key, value in row.std.items()} | about

    rows = [record(row) for table in found for row in table.rows]
    published = [record(row) for table in found for row in table.published]
    published = [{key: value for key, value in row.items() if value is not None} for row in published]
    return json.dumps({"rows": rows, "published": published}, indent=2) + "\n"
