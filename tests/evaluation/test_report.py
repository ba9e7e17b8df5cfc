"""The report: one page that holds everything, shows what is there, and lets no text act as markup."""

import base64
import html.parser
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import support
from PIL import Image
from result_files import COCO, HELDOUT, PROMPTS, add_teacher, draw, make_run, scores, write_scores

from trainer.evaluation.plots import curves, prompt_rows, score_curves
from trainer.evaluation.report_page import picture, prompt_cards
from trainer.evaluation.results import Results
from trainer.evaluation.table import group_runs, tables
from trainer.report import main as report

NASTY = [
    "<script>alert(\"x\")</script> & 'q'",
    "\u05d0\u05d1 \u202e abc",
    "two\nlines of $\\price$",
    "{brace} %s \u2603",
]


class Page(html.parser.HTMLParser):
    """What a browser makes of a page: its elements, and its text by element."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements[-1:] != [("style", {})]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def images(self) -> list[Image.Image]:
        sources = [about["src"] for tag, about in self.elements if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def run_report(run: Path, *compare: Path) -> tuple[int, Page | None]:
    others = json.dumps([str(folder) for folder in compare])
    code = report(["--config", str(support.TINY), f"run={run}", f"report.compare={others}"])
    file = run / "report.html"
    return code, Page(file.read_text()) if file.exists() else None


@pytest.fixture
def main(tmp_path) -> Path:
    run = make_run(tmp_path / "main")
    add_teacher(run)
    return run


def test_a_report(main, tmp_path, capsys, monkeypatch):
    shared = {"path": str(main / "path"), "pipeline": str(main / "pipeline")}
    none = make_run(tmp_path / "none", "none", last=120, **shared)
    launched = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "1")
    assert run_report(main) == (0, None) and not capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    code, page = run_report(main, none, main, tmp_path / "absent")
    printed = capsys.readouterr().out
    assert (
        code == 0 and "teacher" in printed and f"left out: {tmp_path}/absent" in printed and "kept apart" not in printed
    )
    # Three prompts by four sources, four grids, six scores by three axes, five grids over time, three nodes, and curves:
    # four of backtracking, two of recording, the teacher's.
    assert len(page.images()) == 12 + 4 + 18 + 5 + 3 + 4 + 2 + 1
    assert all(about["src"].startswith("data:image/") for tag, about in page.elements if tag == "img")
    assert "http" not in page.text and not {"script", "link", "iframe"} & {tag for tag, _ in page.elements}
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    assert all(prompt in page.text for prompt in PROMPTS) and (main / "figure.png").exists()
    assert "Protocol: heldout a1b2c3d4e5f6" in page.text and "Training images: somebody <b>" in page.text
    assert [row["label"] for row in json.loads((main / "summary.json").read_text())["rows"]] == [
        "teacher", "start", "none", "none", "path",
    ]  # fmt: skip
    assert report(["--config", str(support.TINY), f"run={tmp_path}"]) == 2
    assert "has no config.yaml" in capsys.readouterr().err


def test_the_path(main):
    page = run_report(main)[1]
    cells = [text for text in page.texts if text.strip()]
    start = cells.index("2", cells.index("The path"))
    assert cells[start : start + 5] == ["2", "20", "0.2000", "0.1000", "16.5 MB"]
    assert "0 (teacher)" in cells and "diffusion samples" in cells


def test_protocols_published_numbers_and_warnings(main, tmp_path, capsys):
    """Another protocol has a table and curves of its own, and its published numbers stand there only."""
    more = {"published": {"DMD2 <1>": {"fid": 19.01}}, "warnings": ["too few images <i>"], "images": 10000}
    coco = make_run(tmp_path / "coco", "none", protocol=COCO, more=more, path=str(main / "path"))
    page = run_report(main, coco)[1]
    first, second = page.text.split("Under another protocol: dmd2-coco10k 0f1e2d3c4b5a")
    assert "(published)" not in first and "DMD2" not in first and "DMD2 <1> (published)" in second
    assert "images 10000 instead of 64" in second and "too few images <i> (none)" in second
    assert "Scores during training, protocol heldout" in first and "Scores during training, protocol dmd2" in second
    printed = capsys.readouterr().out
    kept = [
        line
        for line in printed.splitlines()
        if line.startswith("kept apart from heldout a1b2c3d4e5f6: none under dmd2")
    ]
    assert len(kept) == 1 and "warning: too few images" in printed
    rows = json.loads((main / "summary.json").read_text())["rows"]
    assert {(row["label"], row["protocol"]) for row in rows} >= {("path", "heldout"), ("none", "dmd2-coco10k")}


def test_curves_are_drawn_among_runs_of_one_protocol(main, tmp_path):
    coco = make_run(tmp_path / "coco", "none", protocol=COCO)
    groups = group_runs([Results(main), Results(coco)])
    heldout, other = tables(groups)
    both, alone = score_curves(groups, heldout, "fid"), score_curves(groups[:1], heldout, "fid")
    assert len(both) == 3 and both == alone != score_curves(groups, other, "fid")
    assert score_curves(groups, heldout, "cmmd") == []  # no run has it
    assert curves(groups, "backtrack", "mismatch", "mismatch") and not curves(groups, "backtrack", "absent", "absent")


def test_raw_weights_published_numbers_and_seeds_show_in_the_curves(main, tmp_path):
    """Each changes the picture."""
    groups = group_runs([Results(main)])
    plain = score_curves(groups, tables(groups)[0], "fid")[0]
    published = make_run(tmp_path / "published", more={"published": {"DMD2 $1$": {"fid": 19.01}}})
    add_teacher(published)
    averaged = make_run(tmp_path / "averaged")
    add_teacher(averaged)
    for file in averaged.glob("eval/step-*-raw/metrics.json"):
        file.unlink()
    seeds = [main, make_run(tmp_path / "s1", seed=1, shift=5.0)]
    pictures = []
    for runs in ([published], [averaged], seeds):
        groups = group_runs([Results(run) for run in runs])
        assert len(groups) == 1
        pictures.append(score_curves(groups, tables(groups)[0], "fid")[0])
    assert len({plain, *pictures}) == 4


@pytest.mark.parametrize("name", ["<script>alert(1)<b> a\"b'&amp;", "two\nlines \u05d0\u202eb $ x_1 $ {a} %s"])
def test_names_and_captions_are_text(name, tmp_path, capsys):
    """Of the run's folder, of pipelines, prompts, protocols and warnings: nothing becomes an element."""
    main = make_run(tmp_path / name, prompts=NASTY, protocol=HELDOUT | {"protocol": NASTY[0]})
    add_teacher(main, prompts=NASTY, protocol=NASTY[0])
    more = {"warnings": [NASTY[0]], "published": {NASTY[0]: {"fid": 2.0}}, "protocol": NASTY[0], "features": NASTY[2]}
    write_scores(main, name, scores(7.0, **more), prompts=NASTY)
    other = make_run(tmp_path / f"{name}2", prompts=NASTY, protocol=HELDOUT | {"protocol": NASTY[2]})
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        json.dumps({"extends": str(support.TINY), "run": str(main), "report": {"compare": [str(other)]}})
    )
    assert report(["--config", str(settings)]) == 0
    text = (main / "report.html").read_text()
    page = Page(text)
    assert text.isascii() and not {tag for tag, _ in page.elements} & {"script", "i", "amp"}
    known = {"src", "alt", "class", "name", "content", "charset", "lang"}
    drawn = {"svg", "line", "rect"}
    assert {key for tag, about in page.elements if tag not in drawn for key in about} <= known
    assert all(prompt in page.text for prompt in NASTY) and str(main) in page.text
    printed = capsys.readouterr().out
    assert "\u202e" not in printed and "\x1b" not in printed
    assert json.loads((main / "summary.json").read_text())["rows"]


