"""Layers that two or more systems share."""
