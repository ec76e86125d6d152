"""Pixels <-> tokens."""
