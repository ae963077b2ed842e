"""Settings of the registry."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from services.kit.config import Settings


class RegistrySettings(Settings):
    """Limits of placement and of users; spec/003's figures are the defaults."""

    loads_per_hour: Annotated[int, Field(ge=0)] = 10
    """Model loads that one user may start within an hour; the token claim of the same name replaces it."""
    max_concurrent_loads: Annotated[int, Field(ge=1)] = 2
    """Loads that run at the same time in the whole mesh; the others wait as queued jobs."""
    max_resident_models: Annotated[int, Field(ge=1)] = 3
    """Models that one host process holds at the same time."""
    minimum_residency: Annotated[float, Field(ge=0)] = 600.0
    """Seconds for which a model that has come to a device leaves it after all others, and for no preload."""
    duplicate_at: Annotated[int, Field(ge=0)] = 0
    """Forwards that run or wait on a model at once from which it is loaded on an idle device as well; never when 0."""
    predictive_preload: bool = True
    """Whether lenses and groups that a user is likely to switch to next are brought while there is room for them."""
    host_timeout: Annotated[float, Field(gt=0)] = 15.0
    """Seconds of silence after which a host counts as lost."""
    preload: str = ""
    """Ids of models and groups to load when the mesh starts, comma-separated, beside the models marked for it."""
    heartbeat_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between the heartbeats that hosts are asked for."""
