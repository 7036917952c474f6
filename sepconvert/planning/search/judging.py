"""Verdicts on a drop: early ones, and such as hold for unseen images with a given probability."""

from sepconvert.measure.metrics.evaluation import MetricDelta

# Confidence with which a drop on some of the images has to be on one side of the limit to stop there.
_CLEARLY = 0.999


# Share of a test's level that is spent on stopping before all images are used, evenly on each earlier time.
_EARLY = 0.1


def is_clearly_within(delta: MetricDelta, most: float) -> bool | None:
    """Return whether a drop keeps within `most`; None if more images may say otherwise."""
    interval = delta.uncertainty.interval(_CLEARLY)
    if interval.hi <= most:
        return True
    return False if interval.lo > most else None


def final_level(level: float, looks: int) -> float:
    """Return the level that is left for the last of several looks at the growing data."""
    return level * (1 - _EARLY) if looks > 1 else level


def is_proven(delta: MetricDelta, most: float, level: float, looks: int, last: bool) -> bool:
    """Return whether the drop on unseen images is below `most`, by a test at `level`.

    The level is divided among the `looks` at the growing data, which keeps the sum of the probabilities of an
    error at `level` (Bonferroni).
    """
    share = final_level(level, looks) if last else level * _EARLY / (looks - 1)
    return delta.uncertainty.p_value(most, share) <= share


def expected_on_unseen_images(delta: MetricDelta, plans: int) -> float:
    """Return the largest drop that a cautious reader expects on unseen images.

    It is exceeded with a probability of 5 % at most, where a plan was chosen by its measured drop among
    `plans` (Bonferroni).
    """
    return delta.uncertainty.bound(1 - 0.05 / max(plans, 1))
