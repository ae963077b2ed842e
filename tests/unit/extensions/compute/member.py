"""One of several processes that train an adapter together; the first writes the weights where it is told."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from services.extensions.compute.team import Team
from services.residency.gang import die_with_parent, joined, rank
from tests.unit.extensions.compute.test_team import trained

if __name__ == "__main__":
    die_with_parent()
    torch.set_num_threads(1)
    with joined():
        weights = trained(Team(rank(), int(os.environ["WORLD_SIZE"])))
        if rank() == 0:
            save_file(weights, Path(os.environ["TEAM_RESULT"]))
