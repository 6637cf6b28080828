"""HRNetV2: a backbone that keeps a high resolution from the first stage to the last.

Paper: "Deep High-Resolution Representation Learning for Visual Recognition", https://arxiv.org/abs/1908.07919

            stem     stage 1     stage 2     stage 3     stage 4
    1/4     conv --> layer1 -+-> branch 0 -> branch 0 -> branch 0 -->   C channels
    1/8                      +-> branch 1 -> branch 1 -> branch 1 -->  2C
    1/16                                 +-> branch 2 -> branch 2 -->  4C
    1/32                                             +-> branch 3 -->  8C

Each stage is one or more HRModules: its branches run side by side, each at a resolution of its own, and a fuse then
gives every branch the sum of all of them. A transition opens the next, coarser branch.

The fuse as the paper has it, R_i the representation at resolution i of a module's branches:

    R_i <- sum_j f_ji(R_j),   f_ji: nothing for j = i, 3x3 convolutions of stride 2 down, bilinear and a 1x1 up

The text enlarges before that 1x1; here, as in the authors' code, the 1x1 comes first: less work on the smaller map, and
the same function but for its BatchNorm, which in training sees that map. Not in the text: the ReLU behind the sum.

Letters: B batch, C the width (channels of branch 0; 18 for W18), H W the image's size, h w that of branch 0. Parameter
names are the authors', so that their ImageNet weights fit as they are.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """Convolution without bias (the BatchNorm behind it has one), BatchNorm and, unless told otherwise, ReLU."""
    layers = [
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, C, h, w) -> (B, C, h, w). The block of stages 2 to 4."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + x, inplace=True)


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up to four times the width, and a shortcut: (B, in, h, w) -> (B, 4 * channels, h, w).

    The block of stage 1. The shortcut is a 1x1 convolution where the channel counts differ.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        same = in_channels == out_channels
        self.downsample = nn.Identity() if same else conv_bn(in_channels, out_channels, 1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


def fuse_path(channels: Sequence[int], source: int, target: int) -> nn.Module:
    """What carries branch ``source`` to the channels (and, downwards, to the resolution) of branch ``target``.

    Up: a 1x1 convolution; HRModule resizes its result. Same: nothing. Down: one 3x3 of stride 2 for each halving; all
    but the last keep the source's channels and end in a ReLU.
    """
    if source > target:
        return conv_bn(channels[source], channels[target], 1, relu=False)
    if source == target:
        return nn.Identity()
    halvings = [conv_bn(channels[source], channels[source], 3, stride=2) for _ in range(target - source - 1)]
    return nn.Sequential(*halvings, conv_bn(channels[source], channels[target], 3, stride=2, relu=False))


def upsample(x: Tensor, factor: int, size: Sequence[int], align_corners: bool) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear; ``size`` is ``factor`` times as large or, at odd sizes, just below.

    Without ``align_corners`` first by exactly ``factor``, then to ``size``, as mmsegmentation does; one step with it,
    as the authors do. The two differ at odd sizes only, where weights trained with one expect that one.
    """
    if not align_corners and factor > 1:
        x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


class HRModule(nn.Module):
    """Parallel branches of basic blocks, then the fuse in which each branch receives every other.

    R_i <- ReLU(sum_j f_ji(branch_j(R_j))), a list of (B, channels[i], h / 2^i, w / 2^i), the same shapes out.
    """

    def __init__(self, channels: Sequence[int], num_blocks: int, align_corners: bool = False):
        super().__init__()
        indices = range(len(channels))
        self.align_corners = align_corners
        self.branches = nn.ModuleList(nn.Sequential(*[BasicBlock(c) for _ in range(num_blocks)]) for c in channels)
        self.fuse_layers = nn.ModuleList(nn.ModuleList(fuse_path(channels, j, i) for j in indices) for i in indices)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        x = [branch(x_j) for branch, x_j in zip(self.branches, x)]
        fused = [self.fuse(x, i) for i in range(len(x))]
        return [F.relu(sum(paths[1:], start=paths[0])) for paths in fused]

    def fuse(self, x: list[Tensor], i: int) -> list[Tensor]:
        """Every branch's contribution to branch ``i``, all (B, channels[i], h / 2^i, w / 2^i)."""
        size = x[i].shape[-2:]
        paths = [path(x_j) for path, x_j in zip(self.fuse_layers[i], x)]
        return [
            upsample(y, 2 ** (j - i), size, self.align_corners) if j > i else y  # coarser branches come up
            for j, y in enumerate(paths)
        ]


