"""Profiles as their type describes them."""

from dataclasses import replace

import pytest
from schemas import assert_conforms, assert_refused

from sepconvert.base.environment import environment
from sepconvert.measure.latency import Startup
from sepconvert.measure.profiling import Anatomy
from sepconvert.report.schema.profile import ProfileDocument


@pytest.fixture
def document(report):
    """What `sepconvert profile` writes, without the anatomy."""
    return {
        "schema": "sepconvert.profile/1",
        "model": report.source,
        "environment": environment(report.runtime),
        **report.original.to_json(),
    }


def test_a_profile_with_and_without_the_anatomy_of_its_file(report, document):
    assert_conforms(document, ProfileDocument)
    anatomy = Anatomy(None, Startup(1.5, 0.5, 3), (report.original.latency,), ())
    assert_conforms({**document, **replace(report.original, anatomy=anatomy).to_json()}, ProfileDocument)


def test_a_profile_of_version_0_1_0(document):
    versions = ("sepconvert", "torch", "onnx", "onnxruntime", "onnxscript", "fvcore", "numpy")
    names = ("python", "platform", "cpu", "cores", "threads", "graph_optimization", "provider", *versions)
    known = {name: document["environment"][name] for name in names}
    assert_conforms({**document, "environment": known}, ProfileDocument)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"macs": -1}, "$.macs"),
        ({"model": {"path": "net.pt", "sha256": "0"}}, "$.model.sha256"),
        ({"accuracy": {"top1": 96.75, "top5": None, "n": 2000}}, "$.accuracy.top1"),
        ({"anatomy": None}, "$.anatomy"),
    ],
)
def test_other_profiles(document, change, where):
    assert_refused({**document, **change}, ProfileDocument, where)
