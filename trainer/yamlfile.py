"""A YAML file, what it extends and dotted overrides, as one mapping: without types, and so without importing torch."""

from pathlib import Path

import yaml

from trainer.errors import UserError


def read_values(file: Path, overrides: list[str]) -> dict:
    """The mapping that a YAML file and `key.sub=value` overrides (values are YAML) give. Raises UserError."""
    values = _read(file)
    for text in overrides:
        _override(values, text)
    return values


def _read(file: Path, seen: tuple[Path, ...] = ()) -> dict:
    """A YAML mapping, laid over the file that its `extends` names (relative to it), if any."""
    try:
        values = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"--config {file}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {file}: a mapping of settings is expected, such as `run: runs/name`")
    if "extends" not in values:
        return values
    base = file.parent / str(values.pop("extends"))
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
        values[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {text}: the value is not YAML") from error
