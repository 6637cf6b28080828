"""Object-contextual representations: describe each pixel by the object it belongs to.

Paper: "Object-Contextual Representations for Semantic Segmentation", https://arxiv.org/abs/1909.11065

    the paper, section 3                                                          here             shape
    soft object regions      M_1 .. M_K, a first, coarse segmentation             region_head      (B, K, H, W)
    pixel representations    x_i                                                  pixel_head       x (B, C, H, W)
    object region            f_k = sum_i m~_ki x_i                                SpatialGather    f (B, C, K, 1)
      representations        m~_k = softmax of M_k over the pixels i                               m (B, K, N)
    pixel-region relation    w_ik = exp kappa(x_i, f_k) / sum_j exp kappa(x_i, f_j)                w (B, N, K)
                             kappa(x, f) = phi(x)^T psi(f) / sqrt(D)              ObjectAttention.relation
    object-contextual        y_i = rho( sum_k w_ik delta(f_k) )                   ObjectAttention  y (B, C, H, W)
    augmented                z_i = g( [y_i, x_i] )                                OCRHead.augment  z (B, C, H, W)
    final segmentation                                                            classifier       (B, K, H, W)

M are the region logits. They are used twice: the loss takes their softmax over the *classes*, the gather over the
*pixels*.

Letters: B batch, C channels of a pixel representation (512), H W the feature map's size, N = H * W its pixels,
K classes (one object region each), D channels of phi, psi and delta (256). Tensors carry the paper's letters:
x pixel representations, m weights of the soft object regions, f region representations, w relations, y contexts,
z augmented; and those of attention: q = phi(x), k = psi(f) / sqrt(D), v = what the relation mixes.

Where the text says something else, or nothing, this is the authors' code, and so what every checkpoint needs:

    1/sqrt(D)      the text's kappa has none. It keeps the sums of D products, and with them the softmax, from growing
                   with D until one region takes all and the others get no gradient.
    region_head    has a hidden layer; the text has one 1x1 convolution.
    phi, psi       two 1x1 convolutions each; the text says one.
    no detach      the final loss reaches the region logits through m, and shapes them beside their own loss.
    [y_i, x_i]     the text has x_i first: the order of g's weights and nothing else.

And where it is neither's, it is the same up to rounding: the gather runs in fp32 (SpatialGather says why), rho's
convolution runs on the regions (ObjectAttention), g's on y and on x, added (OCRHead.augment).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hrnet import conv_bn


class SpatialGather(nn.Module):
    """Object region representations: each class's mean pixel, weighted by its soft object region.

    f_k = sum_i m~_ki x_i, with m~_k the softmax of region map k over the *pixels*, so that the N weights of a class
    sum to one. Runs in fp32 whatever autocast says: a weight is about 1/N (3e-5 for the 32,768 pixels of a 512x1024
    crop), below the smallest normal fp16 number (6e-5), and the sum has as many terms.

    >>> x = torch.tensor([1.0, 2.0, 9.0]).view(1, 1, 1, 3)  # three pixels of one channel
    >>> regions = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 50.0]]).view(1, 2, 1, 3)  # of two classes
    >>> SpatialGather()(x, regions).flatten().tolist()  # the mean of all pixels; the third alone
    [4.0, 9.0]
    """

    def forward(self, x: Tensor, region_logits: Tensor) -> Tensor:
        """x (B, C, H, W), region_logits (B, K, H, W) -> f (B, C, K, 1), fp32 or wider."""
        with torch.autocast(x.device.type, enabled=False):
            m = self.weights(region_logits)  # (B, K, N)
            f = m @ x.to(m.dtype).flatten(2).transpose(1, 2)  # (B, K, N) @ (B, N, C) = (B, K, C)
        return f.transpose(1, 2).unsqueeze(3)  # (B, C, K, 1): an image of K pixels, for 1x1 convolutions

    def weights(self, region_logits: Tensor) -> Tensor:
        """region_logits (B, K, H, W) -> m (B, K, N), fp32 or wider; each row, a class's, sums to one."""
        wide = region_logits.to(torch.promote_types(region_logits.dtype, torch.float32))
        return wide.flatten(2).softmax(dim=2)


