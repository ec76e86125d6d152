"""varzoo: the zoo of visual autoregressive generation.

    import varzoo
    model = varzoo.load("runs/digits_llamagen")
    images, counts = model.sample([3, 7], seed=0)       # uint8 [2, 3, 16, 16]
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["list_models", "load"]


def __getattr__(name: str) -> Any:
    """Import the loaders on first use: `import varzoo` itself stays light."""
    if name in __all__:
        from varzoo import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'varzoo' has no attribute {name!r}")
