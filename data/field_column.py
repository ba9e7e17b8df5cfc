"""A field of many samples' .json, as arrays that filters compare."""

from dataclasses import dataclass

import numpy as np

from data.filters import BOOLEAN, NUMBER, OPERATORS, OTHER, TEXT, Filter


@dataclass(frozen=True)
class FieldColumn:
    """A field's values in N samples. kind: uint8 [N]. number: float64 [N], also of true and false. text: of each TEXT, the
    place in `values`, int32 [N]."""

    kind: np.ndarray
    number: np.ndarray
    text: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, found: list[object]) -> "FieldColumn":
        """From the values of a .json's field; None where there is none."""
        kind, number = np.zeros(len(found), np.uint8), np.full(len(found), np.nan)
        text, values = np.full(len(found), -1, np.int32), {}
        for row, value in enumerate(found):
            if value is None:
                continue
            if isinstance(value, str):
                kind[row], text[row] = TEXT, values.setdefault(value, len(values))
            elif isinstance(value, bool | int | float):
                kind[row] = BOOLEAN if isinstance(value, bool) else NUMBER
                number[row] = min(max(value, -1e300), 1e300)
            else:
                kind[row] = OTHER
        return cls(kind, number, text, np.array([value.encode("utf-8", "replace") for value in values], np.bytes_))

    def fulfilling(self, wanted: Filter) -> tuple[np.ndarray, np.ndarray]:
        """Whether the samples have a value of the filter's kind, and whether they fulfil it, bool [N] each."""
        has = self.kind == wanted.kind
        if wanted.kind != TEXT:
            return has, has & wanted.of_numbers(self.number)
        text = wanted.literal.encode("utf-8", "replace")
        number = next((i for i, value in enumerate(self.values) if value == text), -2)
        return has, has & OPERATORS[wanted.operator](self.text, number)
