"""Aggregation rules that bear some bad updates, each a pure function of tensors in a module of its own."""
