"""The network against independent computations of HRNet and of the head; its defaults and initial weights."""

import re
import textwrap
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ocrnet import InputError
from ocrnet.losses import ocr_loss
from ocrnet.models import BACKBONES, HRNet, ObjectAttention, OCRHead, OCRNet, SpatialGather, build_model, ocrnet
from ocrnet.models.ocr import FCNHead


@pytest.fixture(autouse=True)
def small_resnet(monkeypatch):
    monkeypatch.setitem(BACKBONES, "resnet", partial(ocrnet.resnet, layers=(1, 1, 1, 1)))


def test_models_have_their_number_of_parameters():
    # with 19 classes. The tensors of hr18s, hr48 and r101 are compared in test_weights.py
    expected = {"hr18t": 2_495_788, "hr18": 12_080_036, "hr32": 32_952_902, "r50": 36_504_934}
    with torch.device("meta"):
        assert {name: sum(x.numel() for x in build_model(name).parameters()) for name in expected} == expected


@pytest.mark.parametrize("name, head, flag", [("hr19", "ocr", "--model"), ("hr18s", "psp", "--head")])
def test_unknown_backbone_or_head_is_refused(name, head, flag):
    with pytest.raises(InputError, match=flag):
        build_model(name, head=head)


def test_config_builds_the_same_model():
    with torch.device("meta"):
        model = build_model("resnet", 5, align_corners=True, dropout=0.3, deep_stem=True, head="fcn")
        again, default = build_model(**model.config), build_model("tiny")
    assert str(again) == str(model) and again.config == model.config and again.align_corners
    assert list(default.config.values()) == ["tiny", 19, False, None, False, "ocr"]
    assert not default.align_corners and OCRNet(model.backbone, model.head).config == {}


def test_defaults_of_heads_are_those_of_hrnet():
    with torch.device("meta"):
        ocr, fcn = (build_model("hr18s", head=head).head for head in ("ocr", "fcn"))
        assert str(ocr) == str(OCRHead(270, 270, 19)) and str(fcn) == str(FCNHead(270, 19))
        assert str(ocr.attention) == str(ObjectAttention())
        assert build_model("resnet", head="fcn").head.hidden[0].weight.shape == (512, 2048, 3, 3)


@pytest.mark.parametrize(
    "dropout, of_hrnet, of_resnet", [(None, (0, 0), (0.1, 0.1)), (0.0, (0, 0), (0, 0)), (0.3, (0, 0.3), (0.3, 0.3))]
)
def test_dropout_is_the_backbones_unless_it_is_given(dropout, of_hrnet, of_resnet):
    with torch.device("meta"):
        for name, expected in (("tiny", of_hrnet), ("resnet", of_resnet)):
            ocr, fcn = (build_model(name, dropout=dropout, head=head).head for head in ("ocr", "fcn"))
            assert (ocr.region_head[1].p, ocr.classifier[0].p) == expected and fcn.classifier[0].p == expected[1]


@pytest.mark.parametrize("settings", [{"name": "hr18t"}, {"name": "hr18t", "head": "fcn"}, {"name": "resnet"}], ids=str)
def test_initial_weights_follow_the_recipe(settings):
    torch.manual_seed(0)
    model = build_model(**settings, deep_stem=settings["name"] == "resnet")
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            std = (2 / conv.weight[:, 0].numel()) ** 0.5 if conv.bias is None else 0.01  # Kaiming with fan out
            assert conv.weight.std().item() == pytest.approx(std, rel=0.15), name
            assert conv.weight.abs().max() > 2 * std, name  # normal, not uniform
            assert conv.bias is None or not conv.bias.any(), name


@pytest.mark.parametrize("head", ["ocr", "fcn"])
def test_building_a_model_keeps_the_weights_of_its_backbone(head, monkeypatch):
    backbone = BACKBONES["tiny"]()
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    monkeypatch.setitem(BACKBONES, "pretrained", lambda: backbone)
    after = build_model("pretrained", 3, head=head).backbone.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def resized(x, size, align_corners):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def hrnet_features(state, image, num_modules, num_blocks, align_corners):
    """HRNet's branches and features, computed from a state_dict with the authors' names alone."""

    def conv_bn(x, conv, bn, stride=1):
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        return F.batch_norm(x, *(state[f"{bn}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")))

    def blocks(x, name, convs):
        for block in (f"{name}.{index}" for index in range(num_blocks)):
            y = conv_bn(x, f"{block}.conv1", f"{block}.bn1")
            for i in range(2, convs + 1):
                y = conv_bn(y.relu(), f"{block}.conv{i}", f"{block}.bn{i}")
            first = f"{block}.downsample.0.weight" in state
            x = (y + (conv_bn(x, f"{block}.downsample.0", f"{block}.downsample.1") if first else x)).relu()
        return x

    def path(x, name, halvings, size):
        if halvings < 0:  # upsampled, without align_corners in mmsegmentation's two steps
            x = conv_bn(x, f"{name}.0", f"{name}.1")
            x = x if align_corners else F.interpolate(x, scale_factor=2**-halvings, mode="bilinear")
        for k in range(halvings):
            x = conv_bn(x.relu() if k else x, f"{name}.{k}.0", f"{name}.{k}.1", stride=2)
        return resized(x, size, align_corners)

    x = conv_bn(conv_bn(image, "conv1", "bn1", 2).relu(), "conv2", "bn2", 2).relu()
    x = blocks(x, "layer1", 3)
    branches = [conv_bn(x, "transition1.0.0", "transition1.0.1").relu()]
    for n, modules in zip((2, 3, 4), num_modules):  # n branches
        new = f"transition{n - 1}.{n - 1}.0"
        branches.append(conv_bn(x if n == 2 else branches[-1], f"{new}.0", f"{new}.1", 2).relu())
        for name in (f"stage{n}.{index}" for index in range(modules)):
            branches = [blocks(x, f"{name}.branches.{i}", 2) for i, x in enumerate(branches)]
            fused = []
            for i, x_i in enumerate(branches):
                size = x_i.shape[2:]
                paths = (path(x, f"{name}.fuse_layers.{i}.{j}", i - j, size) for j, x in enumerate(branches))
                fused.append(sum(paths).relu())
            branches = fused
    return branches, torch.cat([resized(x, branches[0].shape[2:], align_corners) for x in branches], dim=1)