def transition(in_channels: Sequence[int], out_channels: Sequence[int]) -> nn.ModuleList:
    """From the branches of one stage to those of the next: a layer for each branch of the next stage.

    A branch whose width stays passes unchanged, one whose width changes (after stage 1) gets a 3x3. The new, coarsest
    one is a 3x3 of stride 2 on the coarsest there was.
    """
    layers = []
    for i, channels in enumerate(out_channels):
        if i >= len(in_channels):
            layers.append(nn.Sequential(conv_bn(in_channels[-1], channels, 3, stride=2)))
        elif in_channels[i] == channels:
            layers.append(nn.Identity())
        else:
            layers.append(conv_bn(in_channels[i], channels, 3))
    return nn.ModuleList(layers)


def cross(transition: nn.ModuleList, x: list[Tensor]) -> list[Tensor]:
    """Apply a transition: branch i takes branch i, and the new one the coarsest."""
    return [layer(x[min(i, len(x) - 1)]) for i, layer in enumerate(transition)]


class HRNet(nn.Module):
    """HRNetV2: the four branches' last maps, all brought to 1/4 of the image and concatenated.

    image (B, 3, H, W) -> twice the same (B, 15C, H/4, W/4): what OCR makes its regions from and what it makes its
    pixel representations from, which for this backbone is one thing. Sizes are rounded up; any image size works. The
    paper's 1x1 convolution that mixes the four is the first layer of what follows: of the region head or of FCNHead.

    Args:
        width: C, the channels of the finest branch (18, 32, 40 or 48 in the paper).
        num_modules: HRModules in stages 2, 3 and 4.
        num_blocks: residual blocks in stage 1, and in each branch of an HRModule.
        align_corners: how coarser branches are resized in the fuse. See ``upsample``.
    """

    def __init__(
        self,
        width: int = 18,
        num_modules: Sequence[int] = (1, 4, 3),
        num_blocks: int = 4,
        align_corners: bool = False,
    ):
        super().__init__()
        self.align_corners = align_corners
        channels = [width, 2 * width, 4 * width, 8 * width]

        def stage(branches: int, modules: int) -> nn.Sequential:
            return nn.Sequential(*[HRModule(channels[:branches], num_blocks, align_corners) for _ in range(modules)])

        self.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Bottleneck(64, 64), *[Bottleneck(256, 64) for _ in range(num_blocks - 1)])
        self.transition1 = transition([256], channels[:2])
        self.stage2 = stage(2, num_modules[0])
        self.transition2 = transition(channels[:2], channels[:3])
        self.stage3 = stage(3, num_modules[1])
        self.transition3 = transition(channels[:3], channels)
        self.stage4 = stage(4, num_modules[2])

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        finest, *coarser = self.branches(image)
        size = finest.shape[-2:]
        coarser = [F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners) for x in coarser]
        features = torch.cat([finest, *coarser], dim=1)  # (B, C + 2C + 4C + 8C, H/4, W/4)
        return features, features

    def branches(self, image: Tensor) -> list[Tensor]:
        """image (B, 3, H, W) -> the branches' maps (B, 2^i C, H / 2^(i+2), W / 2^(i+2)) for i = 0 .. 3."""
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)  # (B, 64, H/2, W/2)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)  # (B, 64, H/4, W/4)
        x = [self.layer1(x)]  # [(B, 256, H/4, W/4)]
        x = self.stage2(cross(self.transition1, x))  # + (B, 2C, H/8, W/8)
        x = self.stage3(cross(self.transition2, x))  # + (B, 4C, H/16, W/16)
        return self.stage4(cross(self.transition3, x))  # + (B, 8C, H/32, W/32)
