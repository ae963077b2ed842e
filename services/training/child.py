"""The process that trains: `python -m services.training.child`, one per job and device."""

from __future__ import annotations

from services.residency import gang
from services.training.dialogue import WORDS


def main() -> None:
    """Train what the first line of standard input says, and answer on standard output."""
    gang.converse("services.training.session", WORDS)


if __name__ == "__main__":
    main()
