"""Plans: JSON both ways, and what becomes of a plan that someone has edited."""

import copy
import dataclasses
import json
import os

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import numbered
from torch import nn

from sepconvert.base.documents import CHECKSUM, is_intact, sealed
from sepconvert.base.errors import SepconvertError
from sepconvert.base.notes import ReasonCode
from sepconvert.factorize.exact.analysis import analyse
from sepconvert.network.copies import private_copy
from sepconvert.network.trace import trace
from sepconvert.planning.plan import SCHEMA, ConversionPlan, plan_layer, read_plan


def sites_of(*convolutions, size=8):
    model = nn.Sequential(*convolutions)
    return trace(private_copy(model), (torch.randn(1, convolutions[0].in_channels, size, size),))


def decide(site, gate="none", obstacle=lambda: None, is_slower=lambda factorization: None, tol=None):
    analysis = None if site.obstacle else analyse(site.conv.spec, site.conv.weight, site.sizes, tol)
    return plan_layer(site, analysis, obstacle, gate, tol, is_slower)


@pytest.fixture(scope="module")
def plan(planted):
    bordered = nn.Conv2d(4, 4, 5, padding=2, bias=False)
    bordered.weight.data[..., 0, :] = 0
    sites = sites_of(planted(3, 4, padding=1), bordered, nn.Conv2d(4, 5, 3))
    return ConversionPlan(
        mode="exact",
        gate="none",
        tol=None,
        seed=3,
        model_sha256="0" * 64,
        weights_sha256=None,
        input_shapes=((1, 3, 8, 8),),
        layers=tuple(decide(site)[0] for site in sites),
        merges=(),
    )


@pytest.fixture(scope="module")
def document(plan):
    """A plan as someone leaves it who means to edit it."""
    return {key: value for key, value in plan.to_json().items() if key != CHECKSUM}


def test_json_both_ways(plan, document, tmp_path):
    assert [layer.decision for layer in plan.layers] == ["converted", "converted", "kept"]
    assert read_plan(document) == plan
    assert is_intact(plan.to_json())
    assert read_plan(plan.to_json()) == plan
    (tmp_path / "plan.json").write_text(json.dumps(document))
    assert read_plan(tmp_path / "plan.json") == plan
    assert document["schema"] == SCHEMA
    assert [layer["reason_code"] for layer in document["layers"]] == ["separates", "separates", "full-rank"]
    assert [layer["reason"] for layer in document["layers"]] == [layer.reason.text for layer in plan.layers]
    assert read_plan({**document, "tol": 1}).tol == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "schema"),
        (b"3", "schema"),
        (b"{}", "schema"),
        (b'{"schema": "sepconvert.plan/2"}', "schema"),
        (b'{"schema": ["sepconvert.plan/1"]}', "schema"),
        (b'{"schema": "sepconvert.plan/1"}', "missing required field mode"),
    ],
)
def test_files_that_are_no_plans(text, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(text)
    with pytest.raises(SepconvertError, match=message) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plans_of_the_first_version_are_read(document):
    """Layers that there was no time to measure had a code of their own then."""
    old = copy.deepcopy(document)
    old["layers"][2] |= {"reason_code": "untimed", "reason": "no time was left to measure its forms"}
    assert read_plan(old).layers[2].reason.code is ReasonCode.UNTIMED


def test_a_plan_that_is_not_as_it_was_written(document, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(sealed(document)))
    assert read_plan(path) == read_plan(document)
    path.write_text(path.read_text().replace('"rank": ', '"rank": 1', 1))
    with pytest.raises(SepconvertError, match=r"not as it was written .*remove the line 'checksum'"):
        read_plan(path)


def test_a_layer_stands_in_a_plan_once(document):
    twice = {**document, "layers": [*document["layers"], document["layers"][0]]}
    with pytest.raises(SepconvertError, match=r"not a valid plan: .*layer .* occurs 2 times"):
        read_plan(sealed(twice))


def test_files_that_cannot_be_read(tmp_path):
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(10**9)  # which takes no room
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, *(tmp_path / name for name in ("none.json", "large.json", "pipe"))):
        with pytest.raises(SepconvertError, match="cannot be read"):
            read_plan(path)


def paths(value, prefix=()):
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*prefix, key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
SAME_KIND = {
    int: st.integers() | st.integers(-2, 12),
    str: st.sampled_from(
        ("converted", "kept", "zero-border", "input-subspace", "channelwise-spatial-vh", "")
    ),
}


@pytest.mark.parametrize("groups", [0, -1, 7])
def test_a_layer_has_groups_that_its_channels_fall_into(document, groups):
    document = copy.deepcopy(document)
    layer = next(each for each in document["layers"] if each["decision"] == "converted")
    layer["spec"]["groups"] = groups
    with pytest.raises(SepconvertError, match=f"cannot be of {groups} groups"):
        read_plan(document)


