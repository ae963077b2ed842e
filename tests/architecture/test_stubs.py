from __future__ import annotations

import filecmp
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_committed_stubs_are_what_the_protos_give(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "protos/build.py", tmp_path], check=True, cwd=ROOT)
    made = {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    committed = {
        p.relative_to(ROOT / "protos/gen")
        for p in (ROOT / "protos/gen").rglob("*")
        if p.is_file() and p.suffix != ".pyc"
    }
    assert made == committed
    stale = [str(p) for p in sorted(made) if not filecmp.cmp(tmp_path / p, ROOT / "protos/gen" / p, shallow=False)]
    assert stale == [], "run `python protos/build.py` and commit protos/gen"
