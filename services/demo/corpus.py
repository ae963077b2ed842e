"""The demo's text: this machine's Python standard library, split into train and held-out by a hash of the path."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_ROW_CHARACTERS = 800
"""About 256 tokens of the demo model: a longer row would be cut by its context."""
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Corpus:
    """Four jsonl files below a dataset root; identifiers are relative to it."""

    train: str
    """Rows with `text`."""
    held_out: str
    task_train: str
    """Rows with `prompt`, a function's signature, and `target`, the first line of its docstring."""
    task_held_out: str


def write_corpus(root: Path, library: Path | None = None) -> Corpus:
    """Write the four files unless they are there already; the directory's name holds a digest of the sources.

    Args:
        root: a dataset root of the mesh.
        library: directory of the sources; the running interpreter's standard library when None.

    Raises:
        OSError: the root cannot be written.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    sources = {path: _read(library / path) for path in _files(library)}
    digest = hashlib.sha256(f"{_ROW_CHARACTERS} {_HELD_OUT_SHARE}".encode())
    for path, text in sources.items():
        digest.update(f"{path} {len(text)} {text}".encode())
    directory = f"stdlib-{digest.hexdigest()[:12]}"
    if not (root / directory).exists():
        _publish(root, directory, _split(sources))
    names = ("train.jsonl", "held-out.jsonl", "docstrings-train.jsonl", "docstrings-held-out.jsonl")
    return Corpus(*(f"{directory}/{name}" for name in names))


def _split(sources: dict[str, str]) -> dict[str, str]:
    files = {}
    for part, held_out in (("train", False), ("held-out", True)):
        chosen = {path: text for path, text in sources.items() if is_held_out(path) == held_out}
        files[f"{part}.jsonl"] = _jsonl({"text": text} for text in _rows(chosen))
        files[f"docstrings-{part}.jsonl"] = _jsonl(_docstrings(chosen))
    return files


def is_held_out(path: str) -> bool:
    """Whether the file with this path, relative to the library, is never trained on."""
    return hashlib.sha256(path.encode()).digest()[0] / 256 < _HELD_OUT_SHARE


def _files(library: Path) -> list[str]:
    found = (path.relative_to(library) for path in library.rglob("*.py"))
    return sorted(path.as_posix() for path in found if not _SKIPPED & set(path.parts))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def _rows(sources: dict[str, str]) -> Iterator[str]:
    """Pieces of whole lines, in an order that a hash decides, so that the first thousand rows are a fair sample."""
    pieces: list[tuple[str, int, str]] = []
    for path, text in sources.items():
        piece = ""
        for line in text.splitlines(keepends=True):
            if piece and len(piece) + len(line) > _ROW_CHARACTERS:
                pieces.append((path, len(pieces), piece))
                piece = ""
            piece += line
        if piece.strip():
            pieces.append((path, len(pieces), piece))
    for _, _, piece in sorted(pieces, key=lambda one: hashlib.sha256(f"{one[0]}:{one[1]}".encode()).digest()):
        yield piece


def _docstrings(sources: dict[str, str]) -> Iterator[dict[str, str]]:
    for text in sources.values():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in somebody else's source
                tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            said = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if said and isinstance(node, ast.FunctionDef):
                prompt = f'def {node.name}({ast.unparse(node.args)}):\n    """'
                yield {"prompt": prompt, "target": said.splitlines()[0] + '"""\n'}


def _jsonl(rows: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _publish(root: Path, directory: str, files: dict[str, str]) -> None:
    """Make the directory appear whole; another run that was faster wins."""
    root.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".staged-", dir=root))
    try:
        for name, content in files.items():
            (staged / name).write_text(content, encoding="utf-8")
        staged.chmod(0o755)
        staged.rename(root / directory)
    except OSError:
        if not (root / directory).exists():
            raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
