"""Plans as the type of plan.json describes them."""

import pytest
from schemas import assert_conforms, assert_refused

from sepconvert.planning.plan import ConversionPlan
from sepconvert.report.schema.plan import PlanDocument


@pytest.fixture
def plan(report):
    """The document of a plan with a converted and a kept layer, and a pair that was merged."""
    return ConversionPlan(
        mode="auto",
        gate="macs",
        tol=1e-6,
        seed=0,
        model_sha256=None,
        weights_sha256="0123456789abcdef" * 4,
        input_shapes=((1, 3, 8, 8), (2,)),
        layers=tuple(layer.plan for layer in report.layers),
        merges=(("stem.conv", "next.conv"),),
    ).to_json()


def test_a_plan_as_it_is_written(plan):
    assert_conforms(plan, PlanDocument)
    assert [layer["reason_code"] for layer in plan["layers"]] == ["full-rank", "separates"]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda plan: plan.pop("checksum"), "`checksum`"),
        (lambda plan: plan.update(mode="fast"), "$.mode"),
        (lambda plan: plan["layers"][0].update(reason={"code": "full-rank"}), "$.layers[0].reason"),
        (lambda plan: plan["layers"][1].update(reason_code="luck"), "$.layers[1].reason_code"),
        (lambda plan: plan["layers"][1]["border"].update(top="1"), "$.layers[1].border.top"),
    ],
)
def test_other_plans(plan, change, where):
    change(plan)
    assert_refused(plan, PlanDocument, where)
