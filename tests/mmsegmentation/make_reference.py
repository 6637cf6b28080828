"""Compute reference.json: logits, losses and gradients of mmsegmentation, in float64. See README.md.

    python tests/mmsegmentation/make_reference.py            compare with the file
    python tests/mmsegmentation/make_reference.py --write    write the file

tests/test_mmsegmentation.py gives the same weights and inputs to our model, and needs no mmsegmentation.

Notation: B batch, K = 19 classes, H W an image's size.
"""

import argparse
import json
import sys
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

REFERENCE = Path(__file__).with_name("reference.json")
MODELS = ("hr18s", "r101")
SIZES = ((64, 128), (97, 161))
TRAINED = "hr18s"  # has no dropout
# Largest difference from the file. Its logits were computed in fp32, whose rounding is 1.2e-6 of the largest logit.
TOLERANCES = {"logits": 2e-6, "losses": 1e-9, "gradients": 1e-9}
GRADIENTS = (
    "backbone.conv1.weight",
    "backbone.stage4.1.fuse_layers.0.3.0.weight",
    "decode_head.0.conv_seg.weight",
    "decode_head.1.object_context_block.key_project.1.conv.weight",
    "decode_head.1.conv_seg.bias",
)


def tensor_of(name: str, like: Tensor) -> Tensor:
    """A tensor that depends only on its name in mmsegmentation and its shape. Integers are returned as they are."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if like.dtype == torch.int64:
        return like
    if name.endswith("running_var"):
        return torch.rand(like.shape, generator=generator) + 0.5
    if like.ndim == 1 and name.endswith("weight"):
        return torch.rand(like.shape, generator=generator) * 0.5 + 0.5
    if like.ndim == 1:
        return torch.randn(like.shape, generator=generator) * 0.1
    return torch.randn(like.shape, generator=generator) * (2 / like[0].numel()) ** 0.5  # by the fan in


def random_image(*shape: int, seed: int) -> Tensor:
    """Normal values, in place of a normalized image."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def train_batch() -> tuple[Tensor, Tensor]:
    """Images (2, 3, 64, 128) in float64 and labels (2, 64, 128), whose first nine rows are ignored."""
    label = torch.randint(0, 19, (2, 64, 128), generator=torch.Generator().manual_seed(2))
    label[:, :9] = 255
    return random_image(2, 3, 64, 128, seed=1).double(), label


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)


@torch.inference_mode()
def peer_logits(model: nn.Module, size: tuple[int, int]) -> list[list[float]]:
    """Final logits and region logits of pixel (H // 3, W // 2), resized to the image: 2 x 19."""
    features = model.eval().extract_feat(random_image(1, 3, *size, seed=size[0]).double())
    region_logits = model.decode_head[0](features)  # (1, K, H/4, W/4), r101: (1, K, H/8, W/8)
    logits = model.decode_head[1](features, region_logits)
    pixels = []
    for x in (logits, region_logits):
        x = nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
        pixels.append([round(value, 6) for value in x[0, :, size[0] // 3, size[1] // 2].tolist()])
    return pixels


def peer_steps(model: nn.Module, steps: int = 3) -> tuple[list[list[float]], dict[str, float]]:
    """Train. Return (final loss, 0.4 * auxiliary loss) of each step, and gradient norms of the first."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    model.train()
    image, label = train_batch()
    meta = dict(img_shape=(64, 128), ori_shape=(64, 128), pad_shape=(64, 128))
    samples = [SegDataSample(gt_sem_seg=PixelData(data=y[None]), metainfo=meta) for y in label]
    optimizer = sgd(model)
    losses, gradients = [], {}
    for step in range(steps):
        parts = model.loss(image, samples)
        optimizer.zero_grad()
        (parts["decode_1.loss_ce"] + parts["decode_0.loss_ce"]).backward()
        losses.append([parts["decode_1.loss_ce"].item(), parts["decode_0.loss_ce"].item()])
        if step == 0:
            parameters = dict(model.named_parameters())
            gradients = {name: parameters[name].grad.norm().item() for name in GRADIENTS}
        optimizer.step()
    return losses, gradients


def make_reference() -> dict:
    from peer import build_peer, load_config

    load_config(TRAINED)  # imports mmsegmentation without compiled operators
    reference = {}
    for name in MODELS:
        model = build_peer(load_config(name), (64, 128)).double()
        model.load_state_dict({key: tensor_of(key, x) for key, x in model.state_dict().items()})
        reference[name] = {"logits": {f"{size[0]}x{size[1]}": peer_logits(model, size) for size in SIZES}}
        if name == TRAINED:
            reference[name]["losses"], reference[name]["gradients"] = peer_steps(model)
    return reference


def largest_difference(found: dict, expected: dict) -> float:
    """Of the numbers in two nested dicts or lists of one structure, relative to the largest of their list or dict."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), f"expected {list(expected)}, found {list(found)}"
        return max(largest_difference(found[key], expected[key]) for key in expected)
    found, expected = (torch.tensor(x, dtype=torch.float64) for x in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write reference.json")
    args = parser.parse_args()
    reference = make_reference()
    if args.write:
        REFERENCE.write_text(json.dumps(reference, indent=1) + "\n")
        return
    committed, failed = json.loads(REFERENCE.read_text()), False
    for name in committed:
        for part, tolerance in TOLERANCES.items():
            if part in committed[name]:
                difference = largest_difference(reference[name][part], committed[name][part])
                print(f"{name} {part}: largest relative difference {difference:.1e}, tolerance {tolerance:.0e}")
                failed |= difference > tolerance
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
