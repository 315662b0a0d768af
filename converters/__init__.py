"""Rules that turn modules into graph nodes and edges, one family per file. Importing the package registers them."""

from . import conv, linear, merge, movement, norm, pointwise

__all__ = ["conv", "linear", "merge", "movement", "norm", "pointwise"]
