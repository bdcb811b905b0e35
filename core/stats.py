"""Whether a difference between runs is more than chance: intervals, tests, and their correction for many."""

import math

# comes with torch; scipy.stats takes the file sparse.py beside this one for a package of that name, and fails
import mpmath
import numpy as np

LEVEL = 0.05  # of a verdict; intervals hold 1 - LEVEL


def chance(t, df):
    """The chance that Student's t with `df` degrees of freedom is at least t away from 0."""
    return float(mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True))


def interval(mean, error, count):
    """{"mean", "low", "high"} by Student's t for `count` seeds and a standard error."""
    low, high = 0.0, 1e4
    for _ in range(80):  # halve: the t that is exceeded with the chance LEVEL
        t = (low + high) / 2
        low, high = (t, high) if chance(t, count - 1) > LEVEL else (low, t)
    return {"mean": float(mean), "low": float(mean - t * error), "high": float(mean + t * error)}


def mcnemar(a, b):
    """The p-value of McNemar's exact test: a texts that only one model, b that only the other tells right."""
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1))
    return min(1.0, 2 * tail / 2 ** (a + b))


def standard_error(difference, random=None, resamples=0):
    """Of the mean of a difference (seeds,) or (seeds, texts), by a bootstrap over both: `resamples` means, widened
    by sqrt(n / (n - 1)) since n seeds drawn from n vary too little. Of seeds alone it is the one of a paired t-test."""
    n = len(difference)
    if difference.ndim == 1:
        return difference.std(ddof=1) / math.sqrt(n)
    means, texts = [], difference.shape[1]
    for _ in range(resamples):
        drawn = np.bincount(random.integers(texts, size=texts), minlength=texts).astype(np.float32)
        means.append((difference @ drawn)[random.integers(n, size=n)].mean() / texts)
    return np.std(means) * math.sqrt(n / (n - 1))


def holm(values):
    """Holm's step-down correction of p-values (Holm 1979)."""
    corrected, least = [0.0] * len(values), 0.0
    for rank, n in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, values[n] * (len(values) - rank)))
        corrected[n] = least
    return corrected
