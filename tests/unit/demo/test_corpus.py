from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.demo.corpus import Corpus, is_held_out, write_corpus

FUNCTION = (
    'def add_{n}(a, b=1):\n    """Add two numbers.\n\n    More.\n    """\n    return a + b\n\n\ndef bare():\n    pass\n'
)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    library = tmp_path / "lib"
    for number in range(60):
        path = library / "package" / f"module_{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# module {number}\n" + FUNCTION.replace("{n}", str(number)) * 20)
    for skipped in ("test/test_it.py", "site-packages/other.py", "package/__pycache__/x.py"):
        (library / skipped).parent.mkdir(parents=True, exist_ok=True)
        (library / skipped).write_text("# skipped\n")
    (library / "broken.py").write_text("def broken(:\n")
    return library


def rows(root: Path, identifier: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (root / identifier).read_text().splitlines()]


def modules_of(texts: list[dict[str, str]], library: Path) -> set[str]:
    everything = "".join(row["text"] for row in texts)
    return {
        path.name
        for path in (library / "package").glob("*.py")
        if path.read_text().splitlines()[0] + "\n" in everything
    }


def test_no_file_is_in_both_splits_and_none_is_lost(tmp_path: Path, library: Path):
    corpus = write_corpus(tmp_path / "root", library)
    train, held_out = (rows(tmp_path / "root", part) for part in (corpus.train, corpus.held_out))
    trained, held = modules_of(train, library), modules_of(held_out, library)
    assert trained | held == {f"module_{number}.py" for number in range(60)}
    assert held == {name for name in trained | held if is_held_out(f"package/{name}")}
    assert not trained & held
    assert trained
    assert held
    assert "skipped" not in json.dumps(train + held_out)


def test_rows_are_whole_lines_of_about_one_context(tmp_path: Path, library: Path):
    corpus = write_corpus(tmp_path / "root", library)
    texts = [row["text"] for row in rows(tmp_path / "root", corpus.train)]
    assert all(text.endswith("\n") for text in texts)
    assert max(map(len, texts)) <= 800
    assert sum(map(len, texts)) / len(texts) > 400


def test_the_task_is_to_write_the_first_line_of_a_docstring(tmp_path: Path, library: Path):
    corpus = write_corpus(tmp_path / "root", library)
    for row in rows(tmp_path / "root", corpus.task_train) + rows(tmp_path / "root", corpus.task_held_out):
        assert row["prompt"].startswith("def add_")
        assert row["prompt"].endswith('(a, b=1):\n    """')
        assert row["target"] == 'Add two numbers."""\n'


def test_the_same_library_gives_the_same_files_and_another_one_others(tmp_path: Path, library: Path):
    first = write_corpus(tmp_path / "one", library)
    assert write_corpus(tmp_path / "two", library) == first
    for name in Corpus.__slots__:
        identifier = getattr(first, name)
        assert (tmp_path / "one" / identifier).read_bytes() == (tmp_path / "two" / identifier).read_bytes()
    (library / "package" / "module_0.py").write_text("# changed\n")
    assert write_corpus(tmp_path / "one", library) != first


def test_what_is_there_already_is_left_alone(tmp_path: Path, library: Path):
    corpus = write_corpus(tmp_path / "root", library)
    before = (tmp_path / "root" / corpus.train).stat()
    assert write_corpus(tmp_path / "root", library) == corpus
    assert (tmp_path / "root" / corpus.train).stat() == before
    assert [path.name for path in (tmp_path / "root").iterdir()] == [Path(corpus.train).parts[0]]
