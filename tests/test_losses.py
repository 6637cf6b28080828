"""Losses and the learning rate schedule."""

import pytest
import torch
import torch.nn.functional as F

from ocrnet.losses import cross_entropy, ocr_loss, poly_lr

# ---- cross entropy ---------------------------------------------------------------------------------------------------


def test_cross_entropy_divides_by_all_pixels():
    logits, label = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    label[:, :, :2] = 255
    of_valid_half = F.cross_entropy(logits, label, ignore_index=255)  # PyTorch's mean is over the valid pixels
    torch.testing.assert_close(cross_entropy(logits, label), of_valid_half / 2)


def test_crop_of_ignored_pixels_gives_zero():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_half_precision_logits_are_summed_in_fp32():
    logits, label = torch.randn(1, 3, 64, 64), torch.randint(0, 3, (1, 64, 64))
    loss = cross_entropy(logits.half(), label)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(logits.half().float(), label))


def test_class_weights_multiply_the_loss_of_their_class():
    logits, label = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    weights = torch.tensor([1.0, 0, 5])
    per_pixel = F.cross_entropy(logits, label, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, label, weights), (per_pixel * weights[label]).sum() / 16)


# ---- both outputs ----------------------------------------------------------------------------------------------------


def test_auxiliary_loss_weighs_two_fifths():
    logits, region_logits, label = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    loss, parts = ocr_loss((logits, region_logits), label)
    torch.testing.assert_close(
        parts, torch.stack([cross_entropy(logits, label), cross_entropy(region_logits, label)]), rtol=0, atol=0
    )
    torch.testing.assert_close(loss, parts[0] + 0.4 * parts[1])


def test_single_output_has_only_the_final_loss():
    logits, label = torch.randn(1, 3, 4, 4, requires_grad=True), torch.randint(0, 3, (1, 4, 4))
    loss, parts = ocr_loss((logits,), label)
    assert torch.equal(loss, cross_entropy(logits, label)) and not parts.requires_grad
    assert torch.equal(parts, torch.stack([loss.detach(), torch.tensor(0.0)]))


def test_class_weights_apply_to_both_outputs():
    logits, region_logits, label = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    weights = torch.tensor([1.0, 0, 5])
    _, parts = ocr_loss((logits, region_logits), label, weights)
    expected = [cross_entropy(x, label, weights) for x in (logits, region_logits)]
    torch.testing.assert_close(parts, torch.stack(expected))


# ---- schedule --------------------------------------------------------------------------------------------------------


def test_schedule_decays_from_lr_to_min_lr():
    # from mmengine 0.10.7's PolyLR(eta_min=1e-4, power=0.9, begin=0, end=40000, by_epoch=False) on SGD(lr=0.01)
    expected = {0: 0.01, 1: 0.009999777244152656, 20000: 0.005405159267651549, 39999: 1e-4}
    for t, lr in expected.items():
        assert poly_lr(0.01, t, 40_000) == pytest.approx(lr, rel=1e-9)
    assert poly_lr(0.01, 0, 1) == 0.01
    assert poly_lr(1e-5, 99, 100) == 1e-5  # it never rises
