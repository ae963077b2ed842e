"""HTTP and JSON in front of the mesh: every route is derived from the protos' annotations, none is written by hand."""
