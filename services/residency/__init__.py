"""What a device-owning process needs to hold models: families, hooks, loading, quantising, lenses and the pool."""
