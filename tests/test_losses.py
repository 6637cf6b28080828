"""Losses and the learning rate schedule."""

import pytest
import torch
import torch.nn.functional as F

from ocrnet.losses import cross_entropy, hard_pixels, ocr_loss, ohem_authors, ohem_mmsegmentation
from ocrnet.schedule import poly_lr

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


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 0.1, 5])])
def test_avg_non_ignore_divides_by_the_weights_of_valid_pixels_as_pytorch_does(weights):
    logits, label = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    label[:, 1:3] = 255
    expected = F.cross_entropy(logits, label, weights, ignore_index=255)  # the authors' CrossEntropy
    torch.testing.assert_close(cross_entropy(logits, label, weights, avg_non_ignore=True), expected)
    assert cross_entropy(logits, torch.full((2, 4, 4), 255), weights, avg_non_ignore=True) == 0


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
    for ohem, final in (
        (None, cross_entropy(logits, label, weights)),
        ("mmsegmentation", ohem_mmsegmentation(logits, label, weights)),
        ("authors", ohem_authors(logits, label, weights)),
    ):
        _, parts = ocr_loss((logits, region_logits), label, weights, ohem)
        torch.testing.assert_close(parts, torch.stack([final, cross_entropy(region_logits, label, weights)]))


# ---- hard examples ---------------------------------------------------------------------------------------------------


def ohem_by_sorting(logits, label, threshold, min_kept):
    """The authors' OhemCrossEntropy: sort, raise the threshold to keep enough, mean of the kept."""
    pixels = [
        (logits[0, :, y, x].softmax(0)[label[0, y, x]].item(), logits[0, :, y, x].log_softmax(0)[label[0, y, x]].item())
        for y in range(8)
        for x in range(8)
        if label[0, y, x] != 255
    ]
    pixels.sort()
    threshold = max(threshold, pixels[min(min_kept, len(pixels) - 1)][0])
    kept = [-log for p, log in pixels if p < threshold]
    return sum(kept) / len(kept)


@pytest.mark.parametrize("threshold, min_kept", [(0.3, 1), (0.3, 20), (0.0, 7), (0.9, 5), (0.0, 100)])
def test_authors_ohem_is_the_mean_of_the_pixels_below_the_threshold_or_of_the_hardest(threshold, min_kept):
    torch.manual_seed(0)
    logits, label = torch.randn(1, 3, 8, 8) * 2, torch.randint(0, 3, (1, 8, 8))
    label[0, :2] = 255
    expected = ohem_by_sorting(logits, label, threshold, min_kept)
    assert ohem_authors(logits, label, None, threshold, min_kept).item() == pytest.approx(expected, rel=1e-5)


def test_mmsegmentations_ohem_keeps_pixels_per_image_and_divides_by_all():
    logits, label = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    label[0, 0] = 255
    probability = logits.softmax(1).gather(1, label.clamp(max=2)[:, None])[:, 0][label != 255]
    kept = probability.sort().values[:10]  # 5 per image
    torch.testing.assert_close(ohem_mmsegmentation(logits, label, None, 0.0, 5), -kept.log().sum() / 32)
    assert hard_pixels(logits, label, 0.0, 10).sum() == 10


def test_ohem_of_ignored_pixels_is_zero():
    logits, label = torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 255)
    assert ohem_authors(logits, label) == ohem_mmsegmentation(logits, label) == 0


def test_ohem_applies_only_to_the_final_output():
    torch.manual_seed(0)
    logits, region_logits = torch.randn(2, 1, 3, 4, 4)
    label = torch.randint(0, 3, (1, 4, 4))
    label[0, 0] = 255  # so that the losses differ
    _, parts = ocr_loss((logits, region_logits), label, ohem="authors", avg_non_ignore=True)
    expected = [ohem_authors(logits, label), cross_entropy(region_logits, label, avg_non_ignore=True)]
    torch.testing.assert_close(parts, torch.stack(expected))
    assert not torch.isclose(parts[0], cross_entropy(logits, label))


# ---- schedule --------------------------------------------------------------------------------------------------------


def test_schedule_decays_from_lr_to_min_lr():
    # from mmengine 0.10.7's PolyLR(eta_min=1e-4, power=0.9, begin=0, end=40000, by_epoch=False) on SGD(lr=0.01)
    expected = {0: 0.01, 1: 0.009999777244152656, 20000: 0.005405159267651549, 39999: 1e-4}
    for t, lr in expected.items():
        assert poly_lr(0.01, t, 40_000) == pytest.approx(lr, rel=1e-9)
    assert poly_lr(0.01, 0, 1) == 0.01
    assert poly_lr(0.02, 99, 100, min_lr=0.003) == pytest.approx(0.003, rel=1e-9)
