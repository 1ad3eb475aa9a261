"""Loaded by every program of a chaos federation before anything else: breaks the guard that $CHAOS_MUTANT names, if any."""

import os

if name := os.environ.get("CHAOS_MUTANT"):
    from tests.faults.mutants import break_guard

    break_guard(name)
