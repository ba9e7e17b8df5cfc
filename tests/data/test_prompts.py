"""Captions from each format, and what is said of files that hold none."""

import json
import pickle
import sys

import pyarrow
import pytest
from pyarrow import parquet

from data.errors import DataError
from data.prompts import Prompt, read_prompts

GENEVAL = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}


@pytest.fixture
def save(tmp_path):
    def write(name: str, content: str | bytes):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_lines(save):
    """Windows' line ends and byte order mark, blank lines, and a character at which str.splitlines would split."""
    raw = b"\xef\xbb\xbf a cat\r\n\r\n  \t\r\na \xc3\xa9t\xc3\xa9\xe2\x80\xa8dog \rlast"
    expected = [Prompt("a cat", "00000"), Prompt("a été\u2028dog", "00001"), Prompt("last", "00002")]
    assert read_prompts(save("a.txt", raw)) == expected
    assert read_prompts(str(save("a.TXT", raw)), key="ignored") == expected


def test_json_lines(save):
    lines = ['"a dog"', "", json.dumps(GENEVAL), '{"Text": "", "caption": " as it is "}']
    found = read_prompts(save("a.jsonl", "\r\n".join(lines)))
    assert texts(found) == ["a dog", "two cats", " as it is "]
    assert [prompt.id for prompt in found] == ["00000", "00001", "00002"]
    assert found[0].meta == {} and found[1].meta == GENEVAL
    other = save("b.jsonl", '{"prompt": "no", "long": "yes"}\n{"long": ""}\n')
    assert texts(read_prompts(other, "long")) == ["yes", ""]


def test_comma_separated(save):
    raw = '\ufeffid,Prompt,text\r\n7,"a ""red"", round\nball",x\r\n\r\n8,été,y\r\n'
    found = read_prompts(save("a.csv", raw))
    assert texts(found) == ['a "red", round\nball', "été"]
    assert found[1] == Prompt("été", "00001", {"id": "8", "Prompt": "été", "text": "y"})
    assert texts(read_prompts(save("b.csv", raw), "text")) == ["x", "y"]


def test_tab_separated_quotes_are_letters(save):
    found = read_prompts(save("parti.tsv", 'Prompt\tNote\n"Hi" says a sign, twice\tText\nbond\t\n'))
    assert texts(found) == ['"Hi" says a sign, twice', "bond"] and found[1].meta == {"Prompt": "bond", "Note": ""}


