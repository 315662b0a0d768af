"""How far repetitions lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> float:
    """Standard deviation of the sample; 0 for a single value.

    >>> spread([0.5, 1.5]), spread([0.5])
    (0.7071067811865476, 0.0)
    """
    return statistics.stdev(values) if len(values) > 1 else 0.0
