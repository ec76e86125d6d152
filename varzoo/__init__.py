"""varzoo: the zoo of visual autoregressive generation.

    import varzoo
    model = varzoo.load("runs/digits_llamagen")
    images, counts = model.sample([3, 7], seed=0)       # uint8 [2, 3, 16, 16]
"""

from typing import TYPE_CHECKING, Any

from varzoo.configs import list_models

if TYPE_CHECKING:
    from varzoo.loading import load

__version__ = "0.1.0"
__all__ = ["list_models", "load"]


def __getattr__(name: str) -> Any:
    """Import what loads on first use: `import varzoo` itself imports not even torch."""
    if name == "load":
        from varzoo.loading import load

        return load
    raise AttributeError(f"module 'varzoo' has no attribute {name!r}")
