"""Training's ports on PostgreSQL, gRPC, the residency pool and child processes."""
