"""Loading weights: what is loaded, what is refused, and that no code in a file is run."""

import hashlib
import pickle

import pytest
import torch
import torchvision
from names import as_authors, as_mmsegmentation
from torch import nn

from ocrnet import InputError
from ocrnet.checkpoint import load_checkpoint, load_model, save_checkpoint
from ocrnet.data.classes import CITYSCAPES
from ocrnet.models import BACKBONES, build_model, load_weights
from ocrnet.models.weights import rename_keys


@pytest.fixture(scope="module")
def model():
    """A model to load into, for tests that do not read it afterwards."""
    return build_model("hr18s")


def random_model(name, **more):
    """A model in evaluation mode with random tensors, also in BatchNorm, whose logits neither vanish nor explode."""
    torch.manual_seed(0)
    model = build_model(name, **more).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            layer.momentum = None  # running statistics are those of the following batch
    for classifier in (model.head.region_head[-1], model.head.classifier[-1]):
        nn.init.normal_(classifier.weight, std=0.1)
        nn.init.normal_(classifier.bias, std=0.1)
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    return model.eval()


@torch.inference_mode()
def same_logits(*models):
    """Whether models give the same logits, for an image of odd size."""
    image = torch.randn(1, 3, 33, 49)
    expected, *others = (model.eval()(image) for model in models)
    assert all(x.std(dim=(2, 3)).min() > 0.01 for x in expected)  # every class depends on the pixel
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for other in others for x, y in zip(expected, other))


@pytest.fixture
def only_hr18s(monkeypatch):
    """Building every backbone to compare its shapes takes seconds."""
    for name in set(BACKBONES) - {"hr18s"}:
        monkeypatch.delitem(BACKBONES, name)


def refused(load, *args):
    """The message of the InputError that ``load`` raises."""
    with pytest.raises(InputError) as error:
        load(*args)
    return str(error.value)


# ---- names of other projects -----------------------------------------------------------------------------------------


