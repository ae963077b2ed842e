"""What a tracker's own files hold of a run; knows nothing of Lensmesh. `tracked.py TRACKER FOLDER PROJECT RUN`.

Prints {step: {name: value}} as JSON.
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER = 32_768, 7
FULL, FIRST, _, LAST = range(1, 5)


def of_wandb(folder: Path, run: str) -> dict[int, dict[str, float]]:
    """From the transaction log that `wandb sync` would send."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.rglob(f"run-{run}.wandb")
    found = {}
    for data in records(file.read_bytes()):
        items = Record.FromString(data).history.item
        values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
        if values:
            found[int(values["_step"])] = values
    return found


def records(content: bytes) -> Iterator[bytes]:
    """Of a file in LevelDB's log format, behind wandb's own seven bytes."""
    place, parts = HEADER, []
    while place + HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER:  # the end of a block is filled up
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        parts = ([] if kind in (FULL, FIRST) else parts) + [content[place + HEADER : place + HEADER + size]]
        place += HEADER + size
        if kind in (FULL, LAST):
            yield b"".join(parts)


def of_trackio(project: str, run: str) -> dict[int, dict[str, float]]:
    """From its database, through its own reader; TRACKIO_DIR says where that is."""
    from trackio.sqlite_storage import SQLiteStorage

    return {int(point["step"]): point for point in SQLiteStorage.get_logs(project, run)}


def main() -> None:
    tracker, folder, project, run = sys.argv[1:]
    found = of_wandb(Path(folder), run) if tracker == "wandb" else of_trackio(project, run)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
