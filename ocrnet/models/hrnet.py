"""HRNetV2: a backbone that keeps a high resolution from the first stage to the last.

Paper: "Deep High-Resolution Representation Learning for Visual Recognition", https://arxiv.org/abs/1908.07919

            stem     stage 1     stage 2     stage 3     stage 4
    1/4     conv --> layer1 -+-> branch 0 -> branch 0 -> branch 0 -->   C channels
    1/8                      +-> branch 1 -> branch 1 -> branch 1 -->  2C
    1/16                                 +-> branch 2 -> branch 2 -->  4C
    1/32                                             +-> branch 3 -->  8C

A stage is a sequence of HRModules. In an HRModule the branches run in parallel, each at its own resolution, and the
fuse adds all branches to each. A transition adds the next, coarser branch. The fuse, with R_i the representation of
branch i:

    R_i <- ReLU( sum_j f_ji(R_j) ),   f_ji: identity for j = i, stride-2 3x3 convolutions down, 1x1 and bilinear up

The paper upsamples before the 1x1 convolution. We follow the authors' code: the 1x1 comes first, on the smaller map.

Notation: B batch, C the width (18 for W18), H W the image's size, h w that of branch 0. Parameter names are the
authors', so their ImageNet weights load unchanged.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cuda_graph import in_parallel


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """Convolution and BatchNorm. The convolution has no bias, as BatchNorm has one."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    return conv_bn(in_channels, out_channels, kernel_size, stride).append(nn.ReLU(inplace=True))


def init_weights(module: nn.Module) -> None:
    """Kaiming normal (fan out) for every convolution in ``module``."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


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
    """1x1 down, 3x3, 1x1 up to 4 * channels, and a shortcut: (B, in_channels, h, w) -> (B, 4 * channels, h, w).

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
        self.downsample = nn.Identity() if in_channels == out_channels else conv_bn(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


def fuse_path(channels: Sequence[int], source: int, target: int) -> nn.Module:
    """f_ji, from branch ``source`` to branch ``target``, without the upsampling.

    Up: a 1x1 convolution. Down: one stride-2 3x3 convolution per halving; all but the last keep the source's channels
    and end in a ReLU.
    """
    if source > target:
        return conv_bn(channels[source], channels[target], 1)
    if source == target:
        return nn.Identity()
    halvings = [conv_bn_relu(channels[source], channels[source], 3, stride=2) for _ in range(target - source - 1)]
    return nn.Sequential(*halvings, conv_bn(channels[source], channels[target], 3, stride=2))


def upsample(x: Tensor, factor: int, size: Sequence[int], align_corners: bool) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear; ``size`` is ``factor`` * (h, w) or, for odd sizes, slightly less.

    Without ``align_corners`` in two steps as in mmsegmentation: by ``factor``, then to ``size``. With it in one step as
    in the authors' code. The two differ only for odd sizes, where released weights expect the one they trained with.
    """
    if not align_corners:
        x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    # also where x has this size already: a branch on it would be fixed in an exported model
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


class HRModule(nn.Module):
    """Parallel branches of basic blocks, then the fuse: a list of (B, 2^i C, h / 2^i, w / 2^i), the same shapes out."""

    align_corners = False

    def __init__(self, channels: Sequence[int], num_blocks: int):
        super().__init__()
        indices = range(len(channels))
        self.branches = nn.ModuleList(nn.Sequential(*[BasicBlock(c) for _ in range(num_blocks)]) for c in channels)
        self.fuse_layers = nn.ModuleList(nn.ModuleList(fuse_path(channels, j, i) for j in indices) for i in indices)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        x = in_parallel(self.branches, x)
        return in_parallel([partial(self.fuse, i=i) for i in range(len(x))], [x] * len(x))

    def fuse(self, x: list[Tensor], i: int) -> Tensor:
        """R_i after the fuse, (B, 2^i C, h / 2^i, w / 2^i)."""
        paths = [path(x_j) for path, x_j in zip(self.fuse_layers[i], x)]
        for j in range(i + 1, len(x)):  # coarser branches
            paths[j] = upsample(paths[j], 2 ** (j - i), x[i].shape[-2:], self.align_corners)
        return F.relu(sum(paths[1:], start=paths[0]))


def transition(in_channels: Sequence[int], out_channels: Sequence[int]) -> nn.ModuleList:
    """One layer per branch of the next stage.

    A branch whose width stays is passed on, one whose width changes (after stage 1) gets a 3x3 convolution, and the new
    one is a stride-2 3x3 convolution of the coarsest.
    """
    layers = []
    for i, channels in enumerate(out_channels):
        if i >= len(in_channels):
            layers.append(nn.Sequential(conv_bn_relu(in_channels[-1], channels, 3, stride=2)))
        elif in_channels[i] == channels:
            layers.append(nn.Identity())
        else:
            layers.append(conv_bn_relu(in_channels[i], channels, 3))
    return nn.ModuleList(layers)


def apply_transition(transition: nn.ModuleList, x: list[Tensor]) -> list[Tensor]:
    """Branch i of the next stage from branch i, and the new one from the coarsest."""
    return [layer(x[min(i, len(x) - 1)]) for i, layer in enumerate(transition)]


class HRNet(nn.Module):
    """image (B, 3, H, W) -> the four branches at 1/4 of the image, concatenated: (B, 15C, H/4, W/4), twice.

    OCRNet takes features for its regions and features for its pixels; with HRNet they are the same. Odd sizes are
    rounded up. The paper's 1x1 convolution that mixes the branches is the hidden layer of the heads.

    Args:
        width: C, the channels of branch 0 (18, 32, 40 or 48 in the paper).
        num_modules: HRModules in stages 2, 3 and 4.
        num_blocks: residual blocks in stage 1, and in each branch of an HRModule.
        head_channels: channels and key_channels of OCRHead.
    """

    align_corners = False  # how maps are resized, see OCRNet.set_align_corners
    reduction, kernel_size = 1, 1  # of the hidden layer of the heads, see OCRHead
    dropout = 0.0  # before the classifiers

    def __init__(
        self,
        width: int,
        num_modules: Sequence[int] = (1, 4, 3),
        num_blocks: int = 4,
        head_channels: tuple[int, int] = (512, 256),
    ):
        super().__init__()
        channels = [width, 2 * width, 4 * width, 8 * width]
        self.head_channels = head_channels
        self.out_channels = (sum(channels), sum(channels))  # 15C of the region features, 15C of the pixel features

        def stage(branches: int, modules: int) -> nn.Sequential:
            return nn.Sequential(*[HRModule(channels[:branches], num_blocks) for _ in range(modules)])

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
        init_weights(self)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        finest, *coarser = self.forward_branches(image)
        size = finest.shape[-2:]
        coarser = [F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners) for x in coarser]
        features = torch.cat([finest, *coarser], dim=1)  # (B, C + 2C + 4C + 8C, H/4, W/4)
        return features, features

    def forward_branches(self, image: Tensor) -> list[Tensor]:
        """image (B, 3, H, W) -> a list of (B, 2^i C, H / 2^(i+2), W / 2^(i+2)) for i = 0 .. 3."""
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)  # (B, 64, H/2, W/2)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)  # (B, 64, H/4, W/4)
        x = [self.layer1(x)]  # [(B, 256, H/4, W/4)]
        x = self.stage2(apply_transition(self.transition1, x))  # + (B, 2C, H/8, W/8)
        x = self.stage3(apply_transition(self.transition2, x))  # + (B, 4C, H/16, W/16)
        return self.stage4(apply_transition(self.transition3, x))  # + (B, 8C, H/32, W/32)
