"""YAML and dotted overrides to typed settings; messages that name file, key and remedy."""

import difflib
from pathlib import Path

from pydantic import BaseModel, ValidationError

from trainer.errors import UserError
from trainer.settings import RunSettings
from trainer.yamlfile import read_values


def load_settings(file: Path, overrides: list[str]) -> RunSettings:
    """Settings from a YAML file with `key.sub=value` overrides (values are YAML). Raises UserError."""
    values = read_values(file, overrides)
    try:
        return RunSettings.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{file}: " + "; ".join(_explain(e) for e in error.errors())) from error


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
    return f"key '{where}': {error['msg']}, got {error['input']!r}"
