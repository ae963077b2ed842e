"""The main job from end to end, as a user of the mesh: what `lensmesh demo` runs and shows."""
