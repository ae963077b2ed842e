"""Contestants as child processes, and the environment the peers live in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
INSTALLS = (
    ("torch==2.13.0",),
    ("eai-sparsify==1.3.3", "sae-lens==6.54.12"),
    ("--no-deps", "dictionary-learning==0.1.0"),
)
"""torch first: whichever build the index in use offers, the others keep it."""


def peers_python(folder: Path) -> Path:
    """The interpreter of the peers' environment, which is built unless it is there (minutes, some 2 GB)."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True)
        for packages in INSTALLS:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "complete").touch()
    return python


class Worker:
    """One contestant's process."""

    def __init__(
        self, name: str, python: Path, rows: Path, *, steps: int, threads: int, rate: float | None = None
    ) -> None:
        self.name = name
        command = [python, "-m", "tests.bench.training_worker", name, rows, str(steps), str(threads)]
        self._process = subprocess.Popen(
            [*map(str, command), *([str(rate)] if rate else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/protos/gen", "OMP_NUM_THREADS": str(threads)},
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to one command."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def python_of(name: str, peers: Path) -> Path:
    """Ours and the references run where this runs."""
    return Path(sys.executable) if name.startswith(("ours", "plain", "enco")) else peers
