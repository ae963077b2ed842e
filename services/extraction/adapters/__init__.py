"""What extraction's ports are in this mesh: PostgreSQL, the artifact store, the registry, files."""
