"""DeepSpeed's internals are those that the trainer was written for."""

import tomllib
from importlib.metadata import version

import support
from packaging.requirements import Requirement


def test_the_installed_version_is_a_tested_one():
    project = tomllib.loads((support.REPOSITORY / "pyproject.toml").read_text())["project"]
    (pinned,) = [Requirement(text) for text in project["dependencies"] if text.startswith("deepspeed")]
    assert sorted(bound.operator for bound in pinned.specifier) == ["<", ">="]
    assert version("deepspeed") in pinned.specifier, (
        f"DeepSpeed {version('deepspeed')} is installed, {pinned} is tested: trainer/engine/deepspeed_internals.py and "
        "trainer/distributed/deepspeed_comm.py rely on its internals. Check them, run all tests, then widen the range in "
        "pyproject.toml"
    )