def test_parquet(tmp_path):
    columns = {
        "image": pyarrow.array([b"\xff", b"\xfe"], pyarrow.binary()),
        "boxes": pyarrow.array([[1], [2, 3]], pyarrow.list_(pyarrow.int64())),
        "number": [4, None],
        "caption": pyarrow.array(["a", "b"]).dictionary_encode(),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert read_prompts(tmp_path / "a.parquet") == [
        Prompt("a", "00000", {"number": 4}),
        Prompt("b", "00001", {"number": None}),
    ]
    with pytest.raises(DataError, match=r"a.parquet, row 0, column 'boxes': a list where a caption"):
        read_prompts(tmp_path / "a.parquet", "boxes")
    with pytest.raises(DataError, match=r"a.parquet, header: no 'nine' among image, boxes, number, caption"):
        read_prompts(tmp_path / "a.parquet", "nine")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet, row 1, column 'text': null where a caption"):
        read_prompts(tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"prompts without captions: .*c.parquet"):
        read_prompts(tmp_path / "c.parquet")


def test_parquet_without_its_package(save, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow$"):
        read_prompts(save("a.parquet", b"PAR1"))


def test_coco_annotations(save):
    """One caption per image: the first by annotation id, in the order of image ids, wherever they stand in the file."""
    notes = [(30, 9, "late"), (12, 9, "first of 9"), (40, 2, "only of 2"), (13, 9, "second"), (50, 10, "of 10")]
    data = {
        "info": {},
        "images": [{"id": 9, "file_name": "9.jpg"}, {"id": 2, "file_name": "2.jpg"}, {"id": 77, "file_name": "none"}],
        "annotations": [{"id": i, "image_id": image, "caption": caption} for i, image, caption in notes],
    }
    found = read_prompts(save("captions_val2014.json", json.dumps(data)))
    assert texts(found) == ["only of 2", "first of 9", "of 10"] and [p.id for p in found] == ["00000", "00001", "00002"]
    assert found[1].meta == {"id": 12, "image_id": 9, "caption": "first of 9", "file_name": "9.jpg"}
    assert found[2].meta == {"id": 50, "image_id": 10, "caption": "of 10"}
    long = {"annotations": [{"id": 1, "image_id": 1, "caption": "short", "long": "long"}]}
    assert texts(read_prompts(save("long.json", json.dumps(long)), "long")) == ["long"]
    data["annotations"][1]["caption"] = None
    with pytest.raises(DataError, match=r"a.json, annotation id 12, key 'caption': null where a caption"):
        read_prompts(save("a.json", json.dumps(data)))
    del data["annotations"][1]["image_id"]
    with pytest.raises(DataError, match=r"a.json, annotation 1: no whole-numbered id"):
        read_prompts(save("a.json", json.dumps(data)))


def test_other_json(save):
    assert texts(read_prompts(save("anime.json", '["b", "a"]'))) == ["b", "a"]
    named = read_prompts(save("named.json", '{"x.png": "b", "annotations": "a"}'))
    assert named == [Prompt("b", "00000", {"name": "x.png"}), Prompt("a", "00001", {"name": "annotations"})]
    assert read_prompts(save("objects.json", json.dumps([GENEVAL]))) == [Prompt("two cats", "00000", GENEVAL)]


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickled_list(save, protocol):
    file = save("all_prompts.pkl", pickle.dumps(["a cat", None, " été "], protocol))
    assert texts(read_prompts(file)) == ["a cat", "", " été "]


class Payload:
    """Pickles as a call that writes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_run_nothing(tmp_path, save, protocol):
    victim = tmp_path / "written"
    raw = pickle.dumps(["a cat", Payload(victim)], protocol)
    pickle.loads(raw)[1].close()
    assert victim.exists()  # it would work
    victim.unlink()
    with pytest.raises(DataError, match=r"all.pkl: is no pickled list of strings \(it refers to \w+.open\)"):
        read_prompts(save("all.pkl", raw))
    assert not victim.exists()


def test_folder_of_texts(tmp_path, save):
    for name, text in {"b.txt": "second\n", "a.1.txt": "\ufefffirst", "._a.txt": "junk", "notes.md": "no"}.items():
        save(f"dpg/{name}", text)
    assert read_prompts(tmp_path / "dpg") == [Prompt("first", "a.1"), Prompt("second", "b")]
    save("dpg/c.txt", " \n")
    with pytest.raises(DataError, match=r"c.txt: the caption is blank"):
        read_prompts(tmp_path / "dpg")
    save("dpg/c.txt", "")
    with pytest.raises(DataError, match=r"c.txt: the file is empty"):
        read_prompts(tmp_path / "dpg")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"prompts without captions: folder .*bare has no \*.txt"):
        read_prompts(tmp_path / "bare")


BROKEN = {
    "unknown format": ("a.yaml", "- a", "a.yaml: unknown format .yaml: use .txt, .jsonl"),
    "no extension": ("captions", "a", r"unknown format \(no extension\)"),
    "empty": ("a.txt", "", "a.txt: the file is empty"),
    "empty table": ("a.csv", "", "a.csv: the file is empty"),
    "empty parquet": ("a.parquet", "", "a.parquet: cannot be read as Parquet"),
    "blank lines": ("a.txt", "\n \n", "prompts without captions: .*a.txt"),
    "blank json lines": ("a.jsonl", "\n\n", "prompts without captions"),
    "empty list": ("a.json", "[]", "prompts without captions"),
    "empty object": ("a.json", "{}", "prompts without captions"),
    "empty coco": ("a.json", '{"annotations": []}', "prompts without captions"),
    "empty pickle": ("a.pkl", pickle.dumps([]), "prompts without captions"),
    "header only": ("a.csv", "prompt,id\n", "prompts without captions"),
    "no column": (
        "a.csv",
        "id,name\n1,x\n",
        "without captions: .*a.csv, header: no 'prompt' or 'caption' or 'text' among",
    ),
    "no field": (
        "a.jsonl",
        '"a"\n\n{"id": 1}',
        "a.jsonl, line 3: no 'prompt' or 'caption' or 'text' among id: set the key",
    ),
    "null line": ("a.jsonl", '"a"\nnull', "a.jsonl, line 2: null where a caption should be"),
    "null field": ("a.jsonl", '{"caption": null}', "line 1, key 'caption': null where a caption should be"),
    "list": ("a.jsonl", '{"text": ["a"]}', "line 1, key 'text': a list where"),
    "object": ("a.json", '{"x": {"prompt": "a"}}', "key 'x': an object where"),
    "number": ("a.json", '["a", 3]', "a.json, entry 1: a number where"),
    "boolean": ("a.json", "[true]", "a boolean where"),
    "json string": ("a.json", '"a"', "a.json: a string: write a list"),
    "broken json": ("a.json", '["a",\n', "a.json, line 2: .*: fix the JSON"),
    "broken json line": ("a.jsonl", '"a"\n{"prompt": ', "a.jsonl, line 2: .*: fix the JSON"),
    "deep json": ("a.json", "[" * 200_000, "a.json, line 1: .*recursion.*: fix the JSON"),
    "surrogate": ("a.json", r'["ab\ud800"]', "entry 0: half a surrogate pair at character 2"),
    "more fields": ("a.csv", "prompt\na cat, a dog\n", "a.csv, line 2: 2 fields, but 1 columns"),
    "fewer fields": ("a.tsv", "id\tprompt\n1\ta\n2\n", "a.tsv, line 3: 1 fields, but 2 columns"),
    "open quote": ("a.csv", 'prompt\n"a cat\n', "a.csv, line 2: .*: fix the table"),
    "not parquet": ("a.parquet", "x" * 100, "a.parquet: cannot be read as Parquet"),
    "pickled string": ("a.pkl", pickle.dumps("a"), "a.pkl: a string where a list of strings"),
    "pickled number": ("a.pkl", pickle.dumps(["a", 1]), "a.pkl, entry 1: a number where"),
    "pickled bytes": ("a.pkl", pickle.dumps([b"a"], 3), "a.pkl, entry 0: a bytes where"),
    "cut pickle": ("a.pkl", pickle.dumps(["a cat"])[:-4], "a.pkl: is no pickled list"),
    "not a pickle": ("a.pkl", "hello", "a.pkl: is no pickled list"),
    **{
        f"latin {form}": (f"a.{form}", "ok\ncaf\u00e9".encode("latin-1"), f"a.{form}, line 2: not UTF-8 at byte 6")
        for form in ("txt", "json", "jsonl", "csv", "tsv")
    },
    "utf-16": ("a.txt", "a cat".encode("utf-16"), "line 1: not UTF-8 at byte 0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_cannot_be_read(save, name):
    file, content, message = BROKEN[name]
    with pytest.raises(DataError, match=message) as error:
        read_prompts(save(file, content))
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    for name in ("a.txt", "a.parquet", "a.pkl"):
        with pytest.raises(DataError, match=f"{name}: No such file or directory"):
            read_prompts(tmp_path / name)
