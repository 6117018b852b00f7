"""Sources give records, or say what is wrong and where."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jax_ccm.data.sources import open_sources
from jax_ccm.errors import UserError
from tests.data.support import dialogues, write


def test_jsonl(tmp_path):
    records = [*dialogues(3, 4), {"turns": ["a\u2028b", "é"], "note": "other fields are ignored"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records[:2]) + "\n\n" + json.dumps(records[2]))
    (source,) = open_sources([str(path)], "dialogue")
    assert [source[i] for i in range(len(source))] == records
    assert source.where(2) == f"{path}:4"


@pytest.mark.parametrize(
    ("line", "format", "says"),
    [
        ('{"turns": ["a", "b"', "dialogue", r"not JSON \(Expecting .* column 20\)"),
        ('["a", "b"]', "dialogue", "this is a list"),
        ('{"text": "a"}', "dialogue", "no field 'turns'.*its fields: text"),
        ('{"turns": "a"}', "dialogue", "must be a list of strings"),
        ('{"turns": ["a", 3]}', "dialogue", "must be a list of strings"),
        (
            '{"turns": ["a", "cut \\ud83d"]}',
            "dialogue",
            r"item 1 of field 'turns' holds half a character .*ud83d at place 4",
        ),
        ('{"turns": ["a"], "turns": ["b"]}', "dialogue", "gives field 'turns' twice"),
        ('{"turns": ' + "9" * 5000 + "}", "dialogue", "must be a list of strings, it is inf"),
        ('{"turns": NaN}', "dialogue", "must be a list of strings, it is nan"),
        ('{"turns": ["a"], "x": ' + "[" * 100_000 + "}", "dialogue", "nested too deep"),
        ('{"turns": ' + "[" * 200 + "]" * 200 + "}", "dialogue", "must be a list of strings"),
        ('{"text": "a", "label": 1}', "fewshot", "field 'label' must be a string, it is 1"),
        ('{"contexts": [], "query": "a", "target": "b", "choices": ["c"]}', "online", "'b' is not among the choices"),
    ],
)
def test_malformed_records_name_file_and_line(tmp_path, line, format, says):
    good = {
        "dialogue": {"turns": ["a", "b", "c"]},
        "fewshot": {"text": "a", "label": "b"},
        "online": {"contexts": ["a"], "query": "b", "target": "c"},
    }[format]
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(UserError, match=rf"bad\.jsonl:2: .*{says}"):
        open_sources([str(path)], format)


def test_fields_that_nobody_reads_may_hold_anything(tmp_path):
    odd = '"a": ' + "9" * 5000 + ', "b": NaN, "b": -Infinity, "c": "\\ud83d", "\\ud83d": 1e999, "d": "\\ud83d\\ude00"'
    path = tmp_path / "a.jsonl"
    path.write_text('{"turns": ["x \\ud83d\\ude00"], ' + odd + "}")
    (source,) = open_sources([str(path)], "dialogue")
    assert source[0]["turns"] == ["x 😀"]


def test_byte_order_marks_and_line_ends(tmp_path):
    """Neither is text: of a file, of files that were put together, of Windows."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    (source,) = open_sources([str(tmp_path / "a.txt")], "text")
    assert source[0] == {"text": "one\ntwo\nthree"}
    line = b'{"text": "\xc3\xa9"}\r\n'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\xef\xbb\xbf" + line + b"\xef\xbb\xbf\r\n")
    (source,) = open_sources([str(tmp_path / "a.jsonl")], "text")
    assert [source[i] for i in range(len(source))] == [{"text": "é"}] * 2 and source.where(1).endswith("a.jsonl:3")
    (tmp_path / "b.txt").write_bytes(b"fine\nnot \xff")
    with pytest.raises(UserError, match=r"b\.txt:2: not UTF-8 text \(byte 9 of the file\)"):
        open_sources([str(tmp_path / "b.txt")], "text")
    (tmp_path / "b.jsonl").write_bytes(line + b'{"text": "\xff"}')
    with pytest.raises(UserError, match=r"b\.jsonl:2: not UTF-8 text \(byte 10\)"):
        open_sources([str(tmp_path / "b.jsonl")], "text")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "turns", "a"]), inner),
    max_leaves=8,
)


FILES = (
    st.binary(max_size=40)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.text(st.sampled_from('{}[]":,\\ud8text1')).map(str.encode)
)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(FILES)
def test_any_file_is_read_or_refused_with_its_line(tmp_path, content):
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + content)
    try:
        (source,) = open_sources([str(path)], "text")
    except UserError as error:
        assert re.search(r"fuzz\.jsonl:\d+: ", str(error))
    else:
        assert all(source[i]["text"].encode() is not None for i in range(len(source)))


