"""The network: shapes and names, and what the paper says of the gather and of the relation."""

import re
import textwrap

import pytest
import torch
from torch import nn

from ocrnet import InputError
from ocrnet.losses import ocr_loss
from ocrnet.models import BACKBONES, FCNHead, HRNet, ObjectAttention, OCRHead, SpatialGather, build_model, ocrnet

# ---- sizes and names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, head, flag", [("hr19", "ocr", "--model"), ("hr18s", "psp", "--head")])
def test_unknown_backbone_or_head_is_refused(name, head, flag):
    with pytest.raises(InputError) as error:
        build_model(name, head=head)
    assert flag in str(error.value)


def test_config_builds_the_same_model():
    with torch.device("meta"):
        model = build_model("r50", 5, align_corners=True, dropout=0.3, deep_stem=True, head="fcn")
        again = build_model(**model.config)
    assert str(again) == str(model) and again.config == model.config and again.align_corners


@pytest.mark.parametrize("size", [(64, 128), (33, 70)])
def test_logits_have_the_size_of_the_image(size):
    model = build_model("hr18t", num_classes=5).eval()
    with torch.inference_mode():
        logits, region_logits = model(torch.randn(1, 3, *size))
    assert logits.shape == region_logits.shape == (1, 5, *size)


def test_align_corners_reaches_every_module():
    model = build_model("hr18t", align_corners=True)
    for expected in (True, False):
        model.set_align_corners(expected)
        flags = [module.align_corners for module in model.modules() if hasattr(module, "align_corners")]
        assert flags == 5 * [expected]  # OCRNet, HRNet and three HRModules


# ---- backbones -------------------------------------------------------------------------------------------------------


def test_hrnet_gives_fifteen_widths_at_a_quarter():
    backbone = HRNet(18, (1, 1, 1), 1).eval()
    image = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        branches = backbone.forward_branches(image)
        region_features, features = backbone(image)
    assert [tuple(x.shape[1:]) for x in branches] == [(18, 16, 24), (36, 8, 12), (72, 4, 6), (144, 2, 3)]
    assert features.shape == (2, 15 * 18, 16, 24) and region_features is features
    assert torch.equal(features[:, :18], branches[0])


def test_initial_weights_follow_the_recipe():
    model = build_model("hr18t")
    classifiers = model.head.classifier[-1], model.head.region_head[-1]
    for conv in (*classifiers, model.head.pixel_head[0], model.backbone.stage4[0].branches[3][0].conv1):
        fan_out = conv.weight[:, 0].numel()  # Kaiming normal
        std = 0.01 if conv in classifiers else (2 / fan_out) ** 0.5
        assert conv.weight.std().item() == pytest.approx(std, rel=0.05)
    assert not any(conv.bias.any() for conv in classifiers)


@pytest.fixture
def toy(monkeypatch):
    """The example in the docstring of models/ocrnet.py, as a backbone "toy"."""
    example, names = re.search(r"^    import torch\n.*?(?=^\S)", ocrnet.__doc__, re.MULTILINE | re.DOTALL)[0], {}
    exec(textwrap.dedent(example), names)
    monkeypatch.setitem(BACKBONES, "toy", names["Toy"])


