"""Logits, losses and gradients against mmsegmentation 1.2.2, from mmsegmentation/reference.json.

mmsegmentation is not needed: make_reference.py computed the file with it, from the same weights and inputs.
"""

import json

import pytest
import torch
from mmsegmentation.make_reference import MODELS, REFERENCE, SIZES, TRAINED, random_image, sgd, tensor_of, train_batch
from names import as_mmsegmentation

from ocrnet.device import Accelerator
from ocrnet.losses import AUX_LOSS_WEIGHT, ocr_loss
from ocrnet.models import build_model, load_weights
from ocrnet.models.weights import rename

EXPECTED = json.loads(REFERENCE.read_text())
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    """Our model with mmsegmentation's tensors, loaded from a file of theirs."""
    names = as_mmsegmentation(build_model(request.param, deep_stem=request.param == "r101"))
    path = tmp_path_factory.mktemp("weights") / "mmsegmentation.pth"
    torch.save({"state_dict": {name: tensor_of(name, x) for name, x in names.items()}}, path)
    model = build_model(request.param, dropout=0.0)
    load_weights(model, path)
    return model


@pytest.mark.parametrize("model", MODELS, indirect=True)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_logits_are_mmsegmentations(model, size, device):
    height, width = size
    device = Accelerator(device, amp=False).device  # without TF32
    with torch.inference_mode():
        outputs = model.to(device).eval()(random_image(1, 3, *size, seed=height).to(device))
    found = [logits[0, :, height // 3, width // 2].cpu() for logits in outputs]
    expected = torch.tensor(EXPECTED[model.config["name"]]["logits"][f"{height}x{width}"])
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("model", [TRAINED], indirect=True)
def test_losses_gradients_and_steps_are_mmsegmentations(model):
    expected = EXPECTED[TRAINED]
    model = model.cpu().double().train()
    image, label = train_batch()
    optimizer = sgd(model)
    for step, (final_loss, weighted_aux_loss) in enumerate(expected["losses"]):
        loss, parts = ocr_loss(model(image), label)
        losses = torch.tensor([final_loss, weighted_aux_loss / AUX_LOSS_WEIGHT], dtype=torch.float64)
        torch.testing.assert_close(parts, losses, rtol=1e-7, atol=0)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            parameters = dict(model.named_parameters())
            for name, norm in expected["gradients"].items():
                assert parameters[rename(name)].grad.norm().item() == pytest.approx(norm, rel=1e-8), name
        optimizer.step()
