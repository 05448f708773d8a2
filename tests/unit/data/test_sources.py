"""Which files a path means, and the stems that line-derived ids start with."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytower.data.config import InputConfig
from raytower.data.sources import find_files, refuse_output_inside, refuse_several_splits
from raytower.errors import InputError
from tests.support.data_files import read, survey_of, write


def test_folder_takes_data_files_in_name_order_and_names_the_others(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "README.md", "_SUCCESS", ".hidden.txt", "_tmp/x.txt", "manifest.json"):
        write(tmp_path / name, name)
    assert [row["text"] for row in read(tmp_path, "corpus")] == ["a/z.txt", "b.txt"]
    hidden = "its name or a folder's begins with . or _"
    assert find_files(str(tmp_path)).ignored == (
        f"{tmp_path}/.hidden.txt ({hidden})",
        f"{tmp_path}/README.md (its extension is no data file's)",
        f"{tmp_path}/_tmp/x.txt ({hidden})",
        f"{tmp_path}/manifest.json (it is about other files)",
    )


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["top.txt"]),
        ("*/part-?.txt", ["a/part-1.txt", "a/part-2.txt", "b/part-1.txt"]),
        ("a/part-[2-9].*", ["a/part-2.txt"]),
        ("**/part-1.txt", ["a/part-1.txt", "b/part-1.txt"]),
        ("**/*.txt", ["a/part-1.txt", "a/part-2.txt", "b/part-1.txt", "top.txt"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for name in ("a/part-1.txt", "a/part-2.txt", "b/part-1.txt", "top.txt"):
        write(tmp_path / name, name)
    found = find_files(f"{tmp_path}/{pattern}").files
    assert [str(Path(str(file)).relative_to(tmp_path)) for file in found] == expected
    uri = find_files(f"file://{tmp_path}/{pattern}").files
    assert [file.location.path for file in uri] == [file.location.path for file in found]


def test_a_file_whose_name_has_wildcards_is_that_file(tmp_path: Path) -> None:
    write(tmp_path / "c1.txt", "other")
    assert [row["text"] for row in read(write(tmp_path / "c[1].txt", "this"), "corpus")] == ["this"]


def test_equal_stems_grow_until_ids_are_unique(tmp_path: Path) -> None:
    for name in ("a/part.txt", "b/part.txt", "b/part.tsv", "alone.txt"):
        write(tmp_path / name, "x\n")
    assert [row["id"] for row in read(tmp_path, "corpus")] == [
        "a/part:1",
        "alone:1",
        "b/part.tsv:1",
        "b/part.txt:1",
    ]


@pytest.mark.parametrize(
    ("name", "stem"),
    [("corpus.tsv", "corpus"), ("corpus.tsv.gz", "corpus"), ("v1.2.txt", "v1.2"), ("plain", "plain")],
)
def test_stem_is_the_name_without_data_extensions(tmp_path: Path, name: str, stem: str) -> None:
    (file,) = find_files(str(write(tmp_path / name, "x"))).files
    assert file.stem == stem


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file or folder at '.*nowhere'; check the path"):
        survey_of(tmp_path / "nowhere", "corpus")
    with pytest.raises(InputError, match=r"no file matches '.*\*\.txt'; check the pattern"):
        survey_of(tmp_path / "*.txt", "corpus")


def test_an_output_inside_the_input_is_seen_behind_any_name(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.tsv").write_text("a\tb\n")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for output in ("in/sub/../a.tsv", "link/a.tsv", "link/new", "in/../in/new/deep"):
        for path in ("in", "link", "./link/../in"):
            with pytest.raises(InputError, match="lies inside the input"):
                refuse_output_inside(str(tmp_path / output), f"{tmp_path}/{path}")
    refuse_output_inside(f"{tmp_path}/in/../out", f"{tmp_path}/in")


def test_an_output_that_a_glob_matches_is_seen(tmp_path: Path) -> None:
    """Only globs with `**` were looked at, so that a job read its own output when it ran again."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tsv").write_text("a\tb\n")
    for output, pattern in (
        ("in/out.tsv", "in/*.tsv"),
        ("in/out.tsv", "*/out.[st]sv"),
        ("in/deep/out", "in/**/*.tsv"),
    ):
        with pytest.raises(InputError, match="lies inside the input"):
            refuse_output_inside(str(tmp_path / output), f"{tmp_path}/{pattern}")
    refuse_output_inside(f"{tmp_path}/in/out.jsonl", f"{tmp_path}/in/*.tsv")
    refuse_output_inside(f"{tmp_path}/in/deep/out.tsv", f"{tmp_path}/in/*.tsv")
    refuse_output_inside(f"{tmp_path}/in/embeddings", f"{tmp_path}/in/*", is_folder=True)


