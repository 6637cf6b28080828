"""torchvision's ResNet as a backbone: dilated to stride 8, giving its last two stages.

Papers: "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385; dilation in the place of
stride: "Rethinking Atrous Convolution for Semantic Image Segmentation", https://arxiv.org/abs/1706.05587

Letters: B batch, H W the image's size.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet


class ResNet(TorchvisionResNet):
    """image (B, 3, H, W) -> stage 3 (B, 1024, H/8, W/8) for the regions, stage 4 (B, 2048, H/8, W/8) for the pixels.

    Parameter names are torchvision's, so that its ImageNet weights fit as they are.

    Args:
        layers: bottlenecks in each of the four stages.
        deep_stem: three 3x3 convolutions instead of one 7x7, as mmsegmentation's ResNetV1c has them.
    """

    def __init__(self, layers: Sequence[int], deep_stem: bool = False):
        super().__init__(Bottleneck, list(layers), replace_stride_with_dilation=[False, True, True])
        del self.avgpool, self.fc
        if deep_stem:
            self.use_deep_stem()

    def use_deep_stem(self) -> None:
        """Replace the stem's 7x7 convolution, keeping the BatchNorm behind it."""
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.relu(self.bn1(self.conv1(image)))  # (B, 64, H/2, W/2)
        x = self.layer1(self.maxpool(x))  # (B, 256, H/4, W/4)
        x = self.layer2(x)  # (B, 512, H/8, W/8)
        stage3 = self.layer3(x)  # (B, 1024, H/8, W/8)
        stage4 = self.layer4(stage3)  # (B, 2048, H/8, W/8)
        return stage3, stage4
