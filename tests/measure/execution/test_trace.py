"""Traces: valid in the trace event format, one process a model, events named by layers."""

import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from sepconvert.base.environment import Runtime
from sepconvert.files.onnx.writing import write_onnx
from sepconvert.measure.execution.trace import trace_of

IMAGE = np.zeros((1, 3, 16, 16), np.float32)


def read(text):
    """Return the tracks of a trace, by (process, thread), as its format is described.

    Each is the names of process and thread, and the complete events as (start, end, name, arguments), checked
    to nest: of two on one thread, one holds the other or they are apart.
    """
    document = json.loads(text)
    assert document["displayTimeUnit"] in ("ms", "ns")
    assert set(document) <= {"traceEvents", "displayTimeUnit", "otherData"}
    names, tracks = {}, {}
    for event in document["traceEvents"]:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["name"], str)
        place = event["pid"], event["tid"]
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name")
            ((key, value),) = event["args"].items()
            assert key == ("sort_index" if event["name"] == "process_sort_index" else "name")
            names[place, event["name"]] = value
            continue
        assert event["ph"] == "X"
        assert isinstance(event["cat"], str)
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        json.dumps(event["args"], allow_nan=False)
        tracks.setdefault(place, []).append(
            (event["ts"], event["ts"] + event["dur"], event["name"], event["args"])
        )
    for events in tracks.values():
        open_until = []
        for start, end, *_ in sorted(events, key=lambda event: (event[0], -event[1])):
            while open_until and open_until[-1] <= start:
                open_until.pop()
            assert not open_until or end <= open_until[-1]
            open_until.append(end)
    return {
        place: (names[place, "process_name"], names[place, "thread_name"], events)
        for place, events in tracks.items()
    }


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("traced")
    dense = OrderedDict(stem=nn.Conv2d(3, 16, 3), act=nn.ReLU(), flat=nn.Flatten(), head=nn.Linear(3136, 4))
    split = OrderedDict(dense, stem=nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 16, 1)))
    found = {}
    for name, layers in (("original.onnx", dense), ("converted.onnx", split)):
        found[name] = folder / name
        write_onnx(nn.Sequential(layers).eval(), (torch.zeros(1, 3, 16, 16),), found[name])
    return found


@pytest.mark.parametrize("level", ["all", "none"])
def test_both_models_are_tracks_of_their_names(paths, level):
    document = trace_of(paths.items(), [IMAGE], Runtime(1, level))
    tracks = read(json.dumps(document))
    assert [(name, thread) for name, thread, _ in tracks.values()] == [
        ("original.onnx", "operators"), ("converted.onnx", "operators"),
    ]  # fmt: skip
    for (_, _, events), layers in zip(
        tracks.values(), (["stem", "head"], ["stem.0", "stem.1", "head"]), strict=True
    ):
        run, *operators = events
        assert (run[0], run[2]) == (0, "run")
        assert max(end for _, end, *_ in operators) <= run[1]
        with_weights = [event for event in operators if event[2] in layers]
        assert list(dict.fromkeys(event[2] for event in with_weights)) == layers
        convolutions = [about for *_, about in operators if about["operator"] == "Conv"]
        assert len(convolutions) == len(layers) - 1
        for about in convolutions:
            assert about["layer"].startswith("stem")
            assert about["kernel"]
            assert about["inputs"].startswith("1×3×16×16" if about["layer"] != "stem.1" else "1×")
            assert about["bytes moved"] > 0
    assert document["otherData"]["threads"] == 1


def test_inputs_are_cast_to_what_the_file_takes(paths):
    document = trace_of([("a", paths["original.onnx"])], [IMAGE.astype(np.float64)], Runtime(1))
    assert len(read(json.dumps(document))) == 1


def test_the_reader_finds_what_breaks_the_format(paths):
    document = trace_of([("a", paths["original.onnx"])], [IMAGE], Runtime(1))
    complete = [event for event in document["traceEvents"] if event["ph"] == "X"]
    for event, key, value in (
        (complete[2], "dur", 1e9),  # beyond the run that holds it, after whose start it begins
        (complete[1], "ts", -1),
        (complete[0], "ph", "B"),
        (complete[0], "pid", "a"),
    ):
        before = event[key]
        event[key] = value
        with pytest.raises(AssertionError):
            read(json.dumps(document))
        event[key] = before
    read(json.dumps(document))