def test_folder_without_data_files(tmp_path: Path) -> None:
    write(tmp_path / "notes.md", "x")
    with pytest.raises(InputError, match=r"holds no data file \(looked for .*\.jsonl.*glob"):
        survey_of(tmp_path, "corpus")


def test_mixed_formats_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "x"}\n')
    write(tmp_path / "b.txt", "x\n")
    with pytest.raises(
        InputError, match=r"mixes formats: .*a\.jsonl is jsonl, .*b\.txt is lines; name the files"
    ):
        survey_of(tmp_path, "corpus")
    assert [row["id"] for row in read(tmp_path, "corpus", format="jsonl")] == ["a:1"]


def test_compressed_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"compressed parquet file; such files compress inside"):
        survey_of(write(tmp_path / "x.parquet.gz", b"x"), "corpus")


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"a text\n", {"id": "data:1", "text": "a text"}), (b"i\tt\n", {"id": "i", "text": "t"})],
)
def test_files_without_extension_are_looked_at(
    tmp_path: Path, content: bytes, expected: dict[str, str]
) -> None:
    assert read(write(tmp_path / "data", content), "corpus") == [expected]


def test_json_and_parquet_without_extension(tmp_path: Path) -> None:
    assert read(write(tmp_path / "j", '{"id": "1", "text": "x"}'), "lines") == [{"id": "1", "text": "x"}]
    pq.write_table(pa.table({"id": ["1"], "text": ["x"]}), tmp_path / "p")
    assert read(tmp_path / "p", "lines") == [{"id": "1", "text": "x"}]


def test_a_path_alone_is_an_input() -> None:
    assert InputConfig.model_validate("corpus/*.tsv") == InputConfig(path="corpus/*.tsv")


class TestSeveralSplits:
    """A folder of train, dev and test files was read as one: the test rows were trained."""

    @pytest.mark.parametrize(
        "names",
        [
            ("train.tsv", "dev.tsv", "test.tsv"),
            ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"),
            ("Train.jsonl.gz", "val.jsonl.gz"),
            ("faq_train.csv", "faq_eval.csv"),
            ("LCQMC.train.tsv", "LCQMC.valid.tsv"),
            ("train/0000.parquet", "validation/0000.parquet"),
            ("训练集.tsv", "测试集.tsv"),
        ],
    )
    def test_it_is_refused_with_its_files_and_a_remedy(self, tmp_path: Path, names: tuple[str, ...]) -> None:
        for name in names:
            write(tmp_path / "data" / name, "x")
        with pytest.raises(InputError, match="more than one split") as refused:
            refuse_several_splits(str(tmp_path / "data") + "/")
        for name in (*names, f"such as '{tmp_path}/data/{names[0]}', or a glob"):
            assert name in str(refused.value)

    @pytest.mark.parametrize(
        "names",
        [
            ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"),
            ("trainers.tsv", "tests.tsv", "devices.tsv"),
            ("train.tsv", "more.tsv"),
            ("a.tsv", "b.tsv"),
            ("train.tsv", "README.md", "_test.tsv"),
        ],
    )
    def test_other_folders_are_read(self, tmp_path: Path, names: tuple[str, ...]) -> None:
        for name in names:
            write(tmp_path / "data" / name, "x")
        refuse_several_splits(str(tmp_path / "data"))

    def test_a_glob_and_a_file_are_taken_by_their_word(self, tmp_path: Path) -> None:
        for name in ("train.tsv", "test.tsv"):
            write(tmp_path / "data" / name, "x")
        refuse_several_splits(str(tmp_path / "data" / "*"))
        refuse_several_splits(str(tmp_path / "data" / "train.tsv"))
        refuse_several_splits(str(tmp_path / "nothing"))
