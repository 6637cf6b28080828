"""OCRNet: a backbone, the OCR head, and both segmentations brought back to the image's size.

    image (B, 3, H, W) -> backbone: features at 1/4 -> OCRHead: two logit maps (B, K, H/4, W/4) -> two (B, K, H, W)

Letters: B batch, H W the image's size, K classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .hrnet import HRNet
from .ocr import OCRHead

# The variants of HRNet: width C, HRModules in stages 2 to 4, residual blocks a branch. A new width is a new line here.
VARIANTS = {
    "hr18s": dict(width=18, num_modules=(1, 3, 2), num_blocks=2),
    "hr18": dict(width=18, num_modules=(1, 4, 3), num_blocks=4),
    "hr32": dict(width=32, num_modules=(1, 4, 3), num_blocks=4),
    "hr48": dict(width=48, num_modules=(1, 4, 3), num_blocks=4),
}


class OCRNet(nn.Module):
    """image (B, 3, H, W), normalised RGB -> logits, region_logits, both (B, K, H, W) with the image's H and W.

    Args:
        backbone: image -> (features for the regions, features for the pixels).
        head: those two -> (logits, region_logits) at the features' size.
        align_corners: how logits are resized to the image's size (True only for weights trained that way).
    """

    def __init__(self, backbone: nn.Module, head: OCRHead, align_corners: bool = False):
        super().__init__()
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
        return F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=self.align_corners)


def build_model(name: str, num_classes: int = 19) -> OCRNet:
    """An OCRNet with random weights.

    Args:
        name: one of ``VARIANTS``.
        num_classes: K, 19 for Cityscapes.

    Raises:
        InputError: there is no variant of that name.
    """
    if name not in VARIANTS:
        raise InputError(f"no model {name!r}: expected one of {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    features = 15 * variant["width"]  # C + 2C + 4C + 8C
    head = OCRHead(in_channels=features, region_in_channels=features, region_channels=features, num_classes=num_classes)
    return OCRNet(HRNet(**variant), head)
