"""Patterns for shards, and errors that name the mistake."""

import pytest
from pydantic import ValidationError

from data.errors import DataError
from data.settings import DataSettings
from data.shard_patterns import expand, not_read


@pytest.fixture
def folder(tmp_path):
    for name in ("a-000.tar", "a-001.tar", "b-000.tar", "a-002.tar.tmp", "a-000.tar.index.npz"):
        (tmp_path / name).touch()
    return tmp_path


def test_forms(folder):
    a, b = [folder / "a-000.tar", folder / "a-001.tar"], [folder / "b-000.tar"]
    assert expand(str(folder)) == a + b
    assert expand(f"{folder}/a-*.tar") == a
    assert expand(f"{folder}/a-{{000..001}}.tar") == a
    assert expand([f"{folder}/b-*.tar", str(folder), f"{folder}/a-000.tar"]) == a + b  # sorted, each once


def test_what_is_no_shard_is_told(folder):
    before = expand(str(folder))
    for name in ("._a-000.tar", "c.tar.gz", "d.TGZ"):
        (folder / name).touch()
    (folder / "E.TAR").touch()
    assert expand(str(folder)) == sorted([*before, folder / "E.TAR"])
    assert not_read(str(folder)) == {"hidden .tar file": 1, "compressed tar": 2}
    assert not not_read(f"{folder}/a-*.tar")


@pytest.mark.parametrize(
    "pattern, named",
    [("a-{000..002}.tar", "a-002.tar does not exist"), ("c-*.tar", "c-\\*.tar"), ("a-{000.tar", "unbalanced braces")],
)
def test_mistakes_are_named(folder, pattern, named):
    with pytest.raises(DataError, match=named) as error:
        expand(f"{folder}/{pattern}", "data.train")
    assert "data.train" in str(error.value)


def test_nothing_found_suggests_the_command(tmp_path):
    for patterns in ("", [], str(tmp_path)):
        with pytest.raises(DataError, match="disback shards"):
            expand(patterns)


def test_config_refuses_unknown_keys():
    with pytest.raises(ValidationError):
        DataSettings(trian="x")
