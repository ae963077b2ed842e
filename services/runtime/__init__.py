"""The one-machine mesh: supervisor, embedded PostgreSQL and NATS, topologies, keys."""
