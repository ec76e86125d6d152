"""Hydra configs: the registry of varzoo."""
