"""Forms of layers timed in the runtime: what is built, and what is remembered."""

import copy
import json

import pytest
import torch
from torch import nn

from sepconvert.base.documents import sealed
from sepconvert.base.environment import Runtime
from sepconvert.base.progress import silent
from sepconvert.files.onnx.drafts import Drafts
from sepconvert.network.trace import trace
from sepconvert.planning.timing.clock import Clock

FORMS_TIMED = [("spatial-vh", 4), ("depthwise-pointwise", 2), ("channel-subspace", 8)]


@pytest.fixture(scope="module")
def site():
    (found,) = trace(nn.Conv2d(16, 16, 3, padding=1), (torch.randn(1, 16, 12, 12),))
    return found


def test_times_are_remembered_on_disk(site, tmp_path):
    cache = tmp_path / "cache"
    first = Clock(Runtime(1), 0, cache, 60).forms(site, FORMS_TIMED)
    assert list(first.forms) == FORMS_TIMED
    assert first.dense_milliseconds > 0
    assert all(each.milliseconds > 0 for each in first.forms.values())
    assert all(each.measured and each.speedup in each.ci95 for each in first.forms.values())
    assert first.best == min(first.forms.values(), key=lambda each: each.milliseconds)
    # With no time left, what is not known is modelled.
    assert Clock(Runtime(1), 0, cache, 0).forms(site, FORMS_TIMED) == first
    assert Clock(Runtime(1), 0, cache, 0).forms(site, FORMS_TIMED[:1]).forms == {
        FORMS_TIMED[0]: first.forms[FORMS_TIMED[0]]
    }
    for other in (Runtime(2), Runtime(1, spinning="on"), Runtime(1, "basic")):
        modelled = Clock(other, 0, cache, 0).forms(site, FORMS_TIMED)
        assert not any(each.measured for each in modelled.forms.values())
    half = Clock(Runtime(1), 0, cache, 0).forms(site, [*FORMS_TIMED, ("spatial-hv", 4)])
    assert [each.measured for each in half.forms.values()] == [True, True, True, False]
    assert half.dense_milliseconds == first.dense_milliseconds
    more = Clock(Runtime(1), 0, cache, 60).forms(site, [*FORMS_TIMED, ("spatial-hv", 4)])
    assert {form: more.forms[form] for form in FORMS_TIMED} == dict(first.forms)


@pytest.mark.parametrize(
    "damage", ["", "[]", "{}", '{"dense_yardsticks": -1, "forms": {}}', "ratio", "digit"]
)
def test_a_damaged_memory_is_measured_anew(site, tmp_path, damage):
    Clock(Runtime(1), 0, tmp_path, 60).forms(site, FORMS_TIMED[:1])
    (path,) = [each for each in tmp_path.iterdir() if "forms" in each.read_text()]
    good = json.loads(path.read_text())
    if damage == "ratio":
        spoiled = copy.deepcopy(good)
        spoiled["forms"]["spatial-vh 4"]["ratio"] = 0
        damage = json.dumps(sealed(spoiled))
    elif damage == "digit":
        damage = path.read_text().replace('"ratio": ', '"ratio": 1', 1)
    elif damage:
        damage = json.dumps(sealed(json.loads(damage))) if damage.startswith("{") else damage
    path.write_text(damage)
    for seconds in (0, 60):
        (found,) = Clock(Runtime(1), 0, tmp_path, seconds).forms(site, FORMS_TIMED[:1]).forms.values()
        assert found.measured == (seconds > 0)
    assert json.loads(path.read_text())["forms"].keys() == good["forms"].keys()


def test_calls_are_counted(tmp_path):
    shared = nn.Conv2d(16, 16, 3, padding=1)
    (twice,) = trace(nn.Sequential(shared, shared), (torch.randn(1, 16, 12, 12),))
    clock = Clock(Runtime(1), 0, None, 60)
    (once,) = trace(shared, (torch.randn(1, 16, 12, 12),))
    assert clock.forms(twice, FORMS_TIMED).dense_milliseconds == pytest.approx(
        2 * clock.forms(once, FORMS_TIMED).dense_milliseconds
    )


def test_plans_are_remembered_by_what_they_are(tmp_path):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Conv2d(16, width, 3), nn.Conv2d(width, 16, 3)).eval() for width in (64, 4, 5)]
    drafts = Drafts(models[0], (torch.randn(1, 16, 24, 24),))
    milliseconds, found = Clock(Runtime(1), 0, tmp_path, 0).plans(drafts, models[1:], 10, silent)
    assert milliseconds > 0
    assert len(found) == 2
    assert all(each.ci95.lo <= each.median <= each.ci95.hi for each in found)
    again = Clock(Runtime(1), 0, tmp_path, 0).plans(drafts, models[:0:-1], 10, silent)
    assert again == (milliseconds, found[::-1])
    for path in [each for each in tmp_path.iterdir() if "speedup" in each.read_text()]:
        path.write_text(json.dumps(sealed({"yardsticks": 1, "speedup": {"median": "fast"}})))
    anew = Clock(Runtime(1), 0, tmp_path, 0).plans(drafts, models[1:2], 10, silent)
    assert all(each.median > 0 for each in anew[1])


def test_where_nothing_can_be_kept(site, tmp_path):
    place = tmp_path / "file"
    place.write_text("")
    (found,) = Clock(Runtime(1), 0, place / "cache", 60).forms(site, FORMS_TIMED[:1]).forms.values()
    assert found.measured
