"""Filters: what is understood, what is refused in one line, and what a comparison means."""

import pytest
from pydantic import ValidationError

from data.field_column import FieldColumn
from data.filters import Filter, lookup
from data.settings import DataSettings


@pytest.mark.parametrize(
    "text, field, literal",
    [
        ("aesthetic >= 6.25", "aesthetic", 6.25),
        ("nsfw == false", "nsfw", False),
        ("width>=512", "width", 512.0),
        ("NSFW != UNLIKELY", "NSFW", "UNLIKELY"),
        ("a.b-c == 'two words'", "a.b-c", "two words"),
        ("AESTHETIC SCORE < 1e3", "AESTHETIC SCORE", 1000.0),
        ('licence == "false"', "licence", "false"),
    ],
)
def test_expressions(text, field, literal):
    found = Filter.parse(text)
    assert (found.field, found.literal) == (field, literal)
    assert Filter.parse(str(found) if " " not in str(literal) and literal != "false" else text) == found


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must be FIELD OPERATOR VALUE"),
        ("aesthetic", "must be FIELD OPERATOR VALUE"),
        ("aesthetic = 6", "must be FIELD OPERATOR VALUE"),
        ("aesthetic => 6", "must be FIELD OPERATOR VALUE"),
        (">= 6", "must be FIELD OPERATOR VALUE"),
        ("aesthetic >= high", ">= compares numbers, and high is a text"),
        ("nsfw < true", "< compares numbers, and true is true or false"),
        ("width == wide", "width is a number, and wide is a text"),
        ("title == two words", "quote a text of several words"),
        ("title == 'half", "does not end with its quote"),
        ("title == null", "left out in any case"),
        ("score < nan", "no finite number"),
    ],
)
def test_impossible_expressions(text, message):
    with pytest.raises(ValueError, match=message) as raised:
        Filter.parse(text)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValidationError, match=message):
        DataSettings(filters=[text])


@pytest.mark.parametrize(
    "text, has, fulfilled",
    [
        ("x >= 6", "..1.1....", "....1...."),
        ("x != 6", "..1.1....", "..1.1...."),
        ("x == true", "1..1.....", "1........"),
        ("x != true", "1..1.....", "...1....."),
        ("x == yes", ".....11..", ".....1..."),
        ("x != yes", ".....11..", "......1.."),
        ("x == never", ".....11..", "........."),
    ],
)
def test_a_value_of_another_kind_is_no_value(text, has, fulfilled):
    column = FieldColumn.of([True, None, 5, False, 6.5, "yes", "no", [6], {"a": 6}])
    found = ["".join(".1"[int(value)] for value in part) for part in column.fulfilling(Filter.parse(text))]
    assert found == [has, fulfilled]


def test_fields_of_objects():
    meta = {"a": {"b": 1, "c.d": 2}, "a.b": 3, "e.f": {"g": 4}}
    assert [lookup(meta, name) for name in ("a.b", "a.c.d", "a.x", "x", "a")] == [3, 2, None, None, meta["a"]]
    assert lookup([], "a") is None and lookup({"a": 1}, "a.b") is None
