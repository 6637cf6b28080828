"""CUDA graphs: a replayed function gives what the function gives. Skipped without a card."""

import pytest
import torch

from ocrnet.device import Accelerator
from ocrnet.inference import make_forward
from ocrnet.losses import ocr_loss
from ocrnet.models import build_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


def train(accelerator, graph, steps=5):
    """Losses and gradients of some steps of a small model with dropout, and its statistics. The weights stay."""
    torch.manual_seed(0)
    net = build_model("hr18t", 5, dropout=0.5).to(accelerator.device, memory_format=torch.channels_last)
    scaler = accelerator.grad_scaler()
    images, labels = torch.rand(steps, 2, 3, 64, 128), torch.randint(0, 5, (steps, 2, 64, 128))

    def compute_gradients(image, label):
        net.zero_grad()
        with accelerator.autocast():
            outputs = net(image.to(accelerator.device, memory_format=torch.channels_last))
        loss = ocr_loss(outputs, label.to(accelerator.device))[0]
        scaler.scale(loss).backward()
        return loss.detach()

    function, losses, gradients = accelerator.graph(compute_gradients) if graph else compute_gradients, [], []
    for step in range(steps):
        torch.manual_seed(step)
        losses.append(function(images[step].pin_memory(), labels[step].pin_memory()).clone())
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    return losses, gradients, dict(net.named_buffers())


@pytest.mark.parametrize("amp, dtype, tolerance", [(False, None, 0.01), (True, "bf16", 0.2), (True, "fp16", 0.1)])
def test_gradients_with_a_graph_are_those_without(amp, dtype, tolerance):
    accelerator = Accelerator("cuda", amp, dtype)
    losses, gradients, statistics = train(accelerator, graph=True)
    expected_losses, expected_gradients, expected_statistics = train(accelerator, graph=False)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-3, atol=0)
    for found, expected in zip(gradients, expected_gradients, strict=True):  # atomic additions of CUDA vary in order
        assert (found - expected).norm() < tolerance * expected.norm()
    torch.testing.assert_close(statistics, expected_statistics, rtol=1e-3, atol=1e-5)  # each batch was seen once


def test_images_of_several_sizes_get_their_own_outputs():
    accelerator = Accelerator("cuda", amp=False)
    model = build_model("hr18t", 5).cuda().eval()
    forward = make_forward(model, accelerator)
    for i in range(30):
        image = torch.randint(0, 256, (1, 3, 40 + 8 * (i % 3), 64 + 8 * (i % 10)), dtype=torch.uint8)
        if i == 20:
            with torch.no_grad():
                model.head.classifier[1].bias += 1  # the weights may change between calls
        found = torch.stack(forward(image))
        with torch.inference_mode():
            expected = torch.stack(make_forward(model, accelerator)(image))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
