"""Find a model's files: below an allowed root, or on the Hugging Face hub through its own download code."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

import torch
from blake3 import blake3

from services.residency.checkpoint import DTYPES, CheckpointError, Entry, PickleRefused, read_headers, weight_files

MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""What is downloaded of a hub model: no pickles, no code."""
_CHUNK = 16 * 1024 * 1024


class SourceNotFound(LookupError):
    """The identifier names no model here; nothing is said about paths."""


class SourceUnavailable(ConnectionError):
    """The hub does not answer; the same call may work later."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from."""

    kind: Literal["huggingface", "local", "custom"]
    """Custom ones lie below a model root, too, and are of a class that a setting names."""
    identifier: str
    """Hub id, or path relative to a model root."""
    revision: str = ""
    """Hub revision; the default branch when empty."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What can be known of a model without reading its weights."""

    config: dict[str, Any]
    entries: list[Entry]
    """Tensors by the files' headers; empty where the hub does not tell them."""
    digest: str
    """blake3 of the files' content; empty where they are not on this machine."""


def find_local(identifier: str, roots: Sequence[Path]) -> Path:
    """The directory that a local identifier names, looked up in the roots in order, symbolic links resolved.

    Raises:
        SourceNotFound: it is malformed, lies outside every root, or is no directory.
    """
    parts = PurePosixPath(identifier)
    malformed = not parts.parts or len(identifier) > 500 or any(character in identifier for character in "\0\\%")
    if malformed or parts.is_absolute() or ".." in parts.parts:
        raise SourceNotFound("not a path relative to a model root")
    for root in roots:
        base = root.resolve()
        path = (base / identifier).resolve()
        if path.is_relative_to(base) and path != base and path.is_dir():
            return path
    raise SourceNotFound("no such directory below the model roots")


def fetch(
    source: Source, roots: Sequence[Path], cache_dir: Path, tell: Callable[[int, int], None] = lambda *_: None
) -> Path:
    """A directory on this machine with the model's files; a hub model is downloaded unless it is cached.

    Args:
        source: the model.
        roots: where local models lie.
        cache_dir: where hub models are kept.
        tell: takes bytes downloaded and bytes to download, of all files, on any thread; what it raises ends the
            download, which the next one goes on with.

    Raises:
        SourceNotFound: there is no such model, or the token may not read it.
        SourceUnavailable: the hub does not answer and the cache does not have it.
    """
    if source.kind != "huggingface":
        return find_local(source.identifier, roots)
    download = _download(source, cache_dir)
    missing = 0
    with suppress(SourceUnavailable):  # it may be in the cache
        missing = sum(file.file_size for file in download(dry_run=True) if file.will_download)
    return Path(download(tqdm_class=_watched(tell, missing)))


