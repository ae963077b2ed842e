"""What may go wrong while the mesh starts; each message is one line for a person."""

from __future__ import annotations


class StartError(Exception):
    """The mesh cannot start; the message is one clear line."""


class AlreadyRunningError(StartError):
    """Another supervisor owns this state directory."""
