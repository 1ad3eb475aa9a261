"""One servicer a proto service: message <-> event, nothing else."""
