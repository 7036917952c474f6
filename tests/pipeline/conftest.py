import pytest
import torch
from conversions import Net, convert, look, snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sepconvert.base.options.values import Origin, Timing


@pytest.fixture(scope="session")
def net(planted):
    model = Net(planted).train()
    for _ in range(3):
        model(torch.randn(8, 3, 12, 12) + 1)  # running statistics
    model.body.eval()
    return model


@pytest.fixture(scope="session")
def x():
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def conversion(net, x, tmp_path_factory):
    """Result, folder, and what the conversion left behind, of one conversion with everything on."""
    folder = tmp_path_factory.mktemp("conversion")
    net.body[0].register_forward_hook(look)
    before, random_state = snapshot(net), torch.get_rng_state()
    labelled = TensorDataset(torch.randn(30, 3, 12, 12, generator=torch.Generator().manual_seed(2)),
                             torch.arange(30) % 5)  # fmt: skip
    data = DataLoader(labelled, batch_size=16, generator=torch.Generator())
    origin = Origin("net.pt", "ab" * 32, "sepconvert net.pt")
    result = convert(net, x, timing=Timing(runs=5), out=folder, data=data, seed=7, origin=origin)
    return result, folder, (before, random_state, torch.get_rng_state())


@pytest.fixture(scope="session")
def small():
    """An untrained network, images, and for labels what it says of them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    ).eval()  # fmt: skip
    x = torch.randn(300, 3, 14, 14) + torch.randn(300, 3, 1, 1)
    with torch.no_grad():
        return model, DataLoader(TensorDataset(x, model(x).argmax(1)), batch_size=100)
