"""torchvision's ResNet as a backbone: dilated to stride 8, with the features of its last two stages.

Papers: "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385; dilation instead of stride:
"Rethinking Atrous Convolution for Semantic Image Segmentation", https://arxiv.org/abs/1706.05587

Notation: B batch, H W the image's size.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models import resnet

from .hrnet import conv_bn_relu, init_weights


class ResNet(resnet.ResNet):
    """image (B, 3, H, W) -> stage 3 (B, 1024, H/8, W/8) for the regions, stage 4 (B, 2048, H/8, W/8) for the pixels.

    ``layers`` are the bottlenecks of each stage. Parameter names are torchvision's, so its ImageNet weights load.
    """

    out_channels = (1024, 2048)
    reduction, kernel_size = 4, 3  # of the hidden layer of the heads, see OCRHead
    dropout = 0.1  # before the classifiers
    head_channels = (512, 256)  # channels and key_channels of OCRHead

    def __init__(self, layers: Sequence[int]):
        super().__init__(resnet.Bottleneck, list(layers), replace_stride_with_dilation=[False, True, True])
        del self.avgpool, self.fc
        init_weights(self)

    def use_deep_stem(self) -> None:
        """Replace the 7x7 convolution of the stem by three 3x3, as in mmsegmentation's ResNetV1c."""
        last = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.conv1 = nn.Sequential(*conv_bn_relu(3, 32, 3, stride=2), *conv_bn_relu(32, 32, 3), last)
        init_weights(self.conv1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.relu(self.bn1(self.conv1(image)))  # (B, 64, H/2, W/2)
        x = self.layer1(self.maxpool(x))  # (B, 256, H/4, W/4)
        x = self.layer2(x)  # (B, 512, H/8, W/8)
        stage3 = self.layer3(x)  # (B, 1024, H/8, W/8)
        stage4 = self.layer4(stage3)  # (B, 2048, H/8, W/8)
        return stage3, stage4
