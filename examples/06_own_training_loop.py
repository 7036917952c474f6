"""Fine-tuning a converted model in a loop of one's own: it is a module like any other.

python examples/06_own_training_loop.py
"""

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert.demo.images import draw, evaluation_data
from sepconvert.demo.net import load, to_input


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    torch.manual_seed(0)
    original = load()
    drawn, scored = draw(800, seed=1), evaluation_data(500)
    images, labels = to_input(drawn.x), torch.from_numpy(drawn.y)
    unseen, truth = to_input(scored.x), torch.from_numpy(scored.y)
    calib = DataLoader(TensorDataset(images, labels), batch_size=50)
    model = sepconvert.convert(original, images[:1], mode="approx", rank=2, calib=calib, runs=0).model
    print(
        f"original: {accuracy(original, unseen, truth):.1%}, converted: {accuracy(model, unseen, truth):.1%}"
    )

    # Distillation (Hinton et al., arXiv:1503.02531): the original's answers say more than labels do.
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(2):
        model.train()
        for batch in torch.randperm(len(images)).split(50):
            with torch.no_grad():
                wanted = original(images[batch]).softmax(1)
            optimiser.zero_grad()
            F.cross_entropy(model(images[batch]), wanted).backward()
            optimiser.step()
        print(f"after epoch {epoch + 1}: {accuracy(model, unseen, truth):.1%}")


if __name__ == "__main__":
    main()
