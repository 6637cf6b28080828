"""OCRNet: a backbone and a head, with the logits resized to the image.

    image (B, 3, H, W) -> backbone: features at 1/4 (ResNet: 1/8) -> head: logits at 1/4 -> logits (B, K, H, W)

A new backbone is a module in a file of its own. It initializes itself, maps an image to features for the regions and
features for the pixels of one size, and states what the heads need. The line ``"toy": Toy`` in ``BACKBONES`` makes this
one available as ``--model toy``:

    import torch
    import torch.nn.functional as F
    from torch import nn

    from ocrnet.models.hrnet import conv_bn_relu, init_weights

    class Toy(nn.Module):
        out_channels = (48, 48)  # of the features for the regions and for the pixels
        reduction, kernel_size = 1, 1  # of the hidden layer of the heads, see OCRHead
        head_channels = (64, 32)  # channels and key_channels of OCRHead
        dropout = 0.0  # before the classifiers
        align_corners = False  # of a module that resizes, see OCRNet.set_align_corners

        def __init__(self):
            super().__init__()
            self.fine = nn.Sequential(conv_bn_relu(3, 16, 3, stride=2), conv_bn_relu(16, 16, 3, stride=2))
            self.coarse = conv_bn_relu(16, 32, 3, stride=2)
            init_weights(self)

        def forward(self, image):
            x = self.fine(image)  # (B, 16, H/4, W/4)
            y = self.coarse(x)  # (B, 32, H/8, W/8)
            y = F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=self.align_corners)
            features = torch.cat([x, y], dim=1)  # (B, 48, H/4, W/4)
            return features, features

Notation: B batch, H W the image's size, K classes.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .. import InputError
from .hrnet import HRNet
from .ocr import FCNHead, OCRHead


def resnet(layers: tuple[int, ...]) -> nn.Module:
    from .resnet import ResNet  # here, because torchvision takes a second to import

    return ResNet(layers)


BACKBONES = {
    "hr18t": partial(HRNet, width=18, num_modules=(1, 1, 1), num_blocks=2, head_channels=(128, 64)),  # of the demo
    "hr18s": partial(HRNet, width=18, num_modules=(1, 3, 2), num_blocks=2),  # the authors' W18-Small-v2
    "hr18": partial(HRNet, width=18),
    "hr32": partial(HRNet, width=32),
    "hr48": partial(HRNet, width=48),
    "r50": partial(resnet, layers=(3, 4, 6, 3)),
    "r101": partial(resnet, layers=(3, 4, 23, 3)),
}
HEADS = ("ocr", "fcn")


class OCRNet(nn.Module):
    """Normalized RGB image (B, 3, H, W) -> logits, region_logits, both (B, K, H, W). With FCNHead only (logits,).

    Args:
        backbone: image -> (region_features, features).
        head: (region_features, features) -> (logits, region_logits) at the size of the features.
        config: the arguments of ``build_model`` that build the same model.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, config: dict | None = None):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.align_corners = False
        self.config = config or {}

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        region_features, features = self.backbone(image)  # (B, 15C, H/4, W/4) each with HRNet
        outputs = self.head(region_features, features)  # (B, K, H/4, W/4) each
        return tuple(self.resize(logits, image) for logits in outputs)  # (B, K, H, W) each

    def resize(self, logits: Tensor, image: Tensor) -> Tensor:
        """(B, K, h, w) -> (B, K, H, W), bilinear."""
        # contiguous, because the softmax over K that follows would copy channels_last logits at the full size
        return F.interpolate(logits.contiguous(), image.shape[-2:], mode="bilinear", align_corners=self.align_corners)

    def train(self, mode: bool = True) -> "OCRNet":
        """As ``nn.Module.train``, but modules without a trainable parameter stay in evaluation mode.

        So ``net.backbone.requires_grad_(False)`` also keeps the statistics of BatchNorm, which are no parameters.
        """
        super().train(mode)
        for module in self.modules() if mode else ():  # eval() calls train(False)
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        return self

    def set_align_corners(self, align_corners: bool) -> None:
        """How all feature maps and logits are resized: True for the authors' weights, False in the recipe."""
        for module in self.modules():
            if hasattr(module, "align_corners"):
                module.align_corners = align_corners
        self.config["align_corners"] = align_corners


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
        name: of ``BACKBONES``.
        num_classes: K, 19 for Cityscapes.
        align_corners: see ``OCRNet.set_align_corners``.
        dropout: before the final classifier. None for the backbone's own: 0.1 with ResNet, 0 with HRNet. The region
            classifier gets the same with ResNet and always 0 with HRNet, as in mmsegmentation.
        deep_stem: ResNet with three 3x3 convolutions at its start, as in mmsegmentation.
        head: "ocr", or "fcn" for the backbone with a plain classifier.

    Raises:
        InputError: there is no backbone or head of that name.
    """
    config = dict(locals())  # the arguments above
    if name not in BACKBONES:
        raise InputError(f"--model: expected one of {', '.join(BACKBONES)}, found {name!r}")
    if num_classes < 2:
        raise InputError(f"num_classes: expected 2 or more, found {num_classes}")
    if head not in HEADS:
        raise InputError(f"--head: expected one of {', '.join(HEADS)}, found {head!r}")
    backbone = BACKBONES[name]()
    if deep_stem:
        backbone.use_deep_stem()
    region_in_channels, in_channels = backbone.out_channels
    channels, key_channels = backbone.head_channels
    dropout = backbone.dropout if dropout is None else dropout
    common = dict(reduction=backbone.reduction, kernel_size=backbone.kernel_size, dropout=dropout)
    if head == "ocr":
        common["region_dropout"] = dropout if backbone.dropout else 0.0  # none with HRNet, whose own is 0
        built = OCRHead(
            region_in_channels, in_channels, num_classes, channels=channels, key_channels=key_channels, **common
        )
    else:
        built = FCNHead(in_channels, num_classes, **common)
    model = OCRNet(backbone, built, config)
    model.set_align_corners(align_corners)
    return model