# digest: the sorted lines "NAME HxWx.." of mmsegmentation 1.2.2's models, and of the authors' HRNet-OCR without the two
# biases that BatchNorm makes superfluous. r50 and the authors' hr18s are there for the round trip only.
@pytest.mark.parametrize(
    "rename, name, head, source, digest",
    [
        (as_mmsegmentation, "hr18s", "ocr", "mmsegmentation", "35b8ad16234a11d0"),
        (as_mmsegmentation, "hr18", "ocr", "mmsegmentation", "acc90f2ecca26190"),
        (as_mmsegmentation, "hr18s", "fcn", "mmsegmentation", "3aafdb42a0922767"),
        (as_mmsegmentation, "hr48", "fcn", "mmsegmentation", "0abc10f004adbc18"),
        (as_mmsegmentation, "r50", "ocr", "mmsegmentation", ""),
        (as_mmsegmentation, "r101", "ocr", "mmsegmentation", "60d1960c69cb7bb6"),
        (as_authors, "hr18s", "ocr", "the authors' HRNet-OCR", ""),
        (as_authors, "hr48", "ocr", "the authors' HRNet-OCR", "185843908bee013f"),
    ],
)
def test_every_tensor_is_found_under_the_names_of_other_projects(rename, name, head, source, digest):
    with torch.device("meta"):
        model = build_model(name, deep_stem=name[0] == "r", head=head)
    theirs, own = rename(model), model.state_dict()
    lines = sorted(f"{key} {'x'.join(map(str, x.shape))}".rstrip() for key, x in theirs.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest().startswith(digest)
    found, ours = rename_keys(theirs)
    assert found == source and ours.keys() == theirs.keys()
    assert sorted(ours.values()) == sorted(own)
    assert all(own[ours[key]].shape == x.shape for key, x in theirs.items())


@pytest.mark.parametrize("rename", [as_mmsegmentation, as_authors])
def test_every_tensor_comes_back_under_its_own_name(rename):
    source = random_model("hr18s")
    theirs = rename(source)
    _, ours = rename_keys(theirs)
    own = source.state_dict()
    assert all(torch.equal(own[ours[key]], x) for key, x in theirs.items())


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("decode_head.1.object_context_block.query_project.1.bn.running_var", "head.attention.phi.1.1.running_var"),
        ("decode_head.1.object_context_block.out_project.conv.weight", "head.attention.rho.0.weight"),
        ("decode_head.1.object_context_block.bottleneck.bn.bias", "head.g.1.bias"),
        ("decode_head.1.bottleneck.conv.weight", "head.pixel_head.0.weight"),
        ("decode_head.0.convs.0.bn.weight", "head.region_head.0.1.weight"),
        ("decode_head.0.conv_seg.bias", "head.region_head.2.bias"),
        ("backbone.stem.7.running_mean", "backbone.bn1.running_mean"),
        ("backbone.stem.4.weight", "backbone.conv1.4.weight"),
        ("backbone.layer1.0.downsample.1.bias", "backbone.layer1.0.downsample.1.bias"),
    ],
)
def test_names_of_mmsegmentation(theirs, ours):
    assert rename_keys(["decode_head.1.conv_seg.weight", theirs])[1] == {
        "decode_head.1.conv_seg.weight": "head.classifier.1.weight",
        theirs: ours,
    }


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("ocr_distri_head.object_context_block.f_pixel.0.weight", "head.attention.phi.0.0.weight"),
        ("ocr_distri_head.object_context_block.f_pixel.1.0.running_var", "head.attention.phi.0.1.running_var"),
        ("ocr_distri_head.object_context_block.f_object.2.weight", "head.attention.psi.1.0.weight"),
        ("ocr_distri_head.object_context_block.f_object.3.0.bias", "head.attention.psi.1.1.bias"),
        ("ocr_distri_head.object_context_block.f_down.1.0.bias", "head.attention.delta.1.bias"),
        ("ocr_distri_head.object_context_block.f_up.0.weight", "head.attention.rho.0.weight"),
        ("ocr_distri_head.conv_bn_dropout.1.0.running_mean", "head.g.1.running_mean"),
        ("conv3x3_ocr.1.weight", "head.pixel_head.1.weight"),
        ("aux_head.0.bias", "head.region_head.0.0.bias"),
        ("aux_head.3.weight", "head.region_head.2.weight"),
        ("stage4.0.fuse_layers.3.1.0.0.weight", "backbone.stage4.0.fuse_layers.3.1.0.0.weight"),
    ],
)
def test_names_of_the_authors(theirs, ours):
    assert rename_keys(["cls_head.weight", theirs])[1] == {"cls_head.weight": "head.classifier.1.weight", theirs: ours}


# ---- whole OCRNets of other projects ---------------------------------------------------------------------------------


def test_mmsegmentations_ocrnet_is_loaded(tmp_path):
    source = random_model("hr18s")
    torch.save({"state_dict": as_mmsegmentation(source), "meta": {"epoch": 3}}, tmp_path / "mmseg.pth")
    model = build_model("hr18s")
    report = load_weights(model, tmp_path / "mmseg.pth")
    assert report.source == "mmsegmentation" and not report.ignored and not report.missing
    assert not model.align_corners
    built = load_model(tmp_path / "mmseg.pth")[0]  # the backbone follows from the shapes
    assert built.config["name"] == "hr18s" and same_logits(source, model, built)


def test_mmsegmentations_resnet_brings_its_deep_stem(tmp_path):
    source = random_model("r50", num_classes=5, deep_stem=True)
    state = as_mmsegmentation(source)
    assert state["backbone.stem.0.weight"].shape == (32, 3, 3, 3)
    torch.save({"state_dict": state}, tmp_path / "resnet.pth")
    model = build_model("r50", num_classes=5)
    load_weights(model, tmp_path / "resnet.pth")
    assert model.config["deep_stem"] and same_logits(source, model, load_model(tmp_path / "resnet.pth")[0])


