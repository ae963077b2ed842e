"""Every error a Lensmesh operation may raise; this module imports nothing, so that domain code can use it.

LensmeshError
├── Invalid                 INVALID_ARGUMENT     a request field is wrong; names the field
├── NotFound                NOT_FOUND            the named resource does not exist
├── AlreadyExists           ALREADY_EXISTS       a unique value is taken
├── Conflict                FAILED_PRECONDITION  the resource is in another state than the call needs
├── Stale                   ABORTED              the caller's etag or fence is out of date
├── Unauthenticated         UNAUTHENTICATED      no token, or one that is not valid
├── Forbidden               PERMISSION_DENIED    the token lacks the scope
├── Exhausted               RESOURCE_EXHAUSTED   memory, quota, queue or disk is full
├── TooLarge                OUT_OF_RANGE         a message or payload is over its limit
├── Unavailable             UNAVAILABLE          a dependency does not answer; try again
├── DeadlineExceeded        DEADLINE_EXCEEDED    the work did not end in time
├── Unsupported             UNIMPLEMENTED        this build or device cannot do it
└── Failed                  INTERNAL             work was tried and failed for a known reason

`reason` is a value name of lensmesh.common.v1.ErrorReason; `metadata` (text to text on the wire) carries the numbers
a client needs; neither ever holds a path, a traceback or a secret.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class LensmeshError(Exception):
    """The operation failed."""

    code = "INTERNAL"
    default_reason = "INTERNAL"

    def __init__(
        self,
        message: str | None = None,
        *,
        reason: str | None = None,
        metadata: Mapping[str, object] | None = None,
        violations: Sequence[tuple[str, str]] = (),
        retry_after: float | None = None,
        transient: bool = False,
    ) -> None:
        """Describe one failure.

        Args:
            message: sentence for a person; the class docstring's first line when left out.
            reason: ErrorReason name; the class's default when left out.
            metadata: facts for a program, for example both sides of a memory comparison.
            violations: (field path, description) pairs of a wrong request.
            retry_after: seconds after which a retry makes sense.
            transient: a job that fails so is tried again.
        """
        self.message = message or (self.__doc__ or "").splitlines()[0]
        super().__init__(self.message)
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after = retry_after
        self.transient = transient


class Invalid(LensmeshError):
    """The request is not valid."""

    code = "INVALID_ARGUMENT"
    default_reason = "VALIDATION_ERROR"

    @classmethod
    def of(cls, field: str, description: str, **metadata: object) -> Invalid:
        """One wrong field; its path and what is wrong with it."""
        return cls(f"{field}: {description}", violations=[(field, description)], metadata=metadata)


class NotFound(LensmeshError):
    """The resource does not exist."""

    code = "NOT_FOUND"
    default_reason = "NOT_FOUND"


class AlreadyExists(LensmeshError):
    """The resource exists already."""

    code = "ALREADY_EXISTS"
    default_reason = "ALREADY_EXISTS"


class Conflict(LensmeshError):
    """The resource is not in a state that allows this."""

    code = "FAILED_PRECONDITION"
    default_reason = "WRONG_STATE"


class Stale(LensmeshError):
    """Somebody else changed the resource first."""

    code = "ABORTED"
    default_reason = "STALE_ETAG"


class Unauthenticated(LensmeshError):
    """A valid bearer token is required."""

    code = "UNAUTHENTICATED"
    default_reason = "UNAUTHENTICATED"


class Forbidden(LensmeshError):
    """The token does not carry the scope this needs."""

    code = "PERMISSION_DENIED"
    default_reason = "SCOPE_MISSING"


class Exhausted(LensmeshError):
    """A limit is reached."""

    code = "RESOURCE_EXHAUSTED"
    default_reason = "QUOTA_EXCEEDED"


class TooLarge(LensmeshError):
    """The message is larger than allowed."""

    code = "OUT_OF_RANGE"
    default_reason = "MESSAGE_TOO_LARGE"


class Unavailable(LensmeshError):
    """A dependency does not answer; try again."""

    code = "UNAVAILABLE"
    default_reason = "UNAVAILABLE"


class DeadlineExceeded(LensmeshError):
    """The work did not end in time."""

    code = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"


class Unsupported(LensmeshError):
    """This build or device cannot do it."""

    code = "UNIMPLEMENTED"
    default_reason = "UNSUPPORTED"


class Failed(LensmeshError):
    """The work was tried and failed."""

    code = "INTERNAL"
    default_reason = "INTERNAL"
