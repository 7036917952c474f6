"""Evidence: what the original does on the calibration images, which are neither held out nor scored."""

import copy

import pytest
import torch
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.calibration.evidence import collect_evidence
from sepconvert.calibration.importance import fisher_information
from sepconvert.calibration.split import CalibrationSet
from sepconvert.network.tensors import InputBatch
from sepconvert.network.trace import traced

IMAGES = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
CALIBRATION = CalibrationSet(
    (InputBatch((IMAGES[:4],)), InputBatch((IMAGES[4:7],))),
    (InputBatch((IMAGES[7:],)),),
    (torch.zeros(3),),
    "`calib`",
)


def small():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2), nn.Flatten(), nn.Linear(96, 3)
    ).eval()


def test_images_outputs_and_importance_belong_together():
    model = small()
    before = copy.deepcopy(model.state_dict())
    sites = traced(model, (IMAGES[:1],)).sites
    found = collect_evidence(model, sites, CALIBRATION, seed=3)
    assert found.calibration is CALIBRATION
    assert (found.recorded.sampling.images, found.recorded.sampling.seed) == (7, 3)
    places = {site.name: site.place for site in sites}
    assert set(found.recorded.outputs) == {(place, number) for place in places.values() for number in (0, 1)}
    for number, batch in enumerate(CALIBRATION.fit):
        with torch.no_grad():
            expected = (
                model[:3](*batch.inputs).flatten(2).mT
            )  # all 16 positions are few enough to be looked at
        recorded = found.recorded.outputs[places["2"], number]
        assert recorded.shape == (len(batch), 16, 6)
        torch.testing.assert_close(recorded.sort(1).values, expected.sort(1).values)
    importance = fisher_information(model, dict(enumerate(CALIBRATION.fit)), sites, seed=3)
    assert {name: value.shape for name, value in found.importance.items()} == {"0": (1, 4, 4), "2": (2, 3, 3)}
    for name, value in importance.items():
        torch.testing.assert_close(found.importance[name], value, rtol=0, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_that_cannot_be_differentiated_are_fitted_to_without_importance():
    class Detached(nn.Sequential):
        def forward(self, x):
            return super().forward(x).detach()

    model = Detached(nn.Conv2d(3, 4, 1)).eval()
    found = collect_evidence(model, traced(model, (IMAGES[:1],)).sites, CALIBRATION, seed=0)
    assert len(found.recorded.outputs) == 2
    assert found.importance == {}


def test_images_that_the_model_does_not_take():
    model = small()
    sites = traced(model, (IMAGES[:1],)).sites
    narrow = CalibrationSet((InputBatch((IMAGES[:4, ..., :3],)),), (), (), "`calib`")
    with pytest.raises(SepconvertError, match=r"the model fails on samples of shape \(3, 4, 3\)"):
        _ = collect_evidence(model, sites, narrow, seed=0).recorded
