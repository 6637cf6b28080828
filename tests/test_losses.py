"""Loss and schedule."""

import pytest
import torch
import torch.nn.functional as F

from ocrnet.losses import hard_pixel_loss, ocr_loss, pixel_loss, poly_lr


def test_ignored_pixels_count_in_the_divisor_only():
    logits, label = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    label[:, :, :2] = 255
    scored = F.cross_entropy(logits, label, ignore_index=255)  # PyTorch's mean: over the scored half
    torch.testing.assert_close(pixel_loss(logits, label), scored / 2)


def test_a_crop_of_nothing_but_ignored_pixels_gives_zero():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_half_precision_logits_are_summed_in_fp32():
    logits, label = torch.randn(1, 3, 64, 64), torch.randint(0, 3, (1, 64, 64))
    loss = pixel_loss(logits.half(), label)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, pixel_loss(logits.half().float(), label))


def test_regions_weigh_two_fifths():
    final, regions, label = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    loss, parts = ocr_loss((final, regions), label)
    torch.testing.assert_close(parts, torch.stack([pixel_loss(final, label), pixel_loss(regions, label)]))
    torch.testing.assert_close(loss, parts[0] + 0.4 * parts[1])


def test_a_single_output_has_the_final_loss_alone():
    final, label = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    loss, parts = ocr_loss((final,), label)
    assert torch.equal(loss, pixel_loss(final, label)) and torch.equal(parts, torch.stack([loss, torch.tensor(0.0)]))


def test_class_weights_multiply_each_classs_loss():
    logits, label = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    weight = torch.tensor([1.0, 0, 5])
    each = F.cross_entropy(logits, label, reduction="none")
    torch.testing.assert_close(pixel_loss(logits, label, weight), (each * weight[label]).sum() / 16)


def hard_by_sorting(logits, label, threshold, min_kept):
    """As the authors' OhemCrossEntropy is described: sort, raise the threshold to keep enough, mean over the kept."""
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


@pytest.mark.parametrize("threshold, min_kept", [(0.3, 1), (0.3, 20), (0.0, 7), (0.9, 5)])
def test_hard_pixels_are_those_below_the_threshold_or_the_hardest(threshold, min_kept):
    torch.manual_seed(0)
    logits, label = torch.randn(1, 3, 8, 8) * 2, torch.randint(0, 3, (1, 8, 8))
    label[0, :2] = 255
    expected = hard_by_sorting(logits, label, threshold, min_kept)
    assert hard_pixel_loss(logits, label, threshold, min_kept).item() == pytest.approx(expected, rel=1e-5)


def test_with_fewer_pixels_than_must_be_kept_all_count():
    logits, label = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    torch.testing.assert_close(hard_pixel_loss(logits, label, 0.0, min_kept=100), F.cross_entropy(logits, label))
    assert hard_pixel_loss(logits, torch.full((1, 4, 4), 255), 0.7) == 0


def test_only_the_final_segmentation_is_held_to_its_hard_pixels():
    final, regions, label = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    _, parts = ocr_loss((final, regions), label, ohem=0.7)
    torch.testing.assert_close(parts, torch.stack([hard_pixel_loss(final, label, 0.7), pixel_loss(regions, label)]))


def test_schedule_starts_at_lr_and_ends_at_the_floor():
    # from mmengine 0.10.7's PolyLR(eta_min=1e-4, power=0.9, begin=0, end=40000, by_epoch=False) on SGD(lr=0.01)
    expected = {0: 0.01, 1: 0.009999777244152656, 20000: 0.005405159267651549, 39999: 1e-4}
    for t, lr in expected.items():
        assert poly_lr(0.01, t, 40_000) == pytest.approx(lr, rel=1e-9)
    assert poly_lr(0.01, 0, 1) == 0.01
