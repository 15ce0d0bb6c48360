"""ResNet-50 and a GPT of GPT-2's small size, for machines with a GPU."""

from __future__ import annotations

from torch import Tensor, nn
from workloads import GPT, Workload, characters, vectors


class Bottleneck(nn.Module):
    """A residual block of 1 x 1, 3 x 3 and 1 x 1 convolutions; the stride is in the second (He et al. 2015, revised)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.path = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.path(x) + self.shortcut(x))


def resnet(depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> nn.Module:
    """A ResNet of bottleneck blocks; by default ResNet-50 with its 25,557,032 parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]  # fmt: skip
    inputs = width
    for stage, depth in enumerate(depths):
        for block in range(depth):
            layers.append(Bottleneck(inputs, width << stage, stride=2 if stage > 0 and block == 0 else 1))
            inputs = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def gpt2_small() -> nn.Module:
    """12 layers, d = 768, 12 heads, context 1024, vocabulary 50,257: 124,439,808 parameters."""
    return GPT(layers=12, width=768, heads=12, context=1024, vocabulary=50257)


LARGE = {
    "resnet50": Workload("ResNet-50, batch 128", 128, resnet, vectors((3, 224, 224), 1000), warm_up=15, turn=30),
    "gpt2": Workload("GPT-2 small, batch 16 of 1024", 16, gpt2_small, characters(1024, 50257), warm_up=15, turn=30),
}
LARGE_TINY = {
    "resnet50": Workload(
        "ResNet of 4 blocks", 2, lambda: resnet((1, 1, 1, 1), 4, 10), vectors((3, 32, 32), 10), warm_up=2, turn=2
    ),
    "gpt2": Workload("GPT of 1 layer", 2, lambda: GPT(1, 32, 2, 16, 64), characters(16, 64), warm_up=2, turn=2),
}
"""The same in small, to try the script where there is no GPU."""
