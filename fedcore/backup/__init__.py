"""Backups of a coordinator: one encrypted file, written by `fedserver`, checked anywhere. See docs/adr/0006-terms.md."""
