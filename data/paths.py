"""Paths as people write them: `~` and `$VAR` are expanded once, when a setting or an argument is read."""

import os
import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator

VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{(\w+)\})")
Value = TypeVar("Value", str, list, dict)


def expanded(value: Value) -> Value:
    """The value with `~`, `~user`, `$VAR` and `${VAR}` replaced in every string of it. Raises ValueError for what has no
    value, instead of making a folder that is literally called `~` or `$VAR`."""
    if isinstance(value, list):
        return [expanded(each) for each in value]
    if isinstance(value, dict):
        return {key: expanded(each) for key, each in value.items()}
    text = VARIABLE.sub(_variable, value)
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:
        name = text.partition("/")[0]
        raise ValueError(
            f"{name} has no home directory here (a name that begins with ~ is written ./{name})"
        ) from error


def _variable(match: re.Match) -> str:
    name = match[1] or match[2]
    if not os.environ.get(name):
        raise ValueError(f"the environment variable {name} is not set, or empty")
    return os.environ[name]


def _expanded_local_dir(value: str) -> str:
    """open_clip's way to name a folder as a model is local-dir:FOLDER."""
    prefix, colon, folder = value.partition("local-dir:")
    return colon + expanded(folder) if colon and not prefix else value


EXPANDED = AfterValidator(expanded)
PathText = Annotated[str, EXPANDED]
PathTexts = Annotated[str | list[str], EXPANDED]
ClipModel = Annotated[str, AfterValidator(_expanded_local_dir)]
