"""Fine-tune a converted model in your own training loop: it is a module like any other.

python examples/06_own_training_loop.py [--images 2000] [--epochs 4]
"""

import argparse

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sepconvert
from sepconvert.cli.demo.images import evaluation_data, training_data
from sepconvert.cli.demo.net import load, to_input


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    torch.manual_seed(0)
    original = load()
    digits, scored = training_data(options.images), evaluation_data(options.images)
    images, labels = to_input(digits.x), torch.from_numpy(digits.y)
    unseen, truth = to_input(scored.x), torch.from_numpy(scored.y)
    calib = DataLoader(TensorDataset(images, labels), batch_size=64)
    model = sepconvert.convert(original, images[:1], "approx", rank=2, calib=calib, check="torch").model
    before, after = (accuracy(net, unseen, truth) for net in (original, model))
    print(f"original: {before:.1%}, as fitted: {after:.1%}")

    # Distillation (Hinton et al., arXiv:1503.02531): the original's outputs say more than labels do.
    steps = options.epochs * -(-len(images) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for epoch in range(options.epochs):
        model.train()
        for batch in torch.randperm(len(images)).split(64):
            with torch.no_grad():
                wanted = original(images[batch]).softmax(1)
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), wanted).backward()
            optimizer.step()
            schedule.step()
        print(f"after epoch {epoch + 1}: {accuracy(model, unseen, truth):.1%}")


if __name__ == "__main__":
    main()