def test_large_pictures_are_shrunk(tmp_path):
    def shown(file: Path) -> Image.Image:
        return Page(picture(file, "x")).images()[0]

    draw(tmp_path / "large.png", 10, 6, side=200)
    draw(tmp_path / "small.png", 10, 6, side=8)
    assert shown(tmp_path / "large.png").size == (1200, 720) and shown(tmp_path / "small.png").size == (80, 48)
    noise = Image.effect_noise((1100, 900), 90)
    noise.save(tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size > 400_000 and len(picture(tmp_path / "noise.png", "")) < 1_300_000
    assert shown(tmp_path / "noise.png").format == "JPEG" and shown(tmp_path / "small.png").format == "PNG"
    data = (tmp_path / "large.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])  # being written
    assert "cannot be read" in picture(tmp_path / "cut.png", "step 5") and "<img" not in picture(
        tmp_path / "cut.png", ""
    )


def test_prompts_stand_under_their_images(main):
    """Of what was made of the same prompts: a source with others is left out."""
    run = Results(main)
    sources = [(run, "teacher", "teacher"), (run, "start", "start"), (run, "generator", "path")]
    write_scores(main, "start", scores(90.0), prompts=PROMPTS[:2])
    cards = prompt_cards(sources)
    assert len(cards) == 3 and all(card.count("<img") == 2 and "start" not in card for card in cards)
    assert all(Page(card).text.endswith(prompt) for card, prompt in zip(cards, PROMPTS, strict=True))
    assert prompt_cards([(run, "absent", "absent")]) == []
    assert Image.open(io.BytesIO(prompt_rows(run))).width > 300


def test_a_page_for_small_screens_and_paper(main):
    """What the layout rests on; no text below 14 pixels except on paper."""
    style = re.search("<style>(.*?)</style>", run_report(main)[1] and (main / "report.html").read_text(), re.S)[1]
    screen, _, paper = style.partition("@media print")
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: (\d+)px", screen)]
    assert len(sizes) >= 4 and min(sizes) >= 14
    assert "overflow-x: auto" in screen and "overflow: visible" in paper and "break-inside: avoid" in paper
    text = (main / "report.html").read_text()
    assert text.count('<div class="scroll"><table>') == text.count("<table>") == 2


def test_a_run_without_evaluations(tmp_path, capsys):
    run = make_run(tmp_path / "main")
    (run / "eval").rename(run / "elsewhere")
    code, page = run_report(run)
    assert code == 0 and "no evaluation yet" in capsys.readouterr().out and "Backtracking" in page.text
    assert json.loads((run / "summary.json").read_text())["rows"] == [] and not (run / "figure.png").exists()


def test_a_report_needs_no_torch(main):
    call = [sys.executable, "-X", "importtime", "-m", "trainer.report", "--config", str(support.TINY), f"run={main}"]
    done = subprocess.run(call, capture_output=True, text=True, env=support.environment())
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 0 and (main / "report.html").exists()
    assert "matplotlib" in imported and not imported & {"torch", "deepspeed", "diffusers"}
