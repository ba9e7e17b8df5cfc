"""Paths as people write them: `~` and `$VAR` are expanded once, when a setting or an argument is read. `$$` before a name
is a literal `$`."""

import os
import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, ValidationInfo

VARIABLE = re.compile(r"\$(\$?)(?:([A-Za-z_]\w*)|\{(\w+)\})")
Value = TypeVar("Value", str, list, dict)
RESOLVED = {
    "paths": "resolved"
}  # the validation context of settings that were read before: a `$` in them is a literal one


def expanded(value: Value) -> Value:
    """The value with `~`, `~user`, `$VAR` and `${VAR}` replaced in every string of it; `$$VAR` becomes a literal `$VAR`.
    Raises ValueError for what has no value, instead of making a folder that is literally called `~` or `$VAR`."""
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
    if match[1]:
        return match[0][1:]
    name = match[2] or match[3]
    if not os.environ.get(name):
        raise ValueError(
            f"the environment variable {name} is not set, or empty (a literal ${name} is written $${name})"
        )
    return os.environ[name]


def _when_read(value: Value, info: ValidationInfo) -> Value:
    return value if info.context == RESOLVED else expanded(value)


def _clip_when_read(value: str, info: ValidationInfo) -> str:
    """open_clip's way to name a folder as a model is local-dir:FOLDER."""
    prefix, colon, folder = value.partition("local-dir:")
    return colon + _when_read(folder, info) if colon and not prefix else value


EXPANDED = AfterValidator(_when_read)
PathText = Annotated[str, EXPANDED]
PathTexts = Annotated[str | list[str], EXPANDED]
ClipModel = Annotated[str, AfterValidator(_clip_when_read)]
