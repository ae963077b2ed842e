from __future__ import annotations

from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 500


def lines(folders: tuple[str, ...]) -> dict[str, int]:
    return {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }


def test_no_file_is_longer_than_a_noun_needs() -> None:
    too_long = {name: n for name, n in lines(("services", "gateway", "tests", "deploy")).items() if n > MAX_LINES}
    assert too_long == {}


def test_most_files_are_short() -> None:
    assert median(n for n in lines(("services", "gateway")).values() if n > 0) <= 150
