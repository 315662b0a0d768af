"""Rules that turn modules into graph nodes and edges, one family per file. Importing the package registers them."""

from . import attention, conv, linear, merge, movement, norm, pointwise, products

__all__ = ["attention", "conv", "linear", "merge", "movement", "norm", "pointwise", "products"]
