"""Scoring: features, streaming statistics, distances, protocols, and the files that samples are kept in."""
