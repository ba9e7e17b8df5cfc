"""Where a sample's captions are, and which of several it trains with."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from data.captions import clean_caption
from data.draws import uniform


@dataclass(frozen=True)
class CaptionSource:
    """A file of the sample, fields of its .json, or both. weights: by source, where the source called `key` is the file
    with that extension and every other one a field; relative to each other."""

    key: str
    weights: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, key: str, field: str | dict[str, float]) -> "CaptionSource":
        """From the settings `data.caption_key` and `data.caption_field`."""
        if isinstance(field, dict) and field:
            return cls(key, tuple(field.items()))
        return cls(key, ((field or key, 1.0),))

    @property
    def several(self) -> bool:
        return len(self.weights) > 1

    @property
    def fields(self) -> list[str]:
        """The fields of the .json."""
        return [name for name, _ in self.weights if name != self.key]

    @cached_property
    def extensions(self) -> list[str]:
        """Of the files that captions are in."""
        return [self.key] * any(name == self.key for name, _ in self.weights) + ["json"] * bool(self.fields)

    def __str__(self) -> str:
        return " ".join(name for name, _ in self.weights)

    def captions(self, file: bytes, meta: dict) -> dict[str, str]:
        """The usable captions of a sample by source. file: the bytes of the caption file, empty if there is none. Raises
        ValueError, with the first source's reason, if there are none."""
        found, reasons = {}, []
        for name, reason, value in self._values(file, meta):
            try:
                if reason:
                    raise ValueError(reason)
                found[name] = clean_caption(value)
            except ValueError as error:
                reasons.append(error)
        if not found:
            raise reasons[0]
        return found

    def _values(self, file: bytes, meta: dict) -> Iterator[tuple[str, str, object]]:
        for name, _ in self.weights:
            if name == self.key:
                yield name, "", file
            else:
                yield name, "" if name in meta else f"json has no field {name!r}", meta.get(name)

    def known(self, found: dict[str, object]) -> dict[str, object]:
        """Those of the captions whose source it has. Raises ValueError if there are none."""
        known = {name: found[name] for name, _ in self.weights if name in found}
        if not known:
            raise ValueError(f"no caption of {', '.join(name for name, _ in self.weights)} was encoded")
        return known

    def choose(self, found: dict[str, str], seed: int, position: int) -> str:
        """The source of the caption at a global position, among those that the sample has, by their weights."""
        if len(found) == 1:
            return next(iter(found))
        weights = [(name, weight) for name, weight in self.weights if name in found]
        left = uniform(seed, position, "caption") * sum(weight for _, weight in weights)
        for name, weight in weights[:-1]:
            left -= weight
            if left < 0:
                return name
        return weights[-1][0]
