"""OCRNet: a backbone, the OCR head, and both segmentations brought back to the image's size.

    image (B, 3, H, W) -> backbone: features at 1/4 -> OCRHead: two logit maps (B, K, H/4, W/4) -> two (B, K, H, W)
                          (with ResNet 1/8)

In the OCR head's place FCNHead: the baseline that the paper's tables compare with.

Letters: B batch, H W the image's size, K classes, C the width of HRNet.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .hrnet import HRNet, conv_bn
from .ocr import OCRHead

# The variants of HRNet: width C, HRModules in stages 2 to 4, residual blocks per branch. A new width is a new line.
# hr18s is the authors' W18-Small-v2.
HRNETS = {
    "hr18s": dict(width=18, num_modules=(1, 3, 2), num_blocks=2),
    "hr18": dict(width=18, num_modules=(1, 4, 3), num_blocks=4),
    "hr32": dict(width=32, num_modules=(1, 4, 3), num_blocks=4),
    "hr48": dict(width=48, num_modules=(1, 4, 3), num_blocks=4),
}
# Of ResNet: bottlenecks in stages 1 to 4.
RESNETS = {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}
VARIANTS = (*HRNETS, *RESNETS)
HEADS = ("ocr", "fcn")


class FCNHead(nn.Module):
    """The backbone alone: each pixel's class from its own features, without any object's context.

    With HRNet the layers of OCRHead's region head, as in mmsegmentation; with ResNet a 3x3 to 512 channels on stage 4.
    There is no other output, and so no other loss.

    Args:
        in_channels: channels of the features.
        channels, kernel_size: width and kernel of the hidden layer.
        num_classes: K.
        dropout: probability, in training, of dropping a whole channel before the classifier.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, kernel_size: int = 1, dropout: float = 0.0):
        super().__init__()
        self.hidden = conv_bn(in_channels, channels, kernel_size)
        self.classifier = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1))

    def forward(self, region_features: Tensor, features: Tensor) -> tuple[Tensor]:
        """The second of two feature maps, (B, in_channels, H, W) -> logits (B, K, H, W), the only output."""
        return (self.classifier(self.hidden(features)),)


class OCRNet(nn.Module):
    """image (B, 3, H, W), normalised RGB -> logits, region_logits, both (B, K, H, W) with the image's H and W.

    Args:
        backbone: image -> (features for the regions, features for the pixels).
        head: those two -> (logits, region_logits) at the features' size. With FCNHead there is but (logits,).
        align_corners: how logits are resized to the image's size (True only for weights trained that way).
        config: what ``build_model`` needs to build the same again.
    """

    def __init__(
        self, backbone: nn.Module, head: OCRHead | FCNHead, align_corners: bool = False, config: dict | None = None
    ):
        super().__init__()
        self.config = config or {}
        self.backbone = backbone
        self.head = head
        self.align_corners = align_corners
        self.init_weights()

    def init_weights(self) -> None:
        """Kaiming normal (fan out) for convolutions, normal(0, 0.01) for the classifiers."""
        convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        for conv in convolutions:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        for classifier in [conv for conv in convolutions if conv.bias is not None]:  # behind others: BatchNorm
            nn.init.normal_(classifier.weight, std=0.01)
            nn.init.zeros_(classifier.bias)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        region_features, features = self.backbone(image)  # (B, 15C, H/4, W/4) each with HRNet
        maps = self.head(region_features, features)  # logits and region logits, (B, K, H/4, W/4) each
        return tuple(self.resize(logits, image) for logits in maps)  # (B, K, H, W) each

    def resize(self, logits: Tensor, image: Tensor) -> Tensor:
        """(B, K, h, w) -> (B, K, H, W), bilinear."""
        # not channels_last, which the softmax over K that follows would copy into the usual layout at the full size
        return F.interpolate(
            logits.contiguous(), size=image.shape[-2:], mode="bilinear", align_corners=self.align_corners
        )


def build_model(
    name: str,
    num_classes: int = 19,
    align_corners: bool = False,
    dropout: float | None = None,
    deep_stem: bool = False,
    head: str = "ocr",
) -> OCRNet:
    """An OCRNet with random weights. ``model.config`` holds these arguments.

    Args:
        name: one of ``VARIANTS``.
        num_classes: K, 19 for Cityscapes.
        align_corners: how maps are resized; True in the authors' HRNet-OCR, False in the recipe.
        dropout: before the final classifier; left out: none with HRNet, 0.1 with ResNet. The authors' HRNet has 0.05.
        deep_stem: for ResNet, three 3x3 convolutions at its start, as mmsegmentation's has them.
        head: "ocr", or "fcn" for the backbone alone.

    Raises:
        InputError: there is no variant or head of that name.
    """
    config = dict(
        name=name,
        num_classes=num_classes,
        align_corners=align_corners,
        dropout=dropout,
        deep_stem=deep_stem,
        head=head,
    )
    if head not in HEADS:
        raise InputError(f"no head {head!r}: expected one of {', '.join(HEADS)}")
    if name in HRNETS:
        backbone = HRNet(**HRNETS[name], align_corners=align_corners)
        channels = 15 * HRNETS[name]["width"]  # C + 2C + 4C + 8C
        dropout = dropout or 0.0
        if head == "ocr":
            top = OCRHead(channels, channels, channels, num_classes, dropout=dropout)
        else:
            top = FCNHead(channels, channels, num_classes, dropout=dropout)
    elif name in RESNETS:
        from .resnet import ResNet  # here, as torchvision takes a second to import

        backbone = ResNet(RESNETS[name], deep_stem)
        dropout = 0.1 if dropout is None else dropout
        if head == "ocr":
            top = OCRHead(2048, 1024, 256, num_classes, region_kernel_size=3, region_dropout=dropout, dropout=dropout)
        else:
            top = FCNHead(2048, 512, num_classes, kernel_size=3, dropout=dropout)
    else:
        raise InputError(f"no model {name!r}: expected one of {', '.join(VARIANTS)}")
    return OCRNet(backbone, top, align_corners, config)