class ObjectAttention(nn.Module):
    """Pixel-region relation and object-contextual representations.

    w_ik = softmax over the *classes* of phi(x_i)^T psi(f_k) / sqrt(D); y_i = rho(sum_k w_ik delta(f_k)).
    phi, psi, delta and rho are 1x1 convolutions with BatchNorm and ReLU, phi and psi two of them.

    rho's convolution is applied to the K regions instead of to the N pixels: projected before or after the weighted
    sum, it is the same, and K is 19 where N is 32,768.
    """

    def __init__(self, in_channels: int = 512, key_channels: int = 256):
        super().__init__()
        self.scale = key_channels**-0.5
        self.phi = nn.Sequential(conv_bn(in_channels, key_channels, 1), conv_bn(key_channels, key_channels, 1))
        self.psi = nn.Sequential(conv_bn(in_channels, key_channels, 1), conv_bn(key_channels, key_channels, 1))
        self.delta = conv_bn(in_channels, key_channels, 1)
        self.rho = conv_bn(key_channels, in_channels, 1)

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """x (B, C, H, W), f (B, C, K, 1) -> y (B, C, H, W)."""
        conv, bn, relu = self.rho
        w = self.relation(x, f)  # (B, N, K)
        v = conv(self.delta(f)).flatten(2).transpose(1, 2)  # (B, K, C)
        y = (w @ v).unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)  # (B, N, C) -> (B, C, H, W)
        return relu(bn(y))

    def relation(self, x: Tensor, f: Tensor) -> Tensor:
        """w (B, N, K): relation of pixel i to each region, the weights of its context; each row sums to one."""
        q = self.phi(x).flatten(2).transpose(1, 2)  # (B, N, D)
        k = self.psi(f).flatten(2) * self.scale  # (B, D, K), scaled before the product: fp16's range is small
        return (q @ k).softmax(dim=2)


class OCRHead(nn.Module):
    """The OCR head: features -> logits of the final segmentation and of the soft object regions.

    Args:
        in_channels: channels of the features that pixel representations are made from.
        region_in_channels: channels of the features that soft object regions are made from.
        region_channels, region_kernel_size: width and kernel of the region head's hidden layer.
        num_classes: K.
        channels: C, of a pixel representation.
        key_channels: D.
        region_dropout, dropout: probability, in training, of dropping a whole channel before either classifier. The
            recipe has none with HRNet, 0.1 with ResNet.
    """

    def __init__(
        self,
        in_channels: int,
        region_in_channels: int,
        region_channels: int,
        num_classes: int,
        region_kernel_size: int = 1,
        channels: int = 512,
        key_channels: int = 256,
        region_dropout: float = 0.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.region_head = nn.Sequential(
            conv_bn(region_in_channels, region_channels, region_kernel_size),
            nn.Dropout2d(region_dropout),
            nn.Conv2d(region_channels, num_classes, 1),
        )
        self.pixel_head = conv_bn(in_channels, channels, 3)
        self.gather = SpatialGather()
        self.attention = ObjectAttention(channels, key_channels)
        self.g = conv_bn(2 * channels, channels, 1)
        self.classifier = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1))

    def forward(self, region_features: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, region_in_channels, H, W), (B, in_channels, H, W) -> logits and region_logits, both (B, K, H, W)."""
        region_logits = self.region_head(region_features)  # (B, K, H, W) soft object regions, before their softmax
        x = self.pixel_head(features)  # (B, C, H, W) pixel representations
        f = self.gather(x, region_logits)  # (B, C, K, 1) object region representations
        y = self.attention(x, f)  # (B, C, H, W) object-contextual representations
        z = self.augment(y, x)  # (B, C, H, W) augmented representations
        return self.classifier(z), region_logits

    def augment(self, y: Tensor, x: Tensor) -> Tensor:
        """z = g([y, x]), all three (B, C, H, W); g's convolution of y and of x, added: [y, x] is never stored."""
        conv, bn, relu = self.g
        of_y, of_x = conv.weight.chunk(2, dim=1)  # (C, C, 1, 1) each
        return relu(bn(F.conv2d(y, of_y) + F.conv2d(x, of_x)))
