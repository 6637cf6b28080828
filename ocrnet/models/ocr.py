"""Object-contextual representations: describe each pixel by the object it belongs to.

Paper: "Object-Contextual Representations for Semantic Segmentation", https://arxiv.org/abs/1909.11065

    the paper, section 3                                                          here             shape
    soft object regions      M_1 .. M_K, a coarse segmentation                    region_head      (B, K, H, W)
    pixel representations    x_i                                                  pixel_head       x (B, C, H, W)
    object region            f_k = sum_i m~_ki x_i                                SpatialGather    f (B, C, K, 1)
      representations        m~_k = softmax of M_k over the pixels i                               m (B, K, N)
    pixel-region relation    w_ik = exp kappa(x_i, f_k) / sum_j exp kappa(x_i, f_j)                w (B, N, K)
                             kappa(x, f) = phi(x)^T psi(f) / sqrt(D)              ObjectAttention.relation
    object-contextual        y_i = rho( sum_k w_ik delta(f_k) )                   ObjectAttention  y (B, C, H, W)
    augmented                z_i = g( [y_i, x_i] )                                g                z (B, C, H, W)
    final segmentation                                                            classifier       (B, K, H, W)

M are the ``region_logits``, the auxiliary output. They are used twice: the auxiliary loss takes their softmax over the
*classes*, the gather over the *pixels*.

Notation: B batch, C channels of a pixel representation (512), H W the feature map's size, N = H * W its pixels,
K classes (one object region each), D channels of phi, psi and delta (256). Tensors have the paper's letters: x pixel
representations, m soft object regions after the softmax over pixels, f region representations, w relations,
y contexts, z augmented representations; in the attention q = phi(x), k = psi(f) / sqrt(D), v = rho's 1x1 of delta(f).

Where the paper differs or is silent we follow the authors' code, as released checkpoints require:

    1/sqrt(D)      not in the paper's kappa. It keeps the softmax from saturating as D grows.
    region_head    has a hidden layer. The paper has one 1x1 convolution.
    phi, psi       are two 1x1 convolutions each. The paper has one.
    no detach      the final loss also trains region_logits, through m.
    [y_i, x_i]     the paper has x_i first. This is the order of g's input channels and nothing else.

Equal up to rounding: the gather runs in fp32 (see SpatialGather), and rho's convolution runs on the regions (see
ObjectAttention).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .hrnet import conv_bn_relu, init_weights


def without_autocast(device_type: str) -> AbstractContextManager:
    """autocast off. Where it is off already, as on meta tensors, which do not know it, a context that does nothing."""
    on = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


class SpatialGather(nn.Module):
    """Object region representations: f_k = sum_i m~_ki x_i, each class's weighted mean of the pixels.

    m~_k is the softmax of region_logits k over the *pixels*, so the N weights of a class sum to one. Runs in fp32, also
    under autocast: a weight is about 1/N (3e-5 for the 32,768 pixels of a 512x1024 crop), below the smallest normal
    fp16 number (6e-5), and the sum has N terms.

    >>> x = torch.tensor([1.0, 2.0, 9.0]).view(1, 1, 1, 3)  # three pixels of one channel
    >>> region_logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 50.0]]).view(1, 2, 1, 3)  # of two classes
    >>> SpatialGather()(x, region_logits).flatten().tolist()  # the mean of all pixels; the third pixel
    [4.0, 9.0]
    """

    def forward(self, x: Tensor, region_logits: Tensor) -> Tensor:
        """x (B, C, H, W), region_logits (B, K, H, W) -> f (B, C, K, 1), fp32 or wider."""
        with without_autocast(x.device.type):
            m = self.spatial_softmax(region_logits)  # (B, K, N)
            f = m @ x.to(m.dtype).flatten(2).transpose(1, 2)  # (B, K, N) @ (B, N, C) = (B, K, C)
        return f.transpose(1, 2).unsqueeze(3)  # (B, C, K, 1): an image of K pixels, for 1x1 convolutions

    def spatial_softmax(self, region_logits: Tensor) -> Tensor:
        """region_logits (B, K, H, W) -> m (B, K, N), fp32 or wider. Each row, one class, sums to one."""
        wide = region_logits.to(torch.promote_types(region_logits.dtype, torch.float32))
        return wide.flatten(2).softmax(dim=2)


class ObjectAttention(nn.Module):
    """Pixel-region relation and object-contextual representations.

    w_ik = softmax over the *classes* of phi(x_i)^T psi(f_k) / sqrt(D); y_i = rho(sum_k w_ik delta(f_k)).
    phi, psi, delta and rho are 1x1 convolutions with BatchNorm and ReLU; phi and psi have two.

    rho's convolution runs on the K regions instead of the N pixels (K = 19, N = 32,768). Both are linear, so
    projecting before the weighted sum gives the same as after.
    """

    def __init__(self, in_channels: int = 512, key_channels: int = 256):
        super().__init__()
        self.scale = key_channels**-0.5
        self.phi = nn.Sequential(
            conv_bn_relu(in_channels, key_channels, 1), conv_bn_relu(key_channels, key_channels, 1)
        )
        self.psi = nn.Sequential(
            conv_bn_relu(in_channels, key_channels, 1), conv_bn_relu(key_channels, key_channels, 1)
        )
        self.delta = conv_bn_relu(in_channels, key_channels, 1)
        self.rho = conv_bn_relu(key_channels, in_channels, 1)

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """x (B, C, H, W), f (B, C, K, 1) -> y (B, C, H, W)."""
        conv, bn, relu = self.rho
        w = self.relation(x, f)  # (B, N, K)
        v = conv(self.delta(f)).flatten(2).transpose(1, 2)  # (B, K, C)
        y = (w @ v).unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)  # (B, N, C) -> (B, C, H, W)
        return relu(bn(y))

    def relation(self, x: Tensor, f: Tensor) -> Tensor:
        """x (B, C, H, W), f (B, C, K, 1) -> w (B, N, K). Each row, one pixel, sums to one."""
        q = self.phi(x).flatten(2).transpose(1, 2)  # (B, N, D)
        k = self.psi(f).flatten(2) * self.scale  # (B, D, K), scaled before the product, which may overflow in fp16
        return (q @ k).softmax(dim=2)


class OCRHead(nn.Module):
    """The OCR head: features -> logits of the final segmentation, and region_logits.

    Args:
        region_in_channels: channels of the features for the soft object regions.
        in_channels: channels of the features for the pixel representations.
        num_classes: K.
        reduction, kernel_size: of the region head's hidden layer, a convolution to region_in_channels / reduction.
        channels: C.
        key_channels: D.
        region_dropout, dropout: probability of dropping a channel before the region classifier and the final one.
    """

    def __init__(
        self,
        region_in_channels: int,
        in_channels: int,
        num_classes: int,
        reduction: int = 1,
        kernel_size: int = 1,
        channels: int = 512,
        key_channels: int = 256,
        region_dropout: float = 0.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        hidden = region_in_channels // reduction
        self.region_head = nn.Sequential(
            conv_bn_relu(region_in_channels, hidden, kernel_size),
            nn.Dropout2d(region_dropout),
            nn.Conv2d(hidden, num_classes, 1),
        )
        self.pixel_head = conv_bn_relu(in_channels, channels, 3)
        self.gather = SpatialGather()
        self.attention = ObjectAttention(channels, key_channels)
        self.g = conv_bn_relu(2 * channels, channels, 1)
        self.classifier = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1))
        init_weights(self)
        init_classifier(self.region_head[-1])
        init_classifier(self.classifier[-1])

    def forward(self, region_features: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, region_in_channels, H, W), (B, in_channels, H, W) -> logits, region_logits, both (B, K, H, W)."""
        region_logits = self.region_head(region_features)  # (B, K, H, W) soft object regions, before their softmax
        x = self.pixel_head(features)  # (B, C, H, W) pixel representations
        f = self.gather(x, region_logits).to(x.dtype)  # (B, C, K, 1) object region representations
        y = self.attention(x, f)  # (B, C, H, W) object-contextual representations
        z = self.g(torch.cat([y, x], dim=1))  # (B, C, H, W) augmented representations
        return self.classifier(z), region_logits


class FCNHead(nn.Module):
    """The baseline of the paper's tables: classify each pixel by its own features, without object context.

    It has the layers and arguments of OCRHead's region head, here on the features of the pixels, as in mmsegmentation,
    and no auxiliary output.
    """

    def __init__(
        self, in_channels: int, num_classes: int, reduction: int = 1, kernel_size: int = 1, dropout: float = 0.0
    ):
        super().__init__()
        hidden = in_channels // reduction
        self.hidden = conv_bn_relu(in_channels, hidden, kernel_size)
        self.classifier = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(hidden, num_classes, 1))
        init_weights(self)
        init_classifier(self.classifier[-1])

    def forward(self, region_features: Tensor, features: Tensor) -> tuple[Tensor]:
        """features (B, in_channels, H, W) -> (logits,), (B, K, H, W). ``region_features`` are not used."""
        return (self.classifier(self.hidden(features)),)


def init_classifier(conv: nn.Conv2d) -> None:
    """Normal(0, 0.01) weights and zero bias, as in mmsegmentation."""
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
