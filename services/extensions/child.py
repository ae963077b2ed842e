"""A process that trains an extension with others: `python -m services.extensions.child`, one per device."""

from __future__ import annotations

from services.extensions.dialogue import WORDS
from services.residency import gang

if __name__ == "__main__":
    gang.converse("services.extensions.session", WORDS)
