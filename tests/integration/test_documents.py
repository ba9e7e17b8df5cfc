"""The documents name files that exist: relative links, and repository paths and modules in backticks."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "slurm/README.md"]
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
FILE = re.compile(r"`((?:trainer|models|data|tests|benchmarks|configs|ds_configs|slurm|docs)/[a-z0-9_/.]+\.\w+)`")
MODULE = re.compile(r"(?:-m |--module |`)((?:trainer|models|benchmarks)(?:\.[a-z_]+)+)\b")  # `data.x` is a setting


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_files_and_modules_exist(document):
    text = document.read_text()
    missing = [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    missing += [file for file in FILE.findall(text) if not (REPOSITORY / file).exists()]
    for name in MODULE.findall(text):  # a.b.c is a module, or the name c in module a.b
        path, last = REPOSITORY.joinpath(*name.split(".")), name.rpartition(".")[2]
        owner = path.parent.with_suffix(".py")
        found = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
        if not found and not (owner.exists() and last in owner.read_text()):
            missing.append(name)
    assert not missing


def test_the_figure_of_the_rooms_has_every_module():
    figure = (REPOSITORY / "docs/architecture.md").read_text().partition("## Rooms")[2].split("```")[1]
    modules = {file.stem for room in ("trainer", "models", "data") for file in (REPOSITORY / room).rglob("*.py")}
    assert modules - {"__init__"} <= set(re.findall(r"\w+", figure))
