"""The network: sizes, names, and what the paper says of the gather and of the relation."""

import hashlib

import pytest
import torch

from ocrnet.errors import InputError
from ocrnet.models import FCNHead, ObjectAttention, OCRHead, SpatialGather, build_model


@pytest.mark.parametrize("name, count", [("hr18s", 6_378_496), ("hr18", 12_080_036), ("hr48", 70_371_446)])
def test_parameter_counts_are_mmsegmentations(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(name).parameters()) == count


# sha256 of the sorted lines "NAME HxWx.." of the backbone's tensors in mmsegmentation 1.2.2's models of that name
@pytest.mark.parametrize(
    "name, digest", [("hr18s", "396aad0a45e3d77c"), ("hr18", "6579a73d087008f2"), ("hr48", "7a426dee796723d4")]
)
def test_backbone_tensors_have_the_authors_names_and_shapes(name, digest):
    with torch.device("meta"):
        state = build_model(name).backbone.state_dict()
    lines = sorted(f"{key} {'x'.join(map(str, x.shape))}".rstrip() for key, x in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest().startswith(digest)


def test_an_unknown_variant_is_refused_by_name():
    with pytest.raises(InputError, match="hr19.*hr18s"):
        build_model("hr19")


@pytest.mark.parametrize("size", [(64, 128), (97, 161), (33, 70)])
def test_logits_come_back_at_the_size_of_the_image(size):
    model = build_model("hr18s", num_classes=5).eval()
    with torch.inference_mode():
        logits, region_logits = model(torch.randn(1, 3, *size))
    assert logits.shape == region_logits.shape == (1, 5, *size)


def test_backbone_gives_fifteen_widths_at_a_quarter():
    backbone = build_model("hr18s").backbone.eval()
    with torch.inference_mode():
        image = torch.randn(2, 3, 64, 96)
        branches = backbone.branches(image)
        regions, pixels = backbone(image)
    assert [tuple(x.shape[1:]) for x in branches] == [(18, 16, 24), (36, 8, 12), (72, 4, 6), (144, 2, 3)]
    assert regions.shape == (2, 15 * 18, 16, 24) and regions is pixels


def test_each_branch_of_a_module_hears_every_other():
    module = build_model("hr18s").backbone.stage4[0].eval()
    x = [torch.randn(1, 18 * 2**i, 16 // 2**i, 16 // 2**i, requires_grad=True) for i in range(4)]
    for y in module(x):
        gradients = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert all(g.abs().sum() > 0 for g in gradients)


def test_initial_weights_follow_the_recipe():
    torch.manual_seed(0)
    model = build_model("hr18")
    assert model.head.classifier[-1].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.head.region_head[-1].weight.std().item() == pytest.approx(0.01, rel=0.05)
    conv = model.head.pixel_head[0].weight  # Kaiming, fan out: sqrt(2 / (512 * 9))
    assert conv.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


def test_without_context_a_pixel_is_judged_by_its_own_features():
    head = FCNHead(in_channels=6, channels=6, num_classes=3).eval()
    features = torch.randn(1, 6, 4, 5)
    changed = features.clone()
    changed[0, :, 1, 2] += 1
    (before,), (after,) = head(features, features), head(features, changed)
    assert [tuple(i) for i in (before != after).any(1).nonzero().tolist()] == [(0, 1, 2)]


@pytest.mark.parametrize("name, count", [("hr18s", 3_939_309), ("r50", 32_955_987)])
def test_the_backbone_alone_gives_one_output(name, count):
    with torch.device("meta"):
        model = build_model(name, head="fcn").eval()
        outputs = model(torch.zeros(1, 3, 64, 96))
    assert [tuple(x.shape) for x in outputs] == [(1, 19, 64, 96)]
    assert sum(p.numel() for p in model.parameters()) == count
    with pytest.raises(InputError, match="no head 'psp': expected one of ocr, fcn"):
        build_model(name, head="psp")


# ---- the gather ----


def gather_by_loops(x, region_logits):
    """f_k = sum_i m~_ki x_i, as the paper writes it."""
    B, C, H, W = x.shape
    K = region_logits.shape[1]
    f = torch.zeros(B, C, K, 1, dtype=x.dtype)
    for b in range(B):
        for k in range(K):
            e = region_logits[b, k].exp()
            for i in range(H):
                for j in range(W):
                    f[b, :, k, 0] += e[i, j] / e.sum() * x[b, :, i, j]
    return f


def test_gather_is_the_papers_weighted_mean_of_pixels():
    x, m = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randn(2, 3, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(SpatialGather()(x, m), gather_by_loops(x, m), rtol=1e-12, atol=1e-12)


def test_gathers_softmax_is_over_the_pixels_of_a_class():
    x, m = torch.randn(1, 4, 3, 5), torch.randn(1, 3, 3, 5)
    gather = SpatialGather()
    constant = torch.ones_like(x) * 7
    torch.testing.assert_close(gather(constant, m), torch.full((1, 4, 3, 1), 7.0))  # weights of a region sum to one
    shift = torch.randn(1, 3, 1, 1)  # the same for all pixels of a class: changes nothing
    torch.testing.assert_close(gather(x, m + shift), gather(x, m))
    shift = torch.randn(1, 1, 3, 5)  # the same for all classes of a pixel: does
    assert not torch.allclose(gather(x, m + shift), gather(x, m), atol=1e-3)


def test_a_region_of_one_pixel_is_that_pixel():
    x, m = torch.randn(1, 4, 3, 5), torch.zeros(1, 2, 3, 5)
    m[0, 1, 2, 3] = 100
    torch.testing.assert_close(SpatialGather()(x, m)[0, :, 1, 0], x[0, :, 2, 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gather_runs_in_fp32_under_autocast(dtype):
    x, m = torch.randn(1, 4, 64, 64).to(dtype), torch.randn(1, 3, 64, 64).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        f = SpatialGather()(x, m)
    assert f.dtype == torch.float32
    torch.testing.assert_close(f, SpatialGather()(x.float(), m.float()), rtol=0, atol=0)


def test_permuting_the_classes_of_the_regions_permutes_the_representations():
    x, m = torch.randn(1, 4, 3, 5), torch.randn(1, 3, 3, 5)
    order = [2, 0, 1]
    torch.testing.assert_close(SpatialGather()(x, m[:, order]), SpatialGather()(x, m)[:, :, order])


# ---- the attention ----


def test_relation_is_a_softmax_over_classes_for_each_pixel():
    attention = ObjectAttention(in_channels=8, key_channels=4).double().eval()
    x, f = torch.randn(2, 8, 3, 5).double(), torch.randn(2, 8, 6, 1).double()
    w = attention.relation(x, f)
    assert w.shape == (2, 15, 6)  # (B, N, K)
    torch.testing.assert_close(w.sum(2), torch.ones(2, 15).double())
    q, k = attention.phi(x), attention.psi(f)
    for i, j in [(0, 0), (1, 3), (2, 4)]:
        scores = torch.stack([(q[0, :, i, j] * k[0, :, c, 0]).sum() / 4**0.5 for c in range(6)])
        torch.testing.assert_close(w[0, i * 5 + j], scores.exp() / scores.exp().sum())


def test_context_is_the_relations_mean_of_region_values():
    attention = ObjectAttention(in_channels=8, key_channels=4).double().eval()
    x, f = torch.randn(1, 8, 3, 5).double(), torch.randn(1, 8, 6, 1).double()
    w, v = attention.relation(x, f), attention.delta(f)
    expected = torch.zeros(1, 4, 3, 5).double()
    for n in range(15):
        expected[0, :, n // 5, n % 5] = sum(w[0, n, k] * v[0, :, k, 0] for k in range(6))
    torch.testing.assert_close(attention(x, f), attention.rho(expected))


def test_permuting_the_classes_leaves_the_context_alone():
    attention = ObjectAttention(in_channels=8, key_channels=4).double().eval()
    x, f = torch.randn(1, 8, 3, 5).double(), torch.randn(1, 8, 6, 1).double()
    torch.testing.assert_close(attention(x, f[:, :, [3, 5, 0, 1, 4, 2]]), attention(x, f))


def test_the_final_loss_reaches_the_regions_too():
    head = OCRHead(in_channels=6, region_in_channels=6, region_channels=6, num_classes=3, channels=8, key_channels=4)
    features = torch.randn(2, 6, 4, 4)
    logits, _ = head(features, features)
    logits.square().mean().backward()
    assert head.region_head[-1].weight.grad.abs().sum() > 0  # the region maps are not detached
