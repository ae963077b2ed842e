"""The control plane: catalogue, placement, groups, jobs and events. It imports no torch."""
