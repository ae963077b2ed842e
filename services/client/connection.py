"""Which mesh a command talks to: named in the environment, or the one that runs in the state directory."""

from __future__ import annotations

import os
from pathlib import Path

from services.client.api import ApiError
from services.client.http import HttpApi
from services.runtime.mesh import read_mesh


def default_state() -> Path:
    """The state directory that LENSMESH_STATE_DIR names, else `~/.lensmesh`."""
    return Path(os.environ.get("LENSMESH_STATE_DIR") or Path.home() / ".lensmesh").absolute()


def connect() -> HttpApi:
    """The gateway of LENSMESH_GATEWAY with LENSMESH_TOKEN, else of the mesh in the state directory.

    Raises:
        ApiError: neither is there.
    """
    gateway, token = os.environ.get("LENSMESH_GATEWAY"), os.environ.get("LENSMESH_TOKEN")
    if gateway and token:
        return HttpApi(gateway, token)
    mesh = read_mesh(default_state())
    if mesh is None:
        raise ApiError(
            "UNREACHABLE",
            f"no mesh runs in {default_state()}: run `lensmesh up`, or set LENSMESH_GATEWAY and LENSMESH_TOKEN",
        )
    return HttpApi(gateway or mesh.gateway, token or mesh.token)