def test_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (folder,) = open_sources([str(tmp_path)], "text")
    assert [folder[0], folder[1]] == [{"text": "first"}, {"text": "second"}]
    (single,) = open_sources([str(tmp_path / "b.txt")], "text")
    assert len(single) == 1
    for name in ("y", "x"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", dialogues(3))
    many = open_sources([str(tmp_path / "*" / "train.jsonl")], "dialogue")
    assert [source.name for source in many] == [str(tmp_path / name / "train.jsonl") for name in ("x", "y")]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: d / "missing.jsonl", "does not exist"),
        (lambda d: d / "*.jsonl", "no file matches"),
        (lambda d: d / "empty.jsonl", "holds no records"),
        (lambda d: d / "data.csv", r"'\.csv'; allowed are"),
        (lambda d: d / "folder", "without .txt files"),
        (lambda d: d / "latin.jsonl", r"not UTF-8 text \(byte 0\)"),
    ],
)
def test_unusable_sources(tmp_path, make, says):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    if "*" in str(make(tmp_path)):
        (tmp_path / "empty.jsonl").unlink()
        (tmp_path / "latin.jsonl").unlink()
    with pytest.raises(UserError, match=says):
        open_sources([str(make(tmp_path))], "dialogue")


def test_no_source():
    with pytest.raises(UserError, match="no data source was given"):
        open_sources([], "dialogue")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("generated:conversation", "did you mean 'conversations'"),
        ("generated:recall?split=train", "records for format 'recall', but data.format is 'dialogue'"),
        ("generated:conversations?sice=3", "did you mean 'size'"),
        ("generated:conversations?size=0", "at least 1"),
        ("generated:conversations?size=1.5", "whole number"),
        ("generated:conversations?split=dev", "unknown split"),
        ("generated:conversations?turns=2-4", "from 3 to 30"),
        ("generated:conversations?size", "cannot read its options"),
        ("generated:conversations?size=1&size=2", "gives an option twice"),
    ],
)
def test_generated_options(source, says):
    with pytest.raises(UserError, match=says):
        open_sources([source], "dialogue")


def test_generated():
    (source,) = open_sources(["generated:conversations?split=test&size=5&seed=3&turns=4,6"], "dialogue")
    assert len(source) == 5
    assert {len(source[i]["turns"]) for i in range(5)} <= {4, 6}
    with pytest.raises(IndexError):
        source[5]


TFDS = """
import sys
import numpy as np, tensorflow_datasets as tfds
class TinyChat(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "turns": tfds.features.Sequence(tfds.features.Text()), "sentence": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["bad", "good"])}))
    def _split_generators(self, dl):
        return {"train": self._generate_examples(0, 6), "test": self._generate_examples(6, 8)}
    def _generate_examples(self, a, b):
        for i in range(a, b):
            yield f"k{i}", {"turns": [f"turn {j} é" for j in range(3 + i % 2)], "sentence": f"s{i}", "label": i % 2}
TinyChat(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    script = folder / "prepare.py"
    script.write_text(TFDS)
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True, text=True)
    return folder


# The library itself warns about its own dependencies.
@pytest.mark.filterwarnings("ignore")
def test_tfds_without_tensorflow(prepared):
    (source,) = open_sources([f"tfds:tiny_chat:train?data_dir={prepared}"], "dialogue")
    turns = sorted((source[i]["turns"] for i in range(len(source))), key=len)
    assert len(source) == 6 and turns[0] == ["turn 0 é", "turn 1 é", "turn 2 é"] and len(turns[-1]) == 4
    (tasks,) = open_sources([f"tfds:tiny_chat:test?data_dir={prepared}&text=sentence"], "fewshot")
    assert sorted((tasks[i]["text"], tasks[i]["label"]) for i in range(2)) == [("s6", "bad"), ("s7", "good")]
    (part,) = open_sources([f"tfds:tiny_chat:train[:2]?data_dir={prepared}"], "dialogue")
    assert len(part) == 2
    assert "tensorflow" not in sys.modules
    assert np.shape(part[0]["turns"])  # plain lists of str


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("tfds:tiny_chat:validation?data_dir={0}", "cannot be opened from"),
        ("tfds:imdb_reviews:train?data_dir={0}", "tfds build imdb_reviews --file_format=array_record"),
        ("tfds:no_such_set:train?data_dir={0}", "cannot be opened from"),
        ("tfds:tiny_chat?data_dir={0}", r"write tfds:NAME\[/CONFIG\]:SPLIT"),
        ("tfds:tiny_chat:train?dta_dir={0}", "did you mean 'data_dir'"),
        ("tfds:tiny_chat:train?data_dir={0}&turns=none", "no field 'turns'"),
    ],
)
def test_tfds_errors(prepared, source, says):
    with pytest.raises(UserError, match=says):
        (opened,) = open_sources([source.format(prepared)], "dialogue")
        opened[0]
