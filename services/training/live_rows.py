"""A live stream of activations as the trainer's source: the extraction service computes them while they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lensmesh.extraction.v1 import extraction_pb2, extraction_pb2_grpc

from services.kit.channels import open_blocking_channel
from services.kit.config import Settings
from services.residency.live import LiveRows
from services.training.cache_rows import figures_of_rows
from services.training.compute.batches import Pairs
from services.training.dialogue import Live


class LiveSource:
    """Implements `Source`; the stream's position is the data cursor, and its request's seed decides the order."""

    def __init__(self, live: Live, pairs: Mapping[str, tuple[str, str]]) -> None:
        """Open a stream.

        Args:
            live: of what, and from where.
            pairs: by pair's name, the hook points of its inputs and its targets.

        Raises:
            errors.LensmeshError: why there is none; `Unavailable` when nobody answered for long.
        """
        roots = Path(live.tls_ca_file) if live.tls_ca_file else None
        channel = open_blocking_channel(live.address, Settings(state_dir=Path(live.state_dir), tls_ca_file=roots))
        call = extraction_pb2_grpc.ExtractionServiceStub(channel).StreamActivations
        self._stream, self._pairs = LiveRows(call, stream_request(live), Path(live.folder)), pairs
        facts = self._stream.facts
        self._rows, width = facts.rows_per_pass, dict(zip(facts.hook_points, facts.widths, strict=True))
        self._widths = {name: (width[x], width[y]) for name, (x, y) in pairs.items()}

    @property
    def rows(self) -> int:
        """Of one pass."""
        return self._rows

    @property
    def widths(self) -> Mapping[str, tuple[int, int]]:
        """Widths by pair."""
        return self._widths

    def batches(self, batch_size: int, seed: int, start: int) -> Iterator[Pairs]:
        """In the stream's order; `seed` is the request's already."""
        for batch in self._stream.iter_rows(batch_size, start):
            yield {name: (batch.rows[x], batch.rows[y]) for name, (x, y) in self._pairs.items()}

    def facts_of(self, pair: str, rows: int, seed: int, start: int) -> dict[str, Any]:
        """Figures of the `rows` rows after `start`."""
        return {"position": start, **figures_of_rows(*next(self.batches(rows, seed, start))[pair])}


def stream_request(live: Live) -> extraction_pb2.StreamActivationsRequest:
    """Rows without end."""
    return extraction_pb2.StreamActivationsRequest(
        extraction=extraction_pb2.ExtractActivationsRequest(
            model_id=live.model_id, dataset_id=live.dataset_id, hook_points=live.hook_points, seed=live.seed
        )
    )