@pytest.mark.parametrize("head", ["ocr", "fcn"])
def test_backbone_of_the_docstring_trains(head, toy):
    torch.manual_seed(0)
    model = build_model("toy", num_classes=3, head=head)
    label = torch.randint(0, 3, (2, 4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)  # (2, 32, 32)
    image = nn.functional.one_hot(label, 3).movedim(3, 1) + 0.1 * torch.randn(2, 3, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(10):
        loss, _ = ocr_loss(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_backbone_of_the_docstring_sets_the_width_of_the_head_and_obeys_align_corners(toy):
    model = build_model("toy", num_classes=3).eval()
    assert model.head.classifier[1].weight.shape[:2] == (3, 64)
    assert model.head.attention.phi[0][0].weight.shape[:2] == (32, 64)
    image = torch.randn(1, 3, 32, 32)
    before = model.backbone(image)[0]
    model.set_align_corners(True)
    assert not torch.allclose(before, model.backbone(image)[0])


@pytest.mark.parametrize("head", ["ocr", "fcn"])
def test_building_a_model_keeps_the_weights_of_its_backbone(head, monkeypatch):
    backbone = HRNet(width=4, num_modules=(1, 1, 1), num_blocks=1)
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    monkeypatch.setitem(BACKBONES, "pretrained", lambda: backbone)
    after = build_model("pretrained", 3, head=head).backbone.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


# ---- the baseline ----------------------------------------------------------------------------------------------------


def test_fcn_head_classifies_a_pixel_by_its_own_features():
    head = FCNHead(in_channels=6, num_classes=3).eval()
    features = torch.randn(1, 6, 4, 5)
    changed = features.clone()
    changed[0, :, 1, 2] += 1
    (before,), (after,) = head(features, features), head(features, changed)
    assert [tuple(i) for i in (before != after).any(1).nonzero().tolist()] == [(0, 1, 2)]


# ---- the gather ------------------------------------------------------------------------------------------------------


def test_gather_is_the_papers_weighted_mean_of_pixels():
    x, region_logits = torch.randn(2, 4, 3, 5).double(), torch.randn(2, 3, 3, 5).double()
    e = region_logits.exp()
    m = e / e.sum(dim=(2, 3), keepdim=True)  # (B, K, H, W)
    f = torch.stack([(m[:, k, None] * x).sum(dim=(2, 3)) for k in range(3)], dim=2)  # (B, C, K)
    torch.testing.assert_close(SpatialGather()(x, region_logits), f[..., None], rtol=1e-12, atol=1e-12)


def test_gather_takes_its_softmax_over_the_pixels_of_a_class():
    x, region_logits = torch.randn(1, 4, 3, 5), torch.randn(1, 3, 3, 5)
    gather = SpatialGather()
    constant = torch.ones_like(x) * 7
    torch.testing.assert_close(gather(constant, region_logits), torch.full((1, 4, 3, 1), 7.0))
    shift = torch.randn(1, 3, 1, 1)  # the same for all pixels of a class: changes nothing
    torch.testing.assert_close(gather(x, region_logits + shift), gather(x, region_logits))
    shift = torch.randn(1, 1, 3, 5)  # the same for all classes of a pixel: does
    assert not torch.allclose(gather(x, region_logits + shift), gather(x, region_logits), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gather_runs_in_fp32_under_autocast(dtype):
    x, region_logits = torch.randn(1, 4, 64, 64).to(dtype), torch.randn(1, 3, 64, 64).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        f = SpatialGather()(x, region_logits)
    assert f.dtype == torch.float32
    torch.testing.assert_close(f, SpatialGather()(x.float(), region_logits.float()), rtol=0, atol=0)


def test_permuting_the_classes_permutes_the_representations():
    x, region_logits = torch.randn(1, 4, 3, 5), torch.randn(1, 3, 3, 5)
    order = [2, 0, 1]
    f = SpatialGather()(x, region_logits)
    torch.testing.assert_close(SpatialGather()(x, region_logits[:, order]), f[:, :, order])


# ---- the attention ---------------------------------------------------------------------------------------------------


@pytest.fixture
def attention():
    """ObjectAttention with x (B, C, H, W) and f (B, C, K, 1)."""
    return ObjectAttention(8, 4).double().eval(), torch.randn(1, 8, 3, 5).double(), torch.randn(1, 8, 6, 1).double()


def test_relation_is_a_softmax_over_the_classes_for_each_pixel(attention):
    attention, x, f = attention
    q, k = attention.phi(x).flatten(2), attention.psi(f).flatten(2)  # (B, D, N), (B, D, K)
    kappa = (q[:, :, :, None] * k[:, :, None]).sum(dim=1) / 4**0.5  # (B, N, K)
    w = kappa.exp() / kappa.exp().sum(dim=2, keepdim=True)
    torch.testing.assert_close(attention.relation(x, f), w)


def test_context_is_the_mean_of_region_values_weighted_by_the_relation(attention):
    attention, x, f = attention
    w, v = attention.relation(x, f), attention.delta(f).flatten(2)  # (B, N, K), (B, D, K)
    y = (w[:, None] * v[:, :, None]).sum(dim=3).unflatten(2, (3, 5))  # (B, D, H, W)
    torch.testing.assert_close(attention(x, f), attention.rho(y))


def test_permuting_the_classes_keeps_the_context(attention):
    attention, x, f = attention
    torch.testing.assert_close(attention(x, f[:, :, [3, 5, 0, 1, 4, 2]]), attention(x, f))


# ---- the head --------------------------------------------------------------------------------------------------------


def small_head(**more):
    return OCRHead(region_in_channels=6, in_channels=4, num_classes=3, channels=8, key_channels=4, **more)


def test_dropout_drops_channels_before_each_classifier():
    x = torch.ones(1, 6, 4, 4), torch.ones(1, 4, 4, 4)
    for region_dropout, dropout, changes in ((0.0, 0.0, [False, False]), (0.0, 0.5, [True, False])):
        head = small_head(region_dropout=region_dropout, dropout=dropout).eval()
        for layer in (head.classifier[0], head.region_head[1]):
            layer.train()
        outputs = [head(*x) for _ in range(9)]
        assert [any(not torch.equal(a, b) for b in others) for a, *others in zip(*outputs)] == changes
    head = small_head(region_dropout=1.0)
    assert not head(*x)[1].any()  # only the classifier's bias, 0, is left


def test_final_loss_trains_the_region_logits_too():
    head = small_head()
    logits, _ = head(torch.randn(2, 6, 4, 4), torch.randn(2, 4, 4, 4))
    logits.square().mean().backward()
    assert head.region_head[-1].weight.grad.abs().sum() > 0  # region_logits are not detached


def test_default_dropout_is_the_backbones():
    with torch.device("meta"):
        for name, dropout, expected in (("hr18s", None, (0, 0)), ("hr18s", 0.3, (0, 0.3)), ("r50", None, (0.1, 0.1))):
            head = build_model(name, dropout=dropout).head
            assert (head.region_head[1].p, head.classifier[0].p) == expected
