"""The mesh over HTTP: one route per rpc, as the HTTP contract writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx

from services.client.api import ApiError, Event

ROUTES: dict[str, tuple[str, str]] = {
    "CreateModel": ("POST", "/api/models"),
    "ListModels": ("GET", "/api/models"),
    "GetModel": ("GET", "/api/models/{id}"),
    "DeleteModel": ("DELETE", "/api/models/{id}"),
    "LoadModel": ("POST", "/api/models/{id}/load"),
    "UnloadModel": ("POST", "/api/models/{id}/unload"),
    "EstimateModel": ("POST", "/api/models/{id}/estimate"),
    "MeasurePerplexity": ("POST", "/api/models/{id}/perplexity"),
    "GenerateText": ("POST", "/api/models/{id}/generate"),
    "WatchModel": ("GET", "/api/models/{id}/events"),
    "CreateDataset": ("POST", "/api/datasets"),
    "ListDatasets": ("GET", "/api/datasets"),
    "GetDataset": ("GET", "/api/datasets/{id}"),
    "DeleteDataset": ("DELETE", "/api/datasets/{id}"),
    "ListDevices": ("GET", "/api/devices"),
    "ClearDevice": ("POST", "/api/devices/{id=**}/clear"),
    "ListJobs": ("GET", "/api/jobs"),
    "GetJob": ("GET", "/api/jobs/{id}"),
    "CancelJob": ("POST", "/api/jobs/{id}/cancel"),
    "RetryJob": ("POST", "/api/jobs/{id}/retry"),
    "WatchJob": ("GET", "/api/jobs/{id}/events"),
    "ExtractActivations": ("POST", "/api/models/{model_id}/extract-activations"),
    "ListExtractions": ("GET", "/api/extractions"),
    "GetExtraction": ("GET", "/api/extractions/{id}"),
    "PauseExtraction": ("POST", "/api/extractions/{id}/pause"),
    "ResumeExtraction": ("POST", "/api/extractions/{id}/resume"),
    "CancelExtraction": ("POST", "/api/extractions/{id}/cancel"),
    "ListActivationCaches": ("GET", "/api/activation-caches"),
    "GetActivationCache": ("GET", "/api/activation-caches/{id}"),
    "DeleteActivationCache": ("DELETE", "/api/activation-caches/{id}"),
    "VerifyActivationCache": ("POST", "/api/activation-caches/{id}/verify"),
    "CreateTrainingJob": ("POST", "/api/training-jobs"),
    "ListTrainingJobs": ("GET", "/api/training-jobs"),
    "GetTrainingJob": ("GET", "/api/training-jobs/{id}"),
    "GetTrainingConfig": ("GET", "/api/training-jobs/{id}/config"),
    "CloneTrainingJob": ("POST", "/api/training-jobs/{id}/clone"),
    "PauseTrainingJob": ("POST", "/api/training-jobs/{id}/pause"),
    "ResumeTrainingJob": ("POST", "/api/training-jobs/{id}/resume"),
    "CancelTrainingJob": ("POST", "/api/training-jobs/{id}/cancel"),
    "FinalizeTrainingJob": ("POST", "/api/training-jobs/{id}/finalize"),
    "PruneCheckpoints": ("POST", "/api/training-jobs/{id}/checkpoints/prune"),
    "ListTranscoders": ("GET", "/api/transcoders"),
    "GetTranscoder": ("GET", "/api/transcoders/{id}"),
    "DeleteTranscoder": ("DELETE", "/api/transcoders/{id}"),
    "ExportTranscoder": ("POST", "/api/transcoders/{id}/export"),
    "ReadExportedFile": ("GET", "/api/transcoder-exports/{digest}/files/{name}"),
    "GetFeature": ("GET", "/api/transcoders/{id}/features/{feature}"),
    "ImportTranscoder": ("POST", "/api/transcoders/import"),
    "CompareTranscoders": ("POST", "/api/transcoders/compare"),
    "GetEvaluations": ("GET", "/api/evaluations"),
    "EvaluateTranscoder": ("POST", "/api/transcoders/{id}/evaluate"),
    "ListEvaluations": ("GET", "/api/transcoders/{id}/evaluations"),
    "CreateGroup": ("POST", "/api/v2/groups"),
    "ListGroups": ("GET", "/api/v2/groups"),
    "GetGroup": ("GET", "/api/v2/groups/{id}"),
    "GetGroupStatus": ("GET", "/api/v2/groups/{id}/status"),
    "DeleteGroup": ("DELETE", "/api/v2/groups/{id}"),
    "AttachLens": ("POST", "/api/v2/groups/{group_id}/lenses"),
    "DetachLens": ("DELETE", "/api/v2/groups/{group_id}/lenses/{lens_id}"),
    "SwitchLens": ("POST", "/api/v2/groups/{id}/switch"),
    "PreloadGroup": ("POST", "/api/v2/groups/{id}/preload"),
    "AnalyzeText": ("POST", "/api/v2/groups/{id}/analyze"),
    "CreateExtension": ("POST", "/api/extensions"),
    "ListExtensions": ("GET", "/api/extensions"),
    "GetExtension": ("GET", "/api/extensions/{id}"),
    "DeleteExtension": ("DELETE", "/api/extensions/{id}"),
    "TrainExtension": ("POST", "/api/extensions/{id}/train"),
    "ActivateExtension": ("POST", "/api/extensions/{id}/activate"),
    "DeactivateExtension": ("POST", "/api/extensions/{id}/deactivate"),
    "EvaluateExtension": ("POST", "/api/extensions/{id}/evaluate"),
    "GenerateWithExtension": ("POST", "/api/extensions/{id}/generate"),
}
_DEADLINE_SECONDS = 600.0


class HttpApi:
    """The gateway's HTTP API with one user's token."""

    def __init__(self, gateway: str, token: str) -> None:
        """Nothing is sent before the first call.

        Args:
            gateway: base URL.
            token: JWT of the user.
        """
        self._client = httpx.Client(
            base_url=gateway,
            headers={"authorization": f"Bearer {token}", "x-request-timeout": f"{_DEADLINE_SECONDS:g}"},
            timeout=httpx.Timeout(_DEADLINE_SECONDS + 10, connect=5),
            trust_env=False,
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def call(self, rpc: str, **fields: Any) -> dict[str, Any]:
        """See `Api.call`."""
        request = self._request(rpc, fields)
        try:
            response = self._client.send(request)
        except httpx.HTTPError as error:
            raise _unreachable(request, error) from error
        if response.is_error:
            raise _refused(response)
        return response.json() if response.content else {}

    def read(self, rpc: str, **fields: Any) -> Iterator[bytes]:
        """Bytes of a file, piece by piece.

        Raises:
            ApiError: as `call`.
        """
        request = self._request(rpc, fields)
        try:
            response = self._client.send(request, stream=True)
            try:
                if response.is_error:
                    response.read()
                    raise _refused(response)
                yield from response.iter_bytes()
            finally:
                response.close()
        except httpx.HTTPError as error:
            raise _unreachable(request, error) from error

    def watch(self, rpc: str, **fields: Any) -> Iterator[Event]:
        """See `Api.watch`; the stream comes as server-sent events."""
        request = self._request(rpc, {k: v for k, v in fields.items() if k != "after_sequence"})
        request.headers["accept"] = "text/event-stream"
        del request.headers["x-request-timeout"]
        if fields.get("after_sequence"):
            request.headers["last-event-id"] = str(fields["after_sequence"])
        try:
            response = self._client.send(request, stream=True)
            try:
                if response.is_error:
                    response.read()
                    raise _refused(response)
                yield from _events(response.iter_lines())
            finally:
                response.close()
        except httpx.HTTPError as error:
            raise _unreachable(request, error) from error

    def _request(self, rpc: str, fields: dict[str, Any]) -> httpx.Request:
        verb, template = ROUTES[rpc]
        rest = dict(fields)
        path = re.sub(r"{(\w+)(?:=\*\*)?}", lambda match: quote(str(rest.pop(match[1]))), template)
        if verb == "POST":
            return self._client.build_request(verb, path, json=rest)
        return self._client.build_request(verb, path, params={k: _query(v) for k, v in rest.items()})


def _query(value: object) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _refused(response: httpx.Response) -> ApiError:
    try:
        error = response.json()["error"]
        return ApiError(error["code"], error["message"], error.get("details"))
    except (ValueError, KeyError, TypeError):
        return ApiError(f"HTTP_{response.status_code}", response.text[:500])


def _unreachable(request: httpx.Request, error: httpx.HTTPError) -> ApiError:
    said = str(error) or type(error).__name__
    return ApiError("UNREACHABLE", f"{request.url.scheme}://{request.url.netloc.decode()} does not answer: {said}")


def _events(lines: Iterator[str]) -> Iterator[Event]:
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation)."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            fields[name] = f"{fields[name]}\n{value}" if name == "data" and name in fields else value
            continue
        if fields.get("event") == "error":
            error = json.loads(fields["data"])["error"]
            raise ApiError(error["code"], error["message"], error.get("details"))
        if "data" in fields:
            yield Event(fields.get("event", "message"), int(fields.get("id") or 0), json.loads(fields["data"]))
        fields = {}
