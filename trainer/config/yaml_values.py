"""YAML as configurations use it: a key stands once in a section, and a value means what it looks like.

PyYAML reads YAML 1.1, which takes the last of two equal keys, 010 as eight, 1:30 as ninety and 2024-01-01 as a date. Here the
first is an error, and the others stay text: where a number is wanted, the settings refuse it.
"""

import re
from pathlib import Path

import yaml
from yaml.nodes import MappingNode

from trainer.errors import UserError

INTEGER, FLOAT, DATE = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
WHOLE = r"(0|[1-9][0-9_]*)"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's name)
        first: [(tag, pattern) for tag, pattern in known if tag not in (INTEGER, FLOAT, DATE)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict:
        """Refuses equal keys first, while what a `<<` brings in, which may be replaced, is not among them."""
        seen = {}
        for key, _ in node.value if isinstance(node, MappingNode) else ():
            if key.tag == "tag:yaml.org,2002:merge":  # several `<<` are laid over each other
                continue
            mark = seen.setdefault((key.tag, str(key.value)), key.start_mark)
            if mark is not key.start_mark:
                one, other = mark.line + 1, key.start_mark.line + 1
                where = f"line {one}" if one == other else f"lines {one} and {other}"
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' stands twice, in {where}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(INTEGER, re.compile(rf"[-+]?({WHOLE}|0b[01_]+|0x[0-9a-fA-F_]+)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(rf"([-+]?(({WHOLE}\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)
_Loader.add_constructor(DATE, yaml.SafeLoader.construct_yaml_str)  # an explicit !!timestamp too


def parse(text: str) -> object:
    """The value of a YAML text. Raises ValueError, with one line about what is wrong."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of an explicit tag, as in !!int x
        raise ValueError(" ".join(str(error).split())) from error


def read(file: Path) -> object:
    """The value of a YAML file. Raises UserError."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--config {file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {file}: not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    try:
        return parse(text)
    except ValueError as error:
        raise UserError(f"--config {file}: not YAML: {error}") from error
