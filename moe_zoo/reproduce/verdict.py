"""The statistics: a paired t-test by seed, the smallest effect it can be trusted to find, and the verdict.

Letters: n seeds, s standard deviation of the n paired differences.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

from scipy import optimize, stats

__all__ = ['Paired', 'detectable_effect', 'judge', 'paired_test', 'power']

LEVEL = 0.05  # two-sided
POWER = 0.8
SEEN, OPPOSITE, NOT_SEEN, UNDECIDED = 'effect seen', 'opposite', 'not seen', 'undecided'


class Paired(NamedTuple):
    """What a paired t-test says.

    Attributes:
        mean: Of the differences.
        deviation: Their sample standard deviation, s.
        low, high: 95 % confidence interval of the mean.
        p: Two-sided.
        n: Pairs.
    """
    mean: float
    deviation: float
    low: float
    high: float
    p: float
    n: int


def paired_test(better: Sequence[float], worse: Sequence[float]) -> Paired:
    """Two-sided paired t-test of two arms, one value a seed each.

    Pairs that all differ by the same leave no doubt: the interval is a point, p is 0, or 1 where they do not differ.
    """
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    error = deviation / math.sqrt(n)
    if error <= 1e-12 * max(map(abs, differences)) or not any(differences):
        return Paired(mean, 0., mean, mean, float(mean == 0), n)
    margin = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    return Paired(mean, deviation, mean - margin, mean + margin, float(2 * stats.t.sf(abs(mean) / error, n - 1)), n)


def power(effect: float, deviation: float, n: int) -> float:
    """Probability that the test of n pairs finds a true mean difference of `effect`, in its direction."""
    return float(stats.nct.sf(stats.t.ppf(1 - LEVEL / 2, n - 1), n - 1, effect / deviation * math.sqrt(n)))


def detectable_effect(deviation: float, n: int) -> float:
    """The true mean difference that the test of n pairs with this deviation finds with a probability of 80 %."""
    if deviation == 0:
        return 0.
    return deviation * float(optimize.brentq(lambda effect: power(effect, 1., n) - POWER, 1e-3, 100.))


def judge(paired: Paired, published: Optional[float]) -> str:
    """The verdict on one claim.

    The interval above 0 is 'effect seen', below 0 'opposite'. 'not seen' takes more than an interval that holds 0: by
    the deviation observed, an effect as large as the published one would have been found. Else it is 'undecided'.
    """
    if paired.low > 0:
        return SEEN
    if paired.high < 0:
        return OPPOSITE
    known = published is not None and detectable_effect(paired.deviation, paired.n) < abs(published)
    return NOT_SEEN if known else UNDECIDED
