"""Verdicts on a drop of accuracy: early ones, and such as hold for unseen images with a given probability."""

from sepconvert.measure.metrics import AccuracyDelta
from sepconvert.measure.statistics import drop_bound, drop_p_value, paired_difference_interval

# Confidence with which a drop on some of the images has to be on one side of the limit to stop there.
_CLEARLY = 0.999


# Share of a test's level that is spent on stopping before all images are used, evenly on each earlier time.
_EARLY = 0.1


def is_clearly_within(delta: AccuracyDelta, most: float) -> bool | None:
    """Return whether a drop keeps within `most` percentage points; None if more images may say otherwise."""
    interval = paired_difference_interval(delta.lost, delta.won, delta.n, _CLEARLY)
    if 100 * interval.hi <= most:
        return True
    return False if 100 * interval.lo > most else None


def final_level(level: float, looks: int) -> float:
    """Return the level that is left for the last of several looks at the growing data."""
    return level * (1 - _EARLY) if looks > 1 else level


def is_proven(delta: AccuracyDelta, most: float, level: float, looks: int, last: bool) -> bool:
    """Return whether the drop on unseen images is below `most` percentage points, by a test at `level`.

    The level is divided among the `looks` at the growing data, which keeps the sum of the probabilities of an
    error at `level` (Bonferroni).
    """
    share = final_level(level, looks) if last else level * _EARLY / (looks - 1)
    return drop_p_value(delta.lost, delta.won, delta.n, most / 100, share) <= share


def expected_on_unseen_images(delta: AccuracyDelta, plans: int) -> float:
    """Return the largest drop, in percentage points, that a cautious reader expects on unseen images.

    It is exceeded with a probability of 5 % at most, where a plan was chosen by its measured drop among
    `plans` (Bonferroni).
    """
    return 100 * drop_bound(delta.lost, delta.won, delta.n, 1 - 0.05 / max(plans, 1))