def _download(source: Source, cache_dir: Path) -> Callable[..., Any]:
    """Takes more arguments of `snapshot_download`; raises as `_asking_hub`."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only hub models need it

    return functools.partial(
        _asking_hub,
        snapshot_download,
        source.identifier,
        revision=source.revision or None,
        cache_dir=cache_dir,
        allow_patterns=list(MODEL_FILES),
    )


def _watched(tell: Callable[[int, int], None], total: int) -> type:
    """A progress bar as the hub wants it, which shows nothing; of those that it makes the furthest of bytes is told."""
    from huggingface_hub.utils import tqdm  # noqa: PLC0415

    furthest = 0

    class Watched(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts, self._bytes = kwargs.get("unit") == "B", 0
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal furthest
            if self._counts:
                self._bytes += int(n or 0)
                furthest = max(furthest, self._bytes)
                tell(furthest, max(furthest, total))
            return None

    return Watched


def fetch_folder(source: Source, subfolder: str, roots: Sequence[Path], cache_dir: Path) -> Path:
    """A directory with all files of a folder that is no model, such as a transcoder's; a hub's is downloaded.

    Raises:
        SourceNotFound: there is none, or a name leads out of its root.
        SourceUnavailable: the hub does not answer and the cache does not have it.
    """
    if source.kind != "huggingface":
        return find_local(f"{source.identifier}/{subfolder}" if subfolder else source.identifier, roots)
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only hub folders need it

    pattern = f"{subfolder}/*" if subfolder else "*"
    repository = _asking_hub(
        snapshot_download,
        source.identifier,
        revision=source.revision or None,
        cache_dir=cache_dir,
        allow_patterns=[pattern],
        ignore_patterns=["*.pt", "*.bin", "*.pkl", "*.ckpt"],
    )
    return find_local(subfolder, [Path(repository)]) if subfolder else Path(repository)


def _asking_hub(call: Any, identifier: str, **arguments: Any) -> Any:
    """Call a hub function.

    Raises:
        SourceNotFound, SourceUnavailable, CheckpointError: what its many errors mean.
    """
    from huggingface_hub import errors as hub  # noqa: PLC0415

    # The hub's HTTP library changes with its versions; what it raises is the first base of the hub's own error.
    broken = cast(type[Exception], hub.HfHubHTTPError.__bases__[0])
    try:
        return call(identifier, **arguments)
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as error:
        raise SourceNotFound("the hub has no such model or revision, or it is private") from error
    except hub.EntryNotFoundError as error:
        if isinstance(error, hub.LocalEntryNotFoundError):
            raise SourceUnavailable("the hub does not answer, and the model is not in the cache") from error
        raise SourceNotFound("the hub's model lacks a file that is needed") from error
    except hub.NotASafetensorsRepoError as error:
        raise PickleRefused(
            "the hub's model has no safetensors, and pickles can run code when they are read; use a revision that has "
            "them, or save the model again with model.save_pretrained(directory), which writes safetensors"
        ) from error
    except hub.SafetensorsParsingError as error:
        raise CheckpointError("a safetensors header of the hub's model is not valid") from error
    except (broken, hub.OfflineModeIsEnabled, OSError) as error:
        raise SourceUnavailable("the hub does not answer") from error


def inspect(source: Source, roots: Sequence[Path], cache_dir: Path) -> Contents:
    """Config, headers and content digest; of a hub model that is not on this machine, what the hub tells of it.

    Raises:
        SourceNotFound, SourceUnavailable: see `fetch`.
        CheckpointError: the files are not right.
    """
    if source.kind != "huggingface":
        return _contents(find_local(source.identifier, roots))
    try:
        return _inspect_on_hub(source, cache_dir)
    except SourceUnavailable as away:
        try:  # what was downloaded whole can be used without it
            return _contents(Path(_download(source, cache_dir)(local_files_only=True)))
        except (SourceUnavailable, CheckpointError):
            raise away from None


def _contents(directory: Path) -> Contents:
    return Contents(_read_json(directory / "config.json"), read_headers(directory), digest(directory))


def _inspect_on_hub(source: Source, cache_dir: Path) -> Contents:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download  # noqa: PLC0415

    revision = source.revision or None
    config = _asking_hub(
        hf_hub_download, source.identifier, filename="config.json", revision=revision, cache_dir=cache_dir
    )
    metadata = _asking_hub(get_safetensors_metadata, source.identifier, revision=revision)
    entries = [
        Entry(
            name=name,
            file=file,
            dtype=_dtype(name, tensor.dtype),
            shape=tuple(tensor.shape),
            start=tensor.data_offsets[0],
            nbytes=tensor.data_offsets[1] - tensor.data_offsets[0],
        )
        for file, header in metadata.files_metadata.items()
        for name, tensor in header.tensors.items()
    ]
    return Contents(_read_json(Path(config)), entries, "")


def _dtype(name: str, stored: str) -> torch.dtype:
    if stored not in DTYPES:
        raise CheckpointError(f"{name[:100]!r} is stored as {stored[:20]}, which cannot be read")
    return DTYPES[stored]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} is missing or no JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} is no JSON object")
    return value


def digest(directory: Path) -> str:
    """Hex blake3 over names and contents of config.json and the weight files: what decides what a model computes.

    A file's content is read once as long as its inode, size and time of change stay the same.

    Raises:
        CheckpointError: there are no weight files.
        OSError: a file cannot be read.
    """
    content = blake3()
    for file in [directory / "config.json", *weight_files(directory)]:
        state = file.stat()
        name = file.name.encode()
        own = _file_digest(file, (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns))
        content.update(len(name).to_bytes(8, "little") + name + own)
    return content.hexdigest()


@functools.lru_cache(maxsize=1024)
def _file_digest(file: Path, version: tuple[int, ...]) -> bytes:
    own = blake3(max_threads=blake3.AUTO)
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK):
            own.update(chunk)
    return own.digest()
