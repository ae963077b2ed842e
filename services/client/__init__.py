"""Clients of a running mesh, over HTTP or over generated stubs, and what the command line shows of it."""
