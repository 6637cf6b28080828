"""Logits, losses and gradients of mmsegmentation 1.2.2, held without it.

``mmsegmentation.json`` was made with mmsegmentation 1.2.2, mmengine 0.10.7 and mmcv-lite 2.1.0: its models of
ocrnet_hr18s_4xb2-40k and ocrnet_r101-d8_4xb2-40k (cityscapes-512x1024), norm_cfg BN, no dropout, got the tensors of
``tensor_of`` under their own names. Then, for hr18s and r101, in evaluation: the 19 final and region logits of pixel
(H // 3, W // 2) of a random image of 64x128 and of 97x161, resized to the image. For hr18s, in training, in float64:
both losses of three SGD steps (lr 1e-3, momentum 0.9, weight decay 5e-4) on one batch of two, and the norms of some
gradients of the first.
"""

import json
import zlib
from pathlib import Path

import pytest
import torch
from conftest import as_mmsegmentation

from ocrnet.losses import ocr_loss
from ocrnet.models import build_model, load_weights
from ocrnet.models.weights import translate

EXPECTED = json.loads(Path(__file__).with_name("mmsegmentation.json").read_text())


def tensor_of(name, like):
    """A tensor that depends on its name in mmsegmentation and on its shape alone."""
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if like.dtype == torch.int64:
        return like
    if name.endswith("running_var"):
        return torch.rand(like.shape, generator=g) + 0.5
    if name.endswith("running_mean"):
        return torch.randn(like.shape, generator=g) * 0.1
    if like.ndim == 1 and name.endswith("weight"):
        return torch.rand(like.shape, generator=g) * 0.5 + 0.5
    if like.ndim == 1:
        return torch.randn(like.shape, generator=g) * 0.1
    fan_in = like.shape[1] * like.shape[2] * like.shape[3]
    return torch.randn(like.shape, generator=g) * (2 / fan_in) ** 0.5


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    """Our model with mmsegmentation's tensors, come in through a file of theirs."""
    deep = request.param == "r101"
    names = as_mmsegmentation(build_model(request.param, deep_stem=deep))
    path = tmp_path_factory.mktemp("weights") / "mmseg.pth"
    torch.save({"state_dict": {name: tensor_of(name, x) for name, x in names.items()}}, path)
    model = build_model(request.param, dropout=0.0)
    load_weights(model, path)
    return model


@pytest.mark.parametrize("model", ["hr18s", "r101"], indirect=True)
@pytest.mark.parametrize("size", [(64, 128), (97, 161)])
def test_logits_are_mmsegmentations(model, size):
    height, width = size
    with torch.inference_mode():
        ours = [x[0, :, height // 3, width // 2] for x in model.eval()(random(1, 3, height, width, seed=height))]
    expected = torch.tensor(EXPECTED[model.config["name"]]["logits"][f"{height}x{width}"])
    torch.testing.assert_close(torch.stack(ours), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("model", ["hr18s"], indirect=True)
def test_losses_gradients_and_steps_are_mmsegmentations(model):
    expected = EXPECTED["hr18s"]
    model = model.double().train()
    image = random(2, 3, 64, 128, seed=1).double()
    label = torch.randint(0, 19, (2, 64, 128), generator=torch.Generator().manual_seed(2))
    label[:, :9] = 255
    _, name_of = translate(as_mmsegmentation(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    for step, (final, regions) in enumerate(expected["losses"]):
        loss, parts = ocr_loss(model(image), label)
        torch.testing.assert_close(parts, torch.tensor([final, regions / 0.4]).double(), rtol=1e-7, atol=0)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            parameters = dict(model.named_parameters())
            for name, norm in expected["gradients"].items():
                assert parameters[name_of[name]].grad.norm().item() == pytest.approx(norm, rel=1e-8), name
        optimizer.step()
