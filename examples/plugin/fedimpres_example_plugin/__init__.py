"""A model, a dataset reader, an objective and a strategy of one's own for fedimpres."""
