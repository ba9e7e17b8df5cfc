"""Filters of samples: `FIELD OPERATOR LITERAL`, such as `aesthetic >= 6.25` or `nsfw == false`.

A field is one of MEASURED or of the sample's .json; `a.b` is the field b of its object a, unless there is a field "a.b".
A literal is a number, true, false, or a text, with quotes if it is not a single word.
"""

import json
import math
import operator
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings are read without numpy
    import numpy as np

MEASURED = ("width", "height", "aspect", "caption_length")
OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
FORM = re.compile(r"\s*([\w.\-/ ]*?[\w\-/])\s*(==|!=|<=|>=|<|>)\s*(.+?)\s*")
NONE, BOOLEAN, NUMBER, TEXT, OTHER = range(5)  # kinds of a field's value
KINDS = {BOOLEAN: "true or false", NUMBER: "a number", TEXT: "a text"}


@dataclass(frozen=True)
class Filter:
    """What samples must fulfil. literal: a bool, a float or a str."""

    field: str
    operator: str
    literal: bool | float | str

    def __str__(self) -> str:
        shown = self.literal if isinstance(self.literal, str) else json.dumps(self.literal)
        return f"{self.field} {self.operator} {shown}"

    @classmethod
    def parse(cls, text: str) -> "Filter":
        """Raises ValueError that says what is wrong with the expression."""
        match = FORM.fullmatch(text)
        if not match:
            raise ValueError(f"filter {text!r}: must be FIELD OPERATOR VALUE, such as 'aesthetic >= 6.25'")
        field, sign, raw = match.groups()
        literal = _literal(raw, text)
        if sign not in ("==", "!=") and not isinstance(literal, float):
            raise ValueError(f"filter {text!r}: {sign} compares numbers, and {raw} is {_named(literal)}: use == or !=")
        if field in MEASURED and not isinstance(literal, float):
            raise ValueError(f"filter {text!r}: {field} is a number, and {raw} is {_named(literal)}")
        return cls(field, sign, literal)

    @property
    def kind(self) -> int:
        """Of the values that it compares with."""
        return BOOLEAN if isinstance(self.literal, bool) else NUMBER if isinstance(self.literal, float) else TEXT

    def of_numbers(self, values: "np.ndarray") -> "np.ndarray":
        """Whether numbers fulfil it, bool [N]."""
        return OPERATORS[self.operator](values, self.literal)


def _literal(raw: str, text: str) -> bool | float | str:
    if raw in ("true", "false"):
        return raw == "true"
    if raw == "null":
        raise ValueError(f"filter {text!r}: samples without the field are left out in any case: compare with a value")
    if raw[0] in "\"'":
        if len(raw) < 2 or raw[-1] != raw[0] or raw[0] in raw[1:-1]:
            raise ValueError(f"filter {text!r}: the text {raw} does not end with its quote")
        return raw[1:-1]
    try:
        number = float(raw)
    except ValueError:
        if not re.fullmatch(r"[\w.\-/]+", raw):
            raise ValueError(f"filter {text!r}: {raw!r} is no single value: quote a text of several words") from None
        return raw
    if not math.isfinite(number):
        raise ValueError(f"filter {text!r}: {raw} is no finite number")
    return number


def _named(literal: bool | float | str) -> str:
    return KINDS[BOOLEAN if isinstance(literal, bool) else NUMBER if isinstance(literal, float) else TEXT]


def lookup(meta: object, field: str) -> object:
    """A field of a .json, by its whole name or else along its dots; None if there is none."""
    if not isinstance(meta, dict):
        return None
    if field in meta:
        return meta[field]
    first, dot, rest = field.partition(".")
    return lookup(meta.get(first), rest) if dot else None
