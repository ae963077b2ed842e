"""Files that go past the page cache are what any safetensors reader expects, whatever the file system can do."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file

from services.extraction.adapters import tensor_files
from services.extraction.adapters.files import WorkFolder
from services.extraction.adapters.tensor_files import write_tensors
from services.kit.artifacts import full_disk_named
from services.kit.errors import Exhausted

TENSORS = {
    "blocks.0.hook_mlp_out": torch.randn(1001, 300),
    "every other": torch.randn(50, 600)[:, ::2],
    "Zeichen ä": torch.arange(7, dtype=torch.int32),
    "none": torch.zeros(3, 0),
    "mask": torch.ones(5, dtype=torch.uint8),
    "half": torch.randn(4097).bfloat16(),
    "one": torch.tensor(3.0, dtype=torch.float64),
}


@pytest.fixture(params=["direct", "through the cache"])
def way(request, monkeypatch):
    if request.param == "direct":
        return
    real = os.open

    def refuse(path, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *more)

    monkeypatch.setattr(tensor_files.os, "open", refuse)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", ["several blocks", "less than one"])
def test_any_safetensors_reader_opens_the_file(tmp_path, size):
    tensors = TENSORS | ({"long": torch.randn(3, 100_001)} if size == "several blocks" else {})
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"of an earlier try" * 500_000)
    entry = write_tensors(path, tensors)
    content = path.read_bytes()
    assert (entry.name, entry.size_bytes, entry.digest) == (path.name, len(content), blake3(content).hexdigest())
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
            name: tuple(tensor.shape) for name, tensor in tensors.items()
        }
    assert write_tensors(path, dict(reversed(tensors.items()))) == entry


def test_a_disk_that_is_full_is_told(tmp_path, monkeypatch):
    def full(_, __):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files.os, "write", full)
    with pytest.raises(Exhausted) as refused, full_disk_named():
        write_tensors(tmp_path / "x", TENSORS)
    assert refused.value.reason == "CACHE_FULL"
    assert not [place for place in os.listdir("/proc/self/fd") if str(tmp_path) in _target(place)], "the file is closed"


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""


def test_a_plan_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = WorkFolder(tmp_path, "ext_act_1")
    assert folder.read_plan() is None
    with pytest.raises(FileNotFoundError):
        folder.write_plan({"sizes": np.arange(3, dtype=np.int32)})
    folder.open(7)
    assert (folder.opened_under(7), folder.opened_under(6)) == (True, False)
    kept = {"sizes": np.arange(3, dtype=np.int32), "indices": np.arange(9, dtype=np.int32)}
    folder.write_plan(kept)
    again = folder.read_plan()
    assert {name: array.tolist() for name, array in again.items()} == {n: a.tolist() for n, a in kept.items()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            folder.write_plan({"sizes": np.zeros(1, dtype=np.int32)})
    assert folder.read_plan().keys() == kept.keys()
    (path,) = tmp_path.rglob("plan.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    assert folder.read_plan() is None
    path.write_bytes(b"")
    assert folder.read_plan() is None
    folder.open()
    assert folder.opened_under(7), "who helps leaves the owner's mark"
