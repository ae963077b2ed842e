"""Extraction: datasets become activation caches."""
