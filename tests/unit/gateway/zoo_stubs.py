"""The test protos, compiled once per process into a temporary directory."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

from google.protobuf import descriptor_pb2

from protos.build import write_imports

HERE = Path(__file__).parent / "protos"
PROTOS = Path(__file__).parents[3] / "protos"
PACKAGE = "zoo.v1"


@functools.cache
def _compiled() -> Path:
    out = Path(tempfile.mkdtemp(prefix="zoo-"))
    write_imports(out / "imports.binpb")
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"--descriptor_set_in={out / 'imports.binpb'}"),
            *(f"-I{HERE}", f"-I{PROTOS}", f"-I{sysconfig.get_paths()['purelib']}"),
            *(f"--python_out={out}", f"--grpc_python_out={out}"),
            *("--include_source_info", f"--descriptor_set_out={out / 'image.binpb'}"),
            *("zoo/v1/zoo.proto", "broken/v1/broken.proto"),
        ],
        check=True,
    )
    sys.path.append(str(out))
    return out


def module(name: str) -> ModuleType:
    """A generated module, for example `zoo.v1.zoo_pb2`."""
    _compiled()
    return importlib.import_module(name)


def image() -> descriptor_pb2.FileDescriptorSet:
    """The descriptor set with source info."""
    return descriptor_pb2.FileDescriptorSet.FromString((_compiled() / "image.binpb").read_bytes())
