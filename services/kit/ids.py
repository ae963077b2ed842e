"""Resource ids: a short prefix that names the kind, then random characters."""

from __future__ import annotations

import re
import secrets


def new_id(prefix: str, slug: str = "") -> str:
    """An id such as `job_3f9c…` or, with a slug, `m_gpt2_3f9c…`; 64 random bits, only `[a-z0-9_]`."""
    words = re.sub(r"[^a-z0-9]+", "_", slug.lower()).strip("_")[:32].strip("_")
    return "_".join(part for part in (prefix, words, secrets.token_hex(8)) if part)
