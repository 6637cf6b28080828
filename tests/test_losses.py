"""Losses and the learning rate schedule."""

import pytest
import torch

from ocrnet.losses import cross_entropy, ocr_loss, poly_lr


def cross_entropy_by_hand(logits, label, weights):
    """The mean over all pixels, to which the ignored ones add 0."""
    valid, label = label != 255, label.clamp(max=2)
    log_probability = logits.log_softmax(1).gather(1, label[:, None])[:, 0]
    return -(log_probability * weights[label] * valid).mean()


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 0, 5])], ids=["alike", "weighted"])
def test_loss_is_that_of_the_logits_and_two_fifths_of_the_auxiliary_one_over_all_pixels(weights):
    torch.manual_seed(0)
    logits, region_logits = torch.randn(2, 2, 3, 4, 4, requires_grad=True)
    label = torch.randint(0, 3, (2, 4, 4))
    label[:, 1:, :2] = 255
    by_class = torch.ones(3) if weights is None else weights
    final, auxiliary = (cross_entropy_by_hand(x, label, by_class) for x in (logits, region_logits))
    loss, parts = ocr_loss((logits, region_logits), label, weights)
    assert loss.requires_grad and not parts.requires_grad
    torch.testing.assert_close(parts, torch.stack([final, auxiliary]).detach())
    torch.testing.assert_close(loss, final + 0.4 * auxiliary)
    loss, parts = ocr_loss((logits,), label, weights)  # of FCNHead
    torch.testing.assert_close(loss, final)
    torch.testing.assert_close(parts, torch.stack([final, torch.tensor(0.0)]).detach())


def test_crop_of_ignored_pixels_gives_zero():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_half_precision_logits_are_summed_in_fp32():
    logits, label = torch.randn(1, 3, 64, 64), torch.randint(0, 3, (1, 64, 64))
    loss = cross_entropy(logits.half(), label)
    assert loss.dtype == torch.float32 and cross_entropy(logits.double(), label).dtype == torch.float64
    torch.testing.assert_close(loss, cross_entropy(logits.half().float(), label))


def test_schedule_decays_from_lr_to_min_lr():
    # from mmengine 0.10.7's PolyLR(eta_min=1e-4, power=0.9, begin=0, end=40000, by_epoch=False) on SGD(lr=0.01)
    expected = {0: 0.01, 1: 0.009999777244152656, 20000: 0.005405159267651549, 39999: 1e-4}
    for t, lr in expected.items():
        assert poly_lr(0.01, t, 40_000) == pytest.approx(lr, rel=1e-9)
    assert poly_lr(0.01, 0, 1) == 0.01 and poly_lr(0.01, 1, 2) == 1e-4
    assert poly_lr(1, 1, 3, min_lr=0.2, power=2) == pytest.approx(0.2 + 0.8 / 4)
    assert poly_lr(1e-5, 99, 100) == 1e-5  # it never rises
