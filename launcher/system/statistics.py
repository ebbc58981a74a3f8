"""Quantiles for confidence intervals: of the normal distribution, and Student's t."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["CONFIDENCE", "Z_95", "student_t_quantile"]

CONFIDENCE = 0.95
Z_95 = 1.96  # half-width of a 95 % interval in standard errors, for a normal distribution


def student_t_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """Half-width of the two-sided confidence interval in standard errors (Student's t quantile).

    Cornish-Fisher series in 1 / freedom (Abramowitz and Stegun 26.7.5), exact for one and two degrees of freedom. It
    is called between training updates, by `plan` and by `explain`: scipy would cost each process a quarter of a second
    and 17 MB there.
    """
    p = (1 + confidence) / 2
    if freedom <= 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom <= 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
