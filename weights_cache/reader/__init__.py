"""Brings a file's bytes into a ring of slots, by threads that need no interpreter."""