def test_authors_weights_bring_align_corners_and_dropout_and_fold_their_biases(tmp_path):
    source = random_model("hr18s", align_corners=True)
    for bn in (source.head.region_head[0][1], source.head.pixel_head[1]):
        bn.running_mean.mul_(64).round_().div_(64)  # so that adding and folding the bias below is exact
    state = as_authors(source, prefix="model.")
    for conv, bn in (("aux_head.0", "aux_head.1"), ("conv3x3_ocr.0", "conv3x3_ocr.1")):
        bias = torch.randint(-64, 65, state[f"model.{conv}.weight"].shape[:1]) / 64
        state[f"model.{conv}.bias"] = bias
        state[f"model.{bn}.running_mean"] = state[f"model.{bn}.running_mean"] + bias  # which the bias shifts
    torch.save({**state, "loss.criterion.weight": torch.ones(19)}, tmp_path / "authors.pth")
    model = build_model("hr18s")
    report = load_weights(model, tmp_path / "authors.pth")
    assert report.ignored == ["loss.criterion.weight"] and not report.missing
    assert model.config["align_corners"] and model.align_corners and model.backbone.stage4[0].align_corners
    assert model.head.classifier[0].p == model.config["dropout"] == 0.05
    again = build_model(**model.config)  # as from a checkpoint of a run that started with these weights
    again.load_state_dict(model.state_dict())
    assert same_logits(source, model, again, load_model(tmp_path / "authors.pth")[0])
    model.set_align_corners(False)
    assert not same_logits(source, model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.module."])
def test_names_as_ddp_compile_and_wrappers_write_them_are_loaded(tmp_path, prefix):
    source, model = random_model("hr18s"), build_model("hr18s")
    torch.save({prefix + name: x for name, x in source.state_dict().items()}, tmp_path / "x.pth")
    assert not load_weights(model, tmp_path / "x.pth").missing
    assert same_logits(source, model)


@pytest.mark.parametrize(
    "averaged, last",
    [("state_dict_ema", "state_dict"), ("model_ema", "model"), ("state_dict", "ema_state_dict")],
    ids=["timm", "DeiT", "mmengine"],
)
def test_averaged_weights_are_preferred(tmp_path, averaged, last):
    source, model = random_model("hr18s"), build_model("hr18s")
    mean = {"module." + name: x for name, x in source.state_dict().items()}  # as AveragedModel names them
    states = {last: build_model("hr18s").state_dict(), averaged: {**mean, "n_averaged": torch.tensor(3)}}
    torch.save(states, tmp_path / "x.pth")
    assert load_weights(model, tmp_path / "x.pth").ignored == ["n_averaged"]
    assert same_logits(source, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tensors_are_loaded_as_fp32(tmp_path, dtype):
    source = random_model("hr18s")
    source.to(dtype).float()
    half, theirs = (
        {name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}
        for state in (source.state_dict(), as_mmsegmentation(source))
    )
    model = build_model("hr18s")
    torch.save(theirs, tmp_path / "theirs.pth")
    load_weights(model, tmp_path / "theirs.pth")
    save_checkpoint(tmp_path / "ours.pt", {"model": half, "config": source.config})
    ours = load_model(tmp_path / "ours.pt")[0]
    assert all(x.dtype == torch.float32 for net in (model, ours) for x in net.parameters())
    assert same_logits(source, model, ours)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_in_weights_are_refused_by_name(tmp_path, only_hr18s, value):
    source = build_model("hr18s")
    name = "head.g.1.running_var"
    source.state_dict()[name][3] = value
    torch.save(source.state_dict(), tmp_path / "x.pth")
    torch.save({"model": source.state_dict(), "config": source.config}, tmp_path / "x.pt")
    for message in (refused(load_weights, source, tmp_path / "x.pth"), refused(load_model, tmp_path / "x.pt")):
        assert str(tmp_path / "x.p") in message and name in message


def test_classifiers_of_other_classes_are_left_out(tmp_path):
    source, model = build_model("hr18s", num_classes=19), build_model("hr18s", num_classes=4)
    torch.save({"state_dict": as_mmsegmentation(source)}, tmp_path / "x.pth")
    report = load_weights(model, tmp_path / "x.pth")
    classifiers = {f"head.{name}.{x}" for name in ("region_head.2", "classifier.1") for x in ("weight", "bias")}
    assert set(report.missing) == classifiers and len(report.ignored) == 4
    own = model.state_dict()
    assert all(torch.equal(x, own[name]) for name, x in source.state_dict().items() if name not in classifiers)
    assert own["head.classifier.1.weight"].shape[0] == 4


# ---- backbones -------------------------------------------------------------------------------------------------------


def test_imagenet_hrnet_is_loaded_into_the_backbone(model, tmp_path):
    source = random_model("hr18s").backbone.state_dict()
    more = {"classifier.weight": torch.zeros(1000, 2048), "incre_modules.0.0.bn1.bias": torch.zeros(1)}
    torch.save({**source, **more}, tmp_path / "imagenet.pth")
    report = load_weights(model, tmp_path / "imagenet.pth")
    assert len(report.loaded) == len(source)
    assert report.ignored == ["classifier.weight", "incre_modules.0.0.bn1.bias"]
    assert report.missing and all(name.startswith("head.") for name in report.missing)
    own = model.backbone.state_dict()
    assert all(torch.equal(own[name], x) for name, x in source.items())


def test_torchvisions_resnet_is_loaded_into_the_backbone(tmp_path):
    source, model = torchvision.models.resnet50(weights=None).state_dict(), build_model("r50")
    torch.save(source, tmp_path / "resnet50.pth")
    report = load_weights(model, tmp_path / "resnet50.pth")
    assert report.ignored == ["fc.bias", "fc.weight"] and all(name.startswith("head.") for name in report.missing)
    own = model.backbone.state_dict()
    assert all(torch.equal(own[name], x) for name, x in source.items() if not name.startswith("fc."))


@pytest.mark.parametrize("name", ["hr32", "hr18"])  # hr18 has every tensor of hr18s in its shape, and more
def test_weights_of_another_backbone_are_refused(model, tmp_path, name):
    before = {key: x.clone() for key, x in model.state_dict().items()}
    torch.save(build_model(name).state_dict(), tmp_path / "x.pth")
    message = refused(load_weights, model, tmp_path / "x.pth")
    assert str(tmp_path / "x.pth") in message and "backbone" in message and f"--model {name} fits" in message
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_tensor_of_another_shape_is_refused(model, tmp_path):
    torch.save({**model.state_dict(), "backbone.conv2.weight": torch.zeros(64, 64, 1, 1)}, tmp_path / "x.pth")
    message = refused(load_weights, model, tmp_path / "x.pth")
    assert all(text in message for text in (str(tmp_path / "x.pth"), "backbone.conv2.weight", "(64, 64, 1, 1)"))
    assert "--model" not in message  # no other would fit


def test_file_with_too_little_of_the_backbone_is_refused(model, tmp_path):
    torch.save({"conv1.weight": model.backbone.conv1.weight}, tmp_path / "little.pth")
    assert str(tmp_path / "little.pth") in refused(load_weights, model, tmp_path / "little.pth")


@pytest.mark.parametrize("head, other", [("fcn", "ocr"), ("ocr", "fcn")])
def test_of_weights_with_the_other_head_the_backbone_is_loaded(tmp_path, only_hr18s, head, other):
    source, model = build_model("hr18s", head=head), build_model("hr18s", head=other)
    torch.save(source.state_dict(), tmp_path / "x.pth")
    report = load_weights(model, tmp_path / "x.pth")
    expected = source.backbone.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in model.backbone.state_dict().items())
    assert set(report.ignored) == {f"head.{name}" for name in source.head.state_dict()}
    assert any(name.startswith("head.classifier") for name in report.missing)
    assert load_model(tmp_path / "x.pth")[0].config["head"] == head


def test_backbone_is_not_a_model_to_evaluate(tmp_path):
    torch.save(build_model("hr18s").backbone.state_dict(), tmp_path / "backbone.pth")
    assert str(tmp_path / "backbone.pth") in refused(load_model, tmp_path / "backbone.pth")


def test_incomplete_model_is_not_evaluated(tmp_path, only_hr18s):
    state = as_mmsegmentation(build_model("hr18s"))
    del state["decode_head.1.bottleneck.conv.weight"]
    torch.save(state, tmp_path / "x.pth")
    message = refused(load_model, tmp_path / "x.pth")
    assert str(tmp_path / "x.pth") in message and "head.pixel_head.0.weight" in message


# ---- files that hold code --------------------------------------------------------------------------------------------


class Exploit:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("load", [load_checkpoint, lambda path: load_weights(build_model("hr18s"), path)])
def test_code_in_a_file_is_not_run(load, tmp_path, capsys):
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Exploit(), protocol=2))
    torch.save({"model": Exploit(), "config": {}}, tmp_path / "worse.pt")
    for name in ("bad.pt", "worse.pt"):
        assert str(tmp_path / name) in refused(load, tmp_path / name)
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, found",
    [
        (b"", "0 bytes"),
        (b"<!DOCTYPE html>", "<!DOCTYPE"),
        (b"version https://git-lfs.github.com/spec/v1", "version http"),
    ],
)
def test_a_file_that_holds_something_else_is_one_sentence_that_says_what(model, tmp_path, content, found):
    (tmp_path / "x.pth").write_bytes(content)
    message = refused(load_weights, model, tmp_path / "x.pth")
    assert message.startswith(f"{tmp_path / 'x.pth'}: ") and found in message and "\n" not in message


