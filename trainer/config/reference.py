"""`python -m trainer.config.reference`: prints docs/configuration.md, made of the settings' own documentation
(`make docs`)."""

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config.schema import RunSettings

HEAD = """\
# Configuration

Made by `make docs` from `trainer/config/schema.py` and `evaluation.py`, `models/settings.py` and `data/settings.py`. A configuration is a YAML
file; `extends: other.yaml` lays it over another one, and `key.sub=value` on the command line goes over both. DeepSpeed's
own settings are JSON files that the `*_ds_config` keys name: one of `ds_configs/` (`zero0` to `zero3`, `teacher`) or a
path. Batch size, accumulation, clipping and precision are set here only; a JSON that sets them too is refused.

In a path, `~`, `$VAR` and `${VAR}` are expanded; `$$` before a name is a literal `$`.
"""


def _type(annotation: object) -> str:
    plain = isinstance(annotation, type) and not hasattr(annotation, "__args__")
    text = annotation.__name__ if plain else str(annotation)
    return text.replace("typing.", "").replace("|", "or")


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field is, if it is one."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _section(model: type[BaseModel], name: str) -> list[str]:
    fields, about = model.model_fields, " ".join((model.__doc__ or "").split())
    lines = [f"## {name or 'The run'}", "", about, "", "| key | purpose | type | default |", "|---|---|---|---|"]
    for key, field in fields.items():
        if not _inner(field):
            default = "required" if field.is_required() else f"`{field.default!r}`"
            purpose = " ".join((field.description or "").split()).replace("|", "\\|")
            key = f"`{name}.{key}`" if name else f"`{key}`"
            lines.append(f"| {key} | {purpose} | {_type(field.annotation)} | {default} |")
    lines.append("")
    for key, field in fields.items():
        if kind := _inner(field):
            lines += _section(kind, f"{name}.{key}" if name else key)
    return lines


def reference() -> str:
    return HEAD + "\n" + "\n".join(_section(RunSettings, "")).rstrip() + "\n"


if __name__ == "__main__":
    print(reference(), end="")
