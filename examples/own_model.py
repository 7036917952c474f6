"""Convert your own model in Python, continue training it, and measure it.

    python examples/own_model.py

The second layer of this network was trained as a 5×1 → 1×5 pair and then merged: its kernel has rank 8 of 80.
`convert` finds this and returns a copy that keeps the original's class, mode and all other parameters.
"""

import torch
from torch import nn

import sepconvert


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.merged = nn.Conv2d(16, 16, 5, padding=2)
        self.head = nn.Linear(16, 10)
        vertical, horizontal = torch.randn(8, 16, 5), torch.randn(16, 8, 5)
        self.merged.weight.data = torch.einsum("orj,rci->ocij", horizontal, vertical) / 60

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.merged(self.stem(x)).relu().mean(dim=(2, 3)))


def main() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(4, 3, 32, 32)
    timing = sepconvert.Timing(runs=20)
    result = sepconvert.convert(model, x, timing=timing)
    for layer in result.report["layers"]:
        print(f"{layer['name']}: {layer['decision']}, {layer['reason']}")
    print(result.model.merged)
    print(f"largest difference of the outputs: {(result.model(x) - model(x)).abs().max():.1e}")

    result.model.train()
    optimiser = torch.optim.SGD(result.model.parameters(), lr=0.1)
    labels = torch.randint(0, 10, (4,))
    for _ in range(20):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(result.model(x), labels)
        loss.backward()
        optimiser.step()
    print(f"loss after 20 steps of training: {loss.item():.3f}")

    before = sepconvert.profile(model, x[:1], timing=timing)
    after = sepconvert.profile(result.model.eval(), x[:1], timing=timing)
    print(sepconvert.compare(before, after))


if __name__ == "__main__":
    main()