# ---- checkpoints of this project -------------------------------------------------------------------------------------


def test_checkpoint_restores_its_model_and_classes(tmp_path):
    model = build_model("hr18s", num_classes=4)
    state = {"model": model.state_dict(), "config": model.config}
    save_checkpoint(tmp_path / "x.pt", state)
    again, table = load_model(tmp_path / "x.pt")
    assert not again.training and again.config == model.config and table is None
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), again.state_dict().values()))
    save_checkpoint(tmp_path / "x.pt", state | {"classes": CITYSCAPES.rows()})
    assert load_model(tmp_path / "x.pt")[1].labels == CITYSCAPES.labels


def test_checkpoint_whose_tensors_do_not_fit_its_config_is_refused(tmp_path):
    model = build_model("hr18s")
    for config in (model.config | {"num_classes": 4}, {"name": "hr18s", "depth": 9}, []):
        save_checkpoint(tmp_path / "x.pt", {"model": model.state_dict(), "config": config})
        assert str(tmp_path / "x.pt") in refused(load_model, tmp_path / "x.pt")
    save_checkpoint(tmp_path / "x.pt", {"model": model.state_dict(), "config": {"name": "no such"}})
    assert "no such" in refused(load_model, tmp_path / "x.pt")


def test_failed_write_keeps_the_old_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "x.pt", {"model": {}, "config": {}, "optimizer": {}, "iter": 1})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "x.pt", {"model": {}, "config": (i for i in "no pickle")})
    assert load_checkpoint(tmp_path / "x.pt")["iter"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_checkpoint_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "absent/x.pt"
    assert str(path) in refused(save_checkpoint, path, {"model": {}, "config": {}})


def test_file_that_is_not_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"something": 1}, tmp_path / "other.pt")
    save_checkpoint(tmp_path / "cut.pt", {"model": {"x": torch.zeros(1000)}, "config": {}})
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:2000])
    for name in ("text.pt", "empty.pt", "other.pt", "cut.pt", "absent.pt"):
        assert str(tmp_path / name) in refused(load_checkpoint, tmp_path / name)
