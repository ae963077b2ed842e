"""The reader of a live stream of activations: batches of rows, with a new connection wherever one breaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import torch
from lensmesh.common.v1 import types_pb2
from lensmesh.extraction.v1 import extraction_pb2 as pb
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from services.kit import status
from services.kit.waiting import Backoff
from services.residency.shards import RowBatch

Call = Callable[[pb.StreamActivationsRequest], Iterable[pb.StreamActivationsResponse]]
"""`ExtractionServiceStub.StreamActivations` of a blocking channel, or what stands for it."""

PATIENCE_SECONDS: Final = 300.0
"""How long connections may fail, one after the other, without a message between them."""


class LiveRows:
    """Rows in the order that the request fixes; the same request and cursor give the same rows, also after a restart.

    A connection is opened at the first look at `facts` or at the first batch, and again behind the last row that came
    whenever it breaks. One thread uses it.
    """

    def __init__(self, call: Call, request: pb.StreamActivationsRequest, folder: Path | None = None) -> None:
        """Describe a stream.

        Args:
            call: opens it.
            request: what is streamed; its `cursor`, `offset` and `place` are set here.
            folder: an empty directory that ArtifactStore.staging("stream") gave this reader; without it, or where the
                extractor is on another host, rows come as bytes.
        """
        self._call = call
        self._request = pb.StreamActivationsRequest()
        self._request.CopyFrom(request)
        self._folder = folder
        self._facts: pb.StreamedActivations | None = None
        self._messages: Any = None
        self._cursor = 0
        self._half = bytearray()
        self._failing_since: float | None = None
        self._backoff = Backoff(0.2, 5.0)

    @property
    def facts(self) -> pb.StreamedActivations:
        """Hook points, widths, dtype, rows of one pass.

        Raises:
            errors.LensmeshError: why there is no stream; `Unavailable` when nobody answered for long.
        """
        while self._facts is None:
            self._facts = self._next().facts
        return self._facts

    @property
    def dtype(self) -> str:
        """Number format of the rows: float32, bfloat16 or float16."""
        return types_pb2.Dtype.Name(self.facts.dtype).removeprefix("DTYPE_").lower()

    def iter_rows(self, batch_size: int, start: int = 0) -> Iterator[RowBatch]:
        """Batches of exactly `batch_size` rows, by hook point [B, d], from row `start` on; the last may be smaller.

        Raises:
            errors.LensmeshError: as `facts`.
        """
        self._reach(start)
        parts: list[dict[str, Tensor]] = []
        missing, cursor = batch_size, start
        for first, rows in self._blocks():
            taken = max(0, cursor - first)
            count = len(next(iter(rows.values())))
            while taken < count:
                part = {name: tensor[taken : taken + missing] for name, tensor in rows.items()}
                size = min(missing, count - taken)
                parts.append(part)
                taken, cursor, missing = taken + size, cursor + size, missing - size
                if not missing:
                    yield RowBatch(_joined(parts), cursor)
                    parts, missing = [], batch_size
        if parts:
            yield RowBatch(_joined(parts), cursor)

    def close(self) -> None:
        """Leave the stream; the extractor gives the model and the buffer back."""
        if self._messages is not None and hasattr(self._messages, "cancel"):
            self._messages.cancel()
        self._messages = None
        self._half = bytearray()
        for path in self._folder.iterdir() if self._folder is not None else ():
            path.unlink(missing_ok=True)

    def _reach(self, start: int) -> None:
        if start != self._cursor:
            self.close()
            self._cursor = start

    def _blocks(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """First row and tensors of every block, until the stream ends."""
        names = list(self.facts.hook_points)
        while (message := self._following()) is not None:
            block = message.block
            if block.handle:
                rows = self._mapped(block.handle, names)
            else:
                self._half += block.chunk
                if len(self._half) < block.size_bytes:
                    continue
                rows = load(bytes(self._half))
                self._half = bytearray()
            self._cursor = block.first_row + block.rows
            yield block.first_row, {name: rows[name] for name in names}

    def _mapped(self, handle: str, names: list[str]) -> dict[str, Tensor]:
        """Views of the block's file, which loses its name: that makes room for the next one."""
        assert self._folder is not None, "files were not asked for"
        path = self._folder / Path(handle).name
        with safe_open(path, framework="pt") as file:
            rows = {name: file.get_tensor(name) for name in names}
        path.unlink()
        return rows

    def _following(self) -> pb.StreamActivationsResponse | None:
        """The next block or chunk; None at the stream's end."""
        while True:
            try:
                message = self._next()
            except StopIteration:
                return None
            if message.HasField("block"):
                return message

    def _next(self) -> pb.StreamActivationsResponse:
        """The next message, of a new connection where the old one broke."""
        while True:
            if self._messages is None:
                self._messages = iter(self._call(self._asked()))
            try:
                message = next(self._messages)
            except grpc.RpcError as error:
                self._broken(error)
                continue
            self._failing_since = None
            self._backoff.reset()
            return message

    def _asked(self) -> pb.StreamActivationsRequest:
        self._request.cursor = self._cursor
        self._request.offset = len(self._half)
        self._request.place = self._folder.name if self._folder is not None else ""
        return self._request

    def _broken(self, error: grpc.RpcError) -> None:
        """Wait before the next connection, or give up."""
        now = time.monotonic()
        since = self._failing_since = self._failing_since or now
        if error.code() != grpc.StatusCode.UNAVAILABLE or now - since > PATIENCE_SECONDS:
            raise status.from_rpc_error(error) from error
        self._messages = None
        time.sleep(self._backoff.next())


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
