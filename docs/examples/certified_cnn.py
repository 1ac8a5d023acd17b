"""Train a residual CNN so that its answers are certain within a radius, and certify it in floating point.

    python docs/examples/certified_cnn.py [package.module:function]

The function returns a model of pictures [N, 1, 8, 8] with ten classes; without it the model is a small residual network
in the style of torchvision. The pictures are scikit-learn's digits where that is installed, else random.
"""

# %% The model: two residual blocks, batch-norm, pooling.
import importlib
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.down = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.down(x))


torch.manual_seed(0)
if len(sys.argv) > 1:
    module, function = sys.argv[1].split(":")
    model = getattr(importlib.import_module(module), function)()
else:
    model = nn.Sequential(Block(1, 8, 1), Block(8, 16, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))

# %% The data.
try:
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pictures).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long()
except ImportError:
    x, y = torch.rand(512, 1, 8, 8), torch.randint(10, (512,))
train, test = TensorDataset(x[:512], y[:512]), TensorDataset(x[-128:], y[-128:])

# %% Training on the bounds: the radius grows from 0, the loss is of the worst case within it.
from w2s_fast.methods import Recipe, certified

eps = 1 / 255
certified.fit(model, DataLoader(train, 64, shuffle=True), eps=eps, recipe=Recipe(steps=24, rate=2e-3))
print(certified.verify(model, DataLoader(test, 64), eps=eps))

# %% Bounds by hand: of the logits, and which pictures no change within the radius can move to another class.
from w2s_fast.nn import bound

model.eval()
bounded = bound(model)
lower, upper = bounded.bounds(x[-4:], eps, clip=(0, 1))
print("widths of the logits' bounds:", (upper - lower).mean(1).tolist())
for rounding in ("sound", "deployed"):
    sure = bounded.verified(x[-128:], y[-128:], eps, clip=(0, 1), rounding=rounding)
    print(f"certified, {rounding}: {sure.float().mean().item():.3f}")
