"""varzoo: the zoo of visual autoregressive generation."""

__version__ = "0.1.0"
