"""Property tests: whatever becomes of the files of a prepared set or benchmark, they are read or refused by name."""

import json
import shutil

import evaluation_files as files
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mige.data.prepare.run import _open
from mige.data.prepare.sources import Settings, SourceError
from mige.evaluation.benchmarks.files import BenchmarkError, Options
from mige.evaluation.benchmarks.prepared import prepare, read

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda some: st.lists(some, max_size=2) | st.dictionaries(st.sampled_from(["rows", "id", "a"]), some, max_size=2),
    max_leaves=3,
)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    prepare("magicbrush", Options(str(files.magicbrush(folder / "data"))), folder / "out")
    return folder / "out"


def cut_or_flipped(data: bytes, place: float, byte: int | None) -> bytes:
    """Cut at a place, or one byte of it another."""
    at = int(place * (len(data) - 1))
    return data[:at] if byte is None else data[:at] + bytes([byte]) + data[at + 1 :]


def read_or_refused(folder):
    try:
        read(folder)
    except BenchmarkError as error:
        assert str(folder) in str(error)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(["benchmark.json", "records.jsonl"]), place=st.floats(0, 1),
       byte=st.none() | st.integers(0, 255))  # fmt: skip
def test_a_damaged_benchmark_is_read_or_refused(benchmark, tmp_path_factory, name, place, byte):
    folder = shutil.copytree(benchmark, tmp_path_factory.mktemp("damaged") / "out")
    (folder / name).write_bytes(cut_or_flipped((folder / name).read_bytes(), place, byte))
    read_or_refused(folder)


@settings(max_examples=60, deadline=None)
@given(key=st.sampled_from(["benchmark", "options", "records", "rows"]), value=JSON)
def test_a_benchmark_of_any_values_is_read_or_refused(benchmark, tmp_path_factory, key, value):
    folder = shutil.copytree(benchmark, tmp_path_factory.mktemp("damaged") / "out")
    told = json.loads((folder / "benchmark.json").read_text())
    (folder / "benchmark.json").write_text(json.dumps(told | {key: value}))
    read_or_refused(folder)


@pytest.mark.parametrize("records", [None, 5, "records.jsonl", [3], ["../records.jsonl"], ["."]], ids=str)
def test_records_that_are_no_files_of_the_folder_are_refused(benchmark, tmp_path, records):
    folder = shutil.copytree(benchmark, tmp_path / "out")
    shutil.copy(folder / "records.jsonl", tmp_path)
    told = json.loads((folder / "benchmark.json").read_text())
    (folder / "benchmark.json").write_text(json.dumps(told | {"records": records}))
    with pytest.raises(BenchmarkError, match=r"out.*prepare it again"):
        read(folder)


@settings(max_examples=100, deadline=None)
@given(
    key=st.sampled_from(["settings", "sizes", "rows", "written", "skipped", "position", "finished", "more"]), value=JSON
)
def test_a_summary_of_any_values_is_resumed_or_refused(tmp_path_factory, key, value):
    folder, ours = tmp_path_factory.mktemp("set"), Settings("instructpix2pix", ("a.parquet",))
    _open(folder, ours)
    told = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(told | {key: value}))
    try:
        _open(folder, ours)
    except SourceError as error:
        assert str(folder) in str(error)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"rows": 1}, "its sizes are of records.jsonl"),
        ({"written": "x"}, "its written is 'x'"),
        ({"skipped": {"a": -1}}, "it counts something by no whole number"),
        ({"position": 3}, "its position is 3"),
    ],
    ids=str,
)
def test_a_summary_that_no_run_writes_is_refused(tmp_path, told, said):
    ours = Settings("instructpix2pix", ("a.parquet",))
    _open(tmp_path, ours)
    whole = json.loads((tmp_path / "summary.json").read_text()) | {"sizes": {"records.jsonl": 0}}
    (tmp_path / "summary.json").write_text(json.dumps(whole | told))
    with pytest.raises(SourceError, match=f"summary.json is damaged or another file .*{said}"):
        _open(tmp_path, ours)
