"""YAML and dotted overrides to typed settings; messages that name file, key and remedy."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ValidationError

from data.paths import expanded
from trainer.config import yaml_values
from trainer.config.schema import RunSettings
from trainer.errors import UserError


def load_settings(file: Path, overrides: list[str]) -> RunSettings:
    """Settings from a YAML file with `key.sub=value` overrides (values are YAML). Raises UserError."""
    values = read_values(file, overrides)
    if problems := list(_no_numbers(RunSettings, values)):
        raise UserError(f"{file}: " + "; ".join(problems))
    try:
        return RunSettings.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{file}: " + "; ".join(_explain(e) for e in error.errors())) from error


def _no_numbers(model: type[BaseModel], values: dict, prefix: str = "") -> Iterator[str]:
    """What is wrong with values that pydantic would take as numbers, though YAML means something else by them."""
    for name, value in values.items():
        kind = model.model_fields[name].annotation if name in model.model_fields else None
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _no_numbers(kind, value, f"{prefix}{name}.") if isinstance(value, dict) else ()
            continue
        kinds = set(_plain_types(kind))
        for each in (
            (value if isinstance(value, list) else [value]) if kinds & {int, float} and str not in kinds else ()
        ):
            if isinstance(each, bool):
                what = "YAML reads yes, no, on and off as true and false"
                yield f"key '{prefix}{name}': a number is expected, got {str(each).lower()} ({what})"
            elif isinstance(each, str) and re.match(r"[-+]?0[0-9_]", each):
                yield f"key '{prefix}{name}': {each} is octal to some readers of YAML: write it without the leading 0"


def _plain_types(annotation: object) -> Iterator[object]:
    """The types that a field's annotation is built of: int and NoneType of `int | None`."""
    yield annotation
    for part in get_args(annotation):
        yield from _plain_types(part)


def _model_at(location: tuple) -> type[BaseModel]:
    """The settings class in which the last part of an error's location stands."""
    model: type[BaseModel] = RunSettings
    for name in location[:-1]:
        inner = model.model_fields[name].annotation if name in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return model


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, prefix + name + ".")
    return keys


def _explain(error: dict) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"key '{where}' is missing"
    if error["type"] == "extra_forbidden":
        name, known = str(error["loc"][-1]), list(_model_at(error["loc"]).model_fields)
        near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
        section = where.rpartition(".")[0]
        if near:
            return f"unknown key '{where}': did you mean '{f'{section}.' if section else ''}{near[0]}'?"
        # Perhaps it is a known key of another section.
        near = difflib.get_close_matches(where, _all_keys(RunSettings), 1, cutoff=0.0)
        return f"unknown key '{where}': the nearest known key is '{near[0]}'"
    problem = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict):  # of a whole section: the message names the keys
        return f"section '{where}': {problem}"
    return f"key '{where}': {problem}, got {error['input']!r}"


def read_values(file: Path, overrides: list[str]) -> dict:
    """The mapping that a YAML file and `key.sub=value` overrides (values are YAML) give. Raises UserError."""
    values = _read(file)
    for text in overrides:
        _override(values, text)
    return values


def _read(file: Path, seen: tuple[Path, ...] = ()) -> dict:
    """A YAML mapping, laid over the file that its `extends` names (relative to it), if any."""
    values = yaml_values.read(file)
    if not isinstance(values, dict):
        raise UserError(f"--config {file}: a mapping of settings is expected, such as `run: runs/name`")
    if "extends" not in values:
        return values
    try:
        base = file.parent / expanded(str(values.pop("extends")))
    except ValueError as error:
        raise UserError(f"--config {file}: extends: {error}") from error
    if base.resolve() in seen:
        raise UserError(f"--config {file}: `extends` goes in a circle")
    return _over(_read(base, (*seen, file.resolve())), values)


def _over(base: dict, values: dict) -> dict:
    """`values` laid over `base`, section by section."""
    out = dict(base)
    for key, value in values.items():
        inner = out.get(key)
        out[key] = _over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return out


def _override(values: dict, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"'{text}' is not understood: overrides are key.sub=value, such as backtrack.steps=100")
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"override {text}: {parent} is a value, not a section")
        values = inner
    try:
        values[last] = yaml_values.parse(value)
    except ValueError as error:
        raise UserError(f"override {text}: the value is not YAML: {error}") from error
