"""The table between our errors and gRPC statuses, both ways: the only place that knows google.rpc details."""

from __future__ import annotations

import uuid

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.kit import errors

DOMAIN = "lensmesh"
_BY_CODE: dict[str, type[errors.LensmeshError]] = {
    cls.code: cls
    for cls in (
        errors.Failed, errors.Invalid, errors.NotFound, errors.AlreadyExists, errors.Conflict, errors.Stale,
        errors.Unauthenticated, errors.Forbidden, errors.Exhausted, errors.TooLarge, errors.Unavailable,
        errors.DeadlineExceeded, errors.Unsupported,
    )
}  # fmt: skip


def to_status(error: errors.LensmeshError) -> status_pb2.Status:
    """The status with ErrorInfo, and BadRequest, RetryInfo or QuotaFailure where they apply."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    for name, value in error.metadata.items():
        info.metadata[name] = str(value)
    details = [info]
    if error.violations:
        fields = [error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in error.violations]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.reason in ("QUOTA_EXCEEDED", "QUEUE_FULL"):
        violation = error_details_pb2.QuotaFailure.Violation(subject=error.reason, description=error.message)
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=getattr(grpc.StatusCode, error.code).value[0], message=error.message, details=packed)


def unknown() -> tuple[str, errors.LensmeshError]:
    """An opaque id for the logs, and the error that carries nothing but it."""
    opaque = uuid.uuid4().hex[:12]
    return opaque, errors.Failed(f"internal error {opaque}", metadata={"error_id": opaque})


def from_rpc_error(error: grpc.aio.AioRpcError) -> errors.LensmeshError:
    """What a failed call to another service means, as the error that service raised."""
    code = error.code()
    if code is grpc.StatusCode.CANCELLED:
        return errors.Unavailable("the call was cancelled", reason="CANCELLED")
    cls = _BY_CODE.get(code.name, errors.Failed)
    status = rpc_status.from_call(error)
    if status is None:
        if cls is errors.Unavailable:
            return errors.Unavailable("a service of the mesh does not answer", retry_after=1.0, transient=True)
        if cls is errors.Exhausted and "larger than max" in (error.details() or ""):
            return errors.TooLarge("the message is larger than a service takes or gives")
        return cls(error.details() if code is grpc.StatusCode.DEADLINE_EXCEEDED else None)
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        for message in (info, bad_request, retry):
            detail.Unpack(message)
    return cls(
        status.message,
        reason=info.reason or None,
        metadata=dict(info.metadata),
        violations=[(v.field, v.description) for v in bad_request.field_violations],
        retry_after=retry.retry_delay.ToMilliseconds() / 1000 if retry.HasField("retry_delay") else None,
        transient=cls is errors.Unavailable,
    )
