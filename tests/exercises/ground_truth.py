"""Exercise 3, first part: the regions are gathered from the label. See README.md.

Notation: B batch, H W the image's size, h w the feature map's, K classes.
"""

import torch
import torch.nn.functional as F
from solution import keep_labels, run
from torch import Tensor

from ocrnet.models import OCRHead


def true_regions(label: Tensor, num_classes: int, like: Tensor) -> Tensor:
    """label (B, H, W) -> (B, K, h, w), with size, device and type of ``like`` (B, C, h, w).

    1e4 inside of a class and 0 outside: the gather's softmax gives the pixels of the class equal weights, and all
    others none. Where a class does not occur, all pixels have equal weights.
    """
    label = F.interpolate(label[:, None].to(like), size=like.shape[-2:], mode="nearest")  # (B, 1, h, w)
    classes = torch.arange(num_classes, device=like.device)[:, None, None]  # (K, 1, 1)
    return 1e4 * (label == classes).to(like.dtype)


def forward(self, region_features, features):
    region_logits = self.region_head(region_features)
    x = self.pixel_head(features)
    f = self.gather(x, true_regions(self.label, region_logits.shape[1], like=x))  # the change
    y = self.attention(x, f)
    z = self.g(torch.cat([y, x], dim=1))
    return self.classifier(z), region_logits


keep_labels()
OCRHead.forward = forward

if __name__ == "__main__":
    run()
