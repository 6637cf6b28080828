"""OCRNet: a backbone, the OCR head, and both segmentations brought back to the image's size.

    image (B, 3, H, W) -> backbone: features at 1/4 -> OCRHead: two logit maps (B, K, H/4, W/4) -> two (B, K, H, W)

Letters: B batch, H W the image's size, K classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .hrnet import HRNet
from .ocr import OCRHead

# The variants. Of HRNet: width C, HRModules in stages 2 to 4, residual blocks a branch. A new width is a new line here.
HRNETS = {
    "hr18s": dict(width=18, num_modules=(1, 3, 2), num_blocks=2),
    "hr18": dict(width=18, num_modules=(1, 4, 3), num_blocks=4),
    "hr32": dict(width=32, num_modules=(1, 4, 3), num_blocks=4),
    "hr48": dict(width=48, num_modules=(1, 4, 3), num_blocks=4),
}
# Of ResNet: bottlenecks in stages 1 to 4.
RESNETS = {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}
VARIANTS = (*HRNETS, *RESNETS)


class OCRNet(nn.Module):
    """image (B, 3, H, W), normalised RGB -> logits, region_logits, both (B, K, H, W) with the image's H and W.

    Args:
        backbone: image -> (features for the regions, features for the pixels).
        head: those two -> (logits, region_logits) at the features' size.
        align_corners: how logits are resized to the image's size (True only for weights trained that way).
        config: what ``build_model`` needs to build the same again.
    """

    def __init__(self, backbone: nn.Module, head: OCRHead, align_corners: bool = False, config: dict | None = None):
        super().__init__()
        self.config = config or {}
        self.backbone = backbone
        self.head = head
        self.align_corners = align_corners
        self.init_weights()

    def init_weights(self):
        """Kaiming normal (fan out) for convolutions, normal(0, 0.01) for the two classifiers."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for classifier in (self.head.region_head[-1], self.head.classifier[-1]):
            nn.init.normal_(classifier.weight, std=0.01)
            nn.init.zeros_(classifier.bias)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        region_features, features = self.backbone(image)
        logits, region_logits = self.head(region_features, features)
        return self.resize(logits, image), self.resize(region_logits, image)

    def resize(self, logits: Tensor, image: Tensor) -> Tensor:
        """(B, K, h, w) -> (B, K, H, W), bilinear."""
        # not channels_last, which the softmax over K that follows would copy into the usual layout at the full size
        return F.interpolate(
            logits.contiguous(), size=image.shape[-2:], mode="bilinear", align_corners=self.align_corners
        )


def build_model(
    name: str, num_classes: int = 19, align_corners: bool = False, dropout: float | None = None, deep_stem: bool = False
) -> OCRNet:
    """An OCRNet with random weights. ``model.config`` holds these arguments.

    Args:
        name: one of ``VARIANTS``.
        num_classes: K, 19 for Cityscapes.
        align_corners: how maps are resized; True in the authors' HRNet-OCR, False in the recipe.
        dropout: before the final classifier; left out: none with HRNet, 0.1 with ResNet. The authors' HRNet has 0.05.
        deep_stem: for ResNet, three 3x3 convolutions at its start, as mmsegmentation's has them.

    Raises:
        InputError: there is no variant of that name.
    """
    config = dict(name=name, num_classes=num_classes, align_corners=align_corners, dropout=dropout, deep_stem=deep_stem)
    if name in HRNETS:
        backbone = HRNet(**HRNETS[name], align_corners=align_corners)
        features = 15 * HRNETS[name]["width"]  # C + 2C + 4C + 8C
        head = OCRHead(features, features, features, num_classes, dropout=dropout or 0.0)
    elif name in RESNETS:
        from .resnet import ResNet  # here, as torchvision takes a second to import

        backbone = ResNet(RESNETS[name], deep_stem)
        dropout = 0.1 if dropout is None else dropout
        head = OCRHead(2048, 1024, 256, num_classes, region_kernel_size=3, region_dropout=dropout, dropout=dropout)
    else:
        raise InputError(f"no model {name!r}: expected one of {', '.join(VARIANTS)}")
    return OCRNet(backbone, head, align_corners, config)