@pytest.mark.parametrize("size", [(64, 96), (33, 70)])
def test_logits_are_those_of_an_independent_hrnet_with_and_without_align_corners(size):
    modules, blocks = (1, 2, 1), 2
    torch.manual_seed(0)
    head = OCRHead(60, 60, num_classes=3, channels=8, key_channels=4)
    model = OCRNet(HRNet(4, modules, blocks), head).double().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for x in (layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data):
                nn.init.uniform_(x, 0.5, 1.5)
    image = torch.randn(2, 3, *size).double()
    state = model.backbone.state_dict()
    with torch.no_grad():
        for align_corners in (False, True, False):  # the first is the default
            branches, features = hrnet_features(state, image, modules, blocks, align_corners)
            torch.testing.assert_close(model.backbone.forward_branches(image), branches)
            torch.testing.assert_close(model.backbone(image), (features, features))
            logits = [resized(x, size, align_corners) for x in model.head(features, features)]
            torch.testing.assert_close(model(image), tuple(logits))
            model.set_align_corners(not align_corners)


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
    image = F.one_hot(label, 3).movedim(3, 1) + 0.1 * torch.randn(2, 3, 32, 32)
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


def test_fcn_head_classifies_a_pixel_by_its_own_features():
    head = FCNHead(in_channels=6, num_classes=3).eval()
    features = torch.randn(1, 6, 4, 5)
    changed = features.clone()
    changed[0, :, 1, 2] += 1
    (before,), (after,) = head(features, features), head(features, changed)
    assert [tuple(i) for i in (before != after).any(1).nonzero().tolist()] == [(0, 1, 2)]


def test_gather_is_the_papers_weighted_mean_of_pixels():
    x, region_logits = torch.randn(2, 4, 3, 5).double(), torch.randn(2, 3, 3, 5).double()
    e = region_logits.exp()
    m = e / e.sum(dim=(2, 3), keepdim=True)  # (B, K, H, W)
    f = torch.stack([(m[:, k, None] * x).sum(dim=(2, 3)) for k in range(3)], dim=2)  # (B, C, K)
    torch.testing.assert_close(SpatialGather()(x, region_logits), f[..., None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gather_runs_in_fp32_under_autocast(dtype):
    x, region_logits = torch.randn(1, 4, 64, 64).to(dtype), torch.randn(1, 3, 64, 64).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        f = SpatialGather()(x, region_logits)
    assert f.dtype == torch.float32
    torch.testing.assert_close(f, SpatialGather()(x.float(), region_logits.float()), rtol=0, atol=0)


def test_context_is_the_mean_of_region_values_weighted_by_a_softmax_over_the_classes():
    attention = ObjectAttention(8, 4).double().eval()
    x, f = torch.randn(2, 8, 3, 5).double(), torch.randn(2, 8, 6, 1).double()
    q, k, v = attention.phi(x).flatten(2), attention.psi(f).flatten(2), attention.delta(f).flatten(2)
    kappa = (q[:, :, :, None] * k[:, :, None]).sum(dim=1) / 4**0.5  # (B, D, N), (B, D, K) -> (B, N, K)
    w = kappa.exp() / kappa.exp().sum(dim=2, keepdim=True)
    torch.testing.assert_close(attention.relation(x, f), w)
    y = (w[:, None] * v[:, :, None]).sum(dim=3).unflatten(2, (3, 5))  # (B, D, H, W)
    torch.testing.assert_close(attention(x, f), attention.rho(y))


def test_dropout_drops_channels_before_each_classifier():
    x, sizes = (torch.ones(1, 6, 4, 4), torch.ones(1, 4, 4, 4)), dict(num_classes=3, channels=8, key_channels=4)
    for region_dropout, dropout, changes in ((0.0, 0.0, [False, False]), (0.0, 0.5, [True, False])):
        head = OCRHead(6, 4, **sizes, region_dropout=region_dropout, dropout=dropout).eval()
        for layer in (head.classifier[0], head.region_head[1]):
            layer.train()
        outputs = [head(*x) for _ in range(9)]
        assert [any(not torch.equal(a, b) for b in others) for a, *others in zip(*outputs)] == changes
    head = OCRHead(6, 4, **sizes, region_dropout=1.0)
    assert not head(*x)[1].any()  # only the classifier's bias, 0, is left
