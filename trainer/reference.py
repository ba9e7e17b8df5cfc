"""`python -m trainer.reference`: every setting, its type and default, as docs/configuration.md (`make docs`)."""

from pydantic import BaseModel

from trainer.settings import RunSettings


def _type(annotation: object) -> str:
    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    return text.replace("typing.", "").replace("|", "or")


def _section(model: type[BaseModel], name: str) -> list[str]:
    fields = model.model_fields
    inner = {
        k: f.annotation
        for k, f in fields.items()
        if isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel)
    }
    about = " ".join((model.__doc__ or "").split())
    lines = [f"## {name or 'The run'}", "", about, "", "| key | type | default |", "|---|---|---|"]
    for key, field in fields.items():
        if key in inner:
            continue
        default = "required" if field.is_required() else f"`{field.default!r}`"
        lines.append(f"| `{name + '.' if name else ''}{key}` | {_type(field.annotation)} | {default} |")
    lines.append("")
    for key, kind in inner.items():
        lines += _section(kind, f"{name}.{key}" if name else key)
    return lines


def reference() -> str:
    head = [
        "# Configuration",
        "",
        "Made by `make docs` from the code. YAML, laid over another file with `extends: other.yaml`, and over",
    ]
    head += [
        "that `key.sub=value` on the command line. DeepSpeed's own settings are JSON files named by the `*_ds_config` keys:"
    ]
    head += [
        "one of `ds_configs/` (`zero0` to `zero3`, `teacher`) or a path. Batch size, accumulation, clipping and precision are"
    ]
    head += ["set here only; a JSON that sets them too is refused.", ""]
    return "\n".join(head + _section(RunSettings, "")).rstrip() + "\n"


if __name__ == "__main__":
    print(reference(), end="")
