"""Profiles and speed-ups of given numbers, for what is computed from them."""

from sepconvert.measure.latency import Latency, Speedup
from sepconvert.measure.metrics.classes import Accuracy
from sepconvert.measure.metrics.metric import MetricValue
from sepconvert.measure.profiling import Profile
from sepconvert.measure.statistics import Interval


def profile(milliseconds, top1=None, macs=1000):
    interval = Interval(0.9 * milliseconds, 1.1 * milliseconds)
    latency = Latency(milliseconds, interval, (milliseconds,) * 21, runs=9, threads=1, batch=1)
    accuracy = None if top1 is None else Accuracy(top1, None, 50)
    metric = None if top1 is None else MetricValue("top1", "pp", True, 100 * top1, 50)
    return Profile(100, macs, 4000, 400, latency, accuracy, {}, metric=metric)


def speedup(ratio, noise=0.02):
    return Speedup(ratio, Interval(0.99 * ratio, 1.01 * ratio), Interval(1 - noise, 1 + noise))