@example(data=None)
@given(data=st.data())
@numbered(300)
def test_edited_plans_are_read_or_refused(document, data):
    """Whatever is replaced or removed: a plan of the right types, or our own error."""
    edited = copy.deepcopy(document)
    if data is None:
        edited["layers"][0]["rank"] = 10**12
    else:
        for _ in range(data.draw(st.integers(1, 2))):
            *way, last = data.draw(st.sampled_from([path for path in paths(edited) if path]))
            parent = edited
            for key in way:
                parent = parent[key]
            if data.draw(st.integers(0, 9)) == 0:
                del parent[last]
            else:
                kind = SAME_KIND.get(type(parent[last]), JSON)
                parent[last] = data.draw(st.one_of(kind, kind, JSON))
    try:
        plan = read_plan(edited)
    except SepconvertError as error:
        assert "\n" not in str(error)  # noqa: PT017  (either outcome is right)
        return
    found = plan.to_json()
    assert {key: found[key] for key in edited} == edited
    assert found.keys() - edited.keys() == {CHECKSUM}
    assert all(isinstance(size, int) for shape in plan.input_shapes for size in shape)
    for layer in plan.converted:
        assert min(layer.border.trim_spec(layer.spec).weight_shape) >= 1
        assert layer.rank <= layer.spec.params


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rank", True, r"layers\[0\].rank: expected int .*, got bool"),
        ("rank", 0, "cannot have rank 0"),
        ("rank", 1000, "cannot have rank 1000"),
        ("scheme", "tucker", "'tucker'"),
        ("scheme", None, "no spec, scheme or rank"),
        ("spec", None, "no spec, scheme or rank"),
        ("decision", "perhaps", r"layers\[0\].decision: invalid enum value 'perhaps'"),
        ("reason_code", "luck", r"layers\[0\].reason.code: invalid enum value 'luck'"),
        ("name", 3, r"layers\[0\].name: expected str, got int"),
        ("border", {"top": 9, "bottom": 0, "left": 0, "right": 0}, "no such kernel"),
        ("border", {"top": -1, "bottom": 0, "left": 0, "right": 0}, "no such kernel"),
        ("border", {"top": 0}, r"layers\[0\].border.bottom is missing"),
        ("macs", [1], r"layers\[0\].macs: expected array of length 2"),
        ("tolerance", "small", r"layers\[0\].tolerance: expected float .*, got str"),
        ("tolerance", float("nan"), r"layers\[0\].tolerance: expected float >= 0"),
        ("colour", "red", r"layers\[0\].colour is .* no key of a plan"),
    ],
)
def test_the_key_at_fault_is_named(document, key, value, message):
    edited = copy.deepcopy(document)
    edited["layers"][0][key] = value
    with pytest.raises(SepconvertError, match=message):
        read_plan(edited)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2**64}, "seed: expected int <= 9223372036854775807"),
        ({"input_shapes": [[1, -3, 8, 8]]}, r"input_shapes\[0\]\[1\]: expected int >= 1"),
        ({"input_shapes": [[1, 3, 2**20, 2**20]]}, "out of range"),
    ],
)
def test_numbers_that_torch_cannot_take(document, change, message):
    with pytest.raises(SepconvertError, match=message):
        read_plan({**document, **change})


def test_gates(planted):
    """A rank at which the weights are fewer and the MACs are more: the first factor runs at full size."""
    [site] = sites_of(planted(4, 4, stride=4, rank=5, bias=False), size=9)
    kept, _ = decide(site, "macs")
    assert kept.decision == "kept"
    assert kept.macs == (site.macs, site.macs)
    assert "(gate none converts it)" in kept.reason.text
    assert kept.reason.code is ReasonCode.COSTS_MORE
    converted, factorization = decide(site, "none")
    assert converted.decision == "converted"
    assert converted.macs[1] > converted.macs[0]
    assert converted.params == (144, sum(weight.numel() for weight in factorization.weights))
    slow, nothing = decide(site, "latency", is_slower=lambda factorization: "is slow")
    assert (slow.decision, nothing) == ("kept", None)
    assert "is slow" in slow.reason.text
    assert slow.reason.code is ReasonCode.COSTS_MORE
    asked = []
    fast, _ = decide(site, "latency", is_slower=lambda factorization: asked.append(factorization))
    assert fast.decision == "converted"
    assert asked


def test_obstacles_are_asked_for_last(planted):
    [dense] = sites_of(nn.Conv2d(4, 4, 3))
    layer, _ = decide(dense, obstacle=lambda: pytest.fail("asked"))
    assert layer.reason.text.startswith("no exact structure; nearest is")
    assert layer.reason.code is ReasonCode.FULL_RANK
    [site] = sites_of(planted(4, 4))
    layer, nothing = decide(site, obstacle=lambda: "it is closed")
    assert (layer.decision, nothing) == ("kept", None)
    assert layer.reason.text.endswith("holds, but it is closed")
    assert layer.reason.code is ReasonCode.OBSTACLE


def test_the_cheapest_structure_is_taken(planted):
    [site] = sites_of(planted(8, 8, rank=1))
    analysis = analyse(site.conv.spec, site.conv.weight, site.sizes)
    layer, _ = decide(site)
    assert layer.macs[1] == min(finding.macs for finding in analysis.findings if finding.holds)


def test_planned_costs_are_those_of_the_layers(planted, separated):
    model = nn.Sequential(planted(4, 6, padding=1, stride=2), planted(6, 6, rank=1, seed=1))
    x = torch.randn(1, 4, 12, 12)
    layers = [decide(site)[0] for site in trace(private_copy(model), (x,))]
    converted, _, _ = separated(model, x)
    for layer, module in zip(layers, converted, strict=True):
        assert layer.params[1] == sum(parameter.numel() for parameter in module.parameters())
    sites = trace(private_copy(converted), (x,))
    for name, layer in zip("01", layers, strict=True):
        assert layer.macs[1] == sum(site.macs for site in sites if site.name.startswith(f"{name}."))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ConversionPlan("exact", "none", None, 0, None, None, (), (), ()).mode = "auto"
