"""Generate the committed stubs, the descriptor set that ships with them, and the image that buf lints, all offline.

`python protos/build.py [OUT]` writes `OUT/lensmesh`, `OUT/buf` (default `protos/gen`) and `build/image.binpb`.
`buf/validate/validate.proto` is in no package as source; protoc gets its descriptor, which protovalidate holds.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

from google.api import annotations_pb2, field_behavior_pb2, http_pb2, httpbody_pb2
from google.protobuf import (
    any_pb2,
    descriptor_pb2,
    duration_pb2,
    empty_pb2,
    field_mask_pb2,
    struct_pb2,
    timestamp_pb2,
)
from protovalidate._gen.buf.validate import validate_pb

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
WELL_KNOWN = (descriptor_pb2, any_pb2, duration_pb2, empty_pb2, field_mask_pb2, struct_pb2, timestamp_pb2)
GOOGLE_API = (http_pb2, annotations_pb2, field_behavior_pb2, httpbody_pb2)


def write_imports(path: Path) -> None:
    """Write the descriptors of everything our protos import."""
    imports = descriptor_pb2.FileDescriptorSet()
    for module in WELL_KNOWN + GOOGLE_API:
        module.DESCRIPTOR.CopyToProto(imports.file.add())
    imports.file.add().ParseFromString(validate_pb.desc().proto.to_binary())
    path.write_bytes(imports.SerializeToString())


def main(out: Path) -> None:
    """Compile every proto below protos/lensmesh."""
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_imports(build / "imports.binpb")
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"--descriptor_set_in={build / 'imports.binpb'}"]
    files = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / "lensmesh").rglob("*.proto"))
    outputs = [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    include = [f"-I{PROTOS}", f"-I{sysconfig.get_paths()['purelib']}"]
    image = ["--include_imports", "--include_source_info", f"--descriptor_set_out={build / 'image.binpb'}"]
    subprocess.run([*protoc, *include, *outputs, *image, *files], check=True)
    subprocess.run([*protoc, f"--python_out={out}", f"--pyi_out={out}", "buf/validate/validate.proto"], check=True)
    own = descriptor_pb2.FileDescriptorSet.FromString((build / "image.binpb").read_bytes())
    shipped = descriptor_pb2.FileDescriptorSet(file=[f for f in own.file if f.name.startswith("lensmesh/")])
    (out / "lensmesh" / "descriptors.binpb").write_bytes(shipped.SerializeToString(deterministic=True))
    for package in {path.parent for path in out.rglob("*_pb2.py")}:
        for folder in (package, *package.parents):
            if folder == out:
                break
            (folder / "__init__.py").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else PROTOS / "gen")
