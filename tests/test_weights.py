"""Loading weights: what is loaded, what is refused, and that no code in a file is run."""

import hashlib
import pickle
import re
from functools import partial
from unittest.mock import patch

import pytest
import torch
from names import as_authors, as_mmsegmentation
from torch import nn
from torchvision.models.resnet import Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from ocrnet import InputError
from ocrnet.checkpoint import load_checkpoint, load_model, save_checkpoint
from ocrnet.data.classes import CITYSCAPES
from ocrnet.models import BACKBONES, HRNet, build_model, load_weights
from ocrnet.models.ocrnet import resnet
from ocrnet.models.weights import rename

REAL = dict(BACKBONES)
SMALL = {  # "deep" has every parameter of "small", and more
    "deep": partial(HRNet, width=4, num_modules=(2, 2, 1), num_blocks=1, head_channels=(16, 8)),
    "resnet": partial(resnet, layers=(1, 1, 1, 1)),
    "small": partial(HRNet, width=4, num_modules=(1, 1, 1), num_blocks=1, head_channels=(16, 8)),
    "wide": partial(HRNet, width=6, num_modules=(1, 1, 1), num_blocks=1, head_channels=(16, 8)),
}


@pytest.fixture(autouse=True)
def small_backbones():
    with patch.dict(BACKBONES, SMALL, clear=True):
        yield


def random_model(name="small", **more):
    """A model in evaluation mode with random tensors, also in BatchNorm, whose logits neither vanish nor explode."""
    torch.manual_seed(0)
    model = build_model(name, **{"num_classes": 3, **more}).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            layer.momentum = None  # running statistics are those of the following batch
    for classifier in [x for x in model.head.modules() if isinstance(x, nn.Conv2d) and x.bias is not None]:
        nn.init.normal_(classifier.weight, std=0.3)
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
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for other in others for x, y in zip(expected, other))


def same_tensors(first, second):
    return all(torch.equal(x, second[name]) for name, x in first.items())


def refused(load, *args):
    """The message, one sentence, of the InputError that ``load`` raises."""
    with pytest.raises(InputError) as error:
        load(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def saved(tmp_path):
    def save(state):
        torch.save(state, tmp_path / "x.pth")
        return tmp_path / "x.pth"

    return save


# digest: the sorted lines "NAME HxWx.." of mmsegmentation 1.2.2's models, and of the authors' HRNet-OCR without the two
# biases that BatchNorm makes superfluous
@pytest.mark.parametrize("theirs, name, head, digest", [
    (as_mmsegmentation, "hr18s", "ocr", "35b8ad16234a11d0"), (as_mmsegmentation, "hr48", "ocr", "6b3572094f7b3cfc"),
    (as_mmsegmentation, "hr18s", "fcn", "3aafdb42a0922767"), (as_mmsegmentation, "r101", "ocr", "60d1960c69cb7bb6"),
    (as_authors, "hr48", "ocr", "185843908bee013f"),
])  # fmt: skip
def test_every_tensor_of_other_projects_gets_our_name(theirs, name, head, digest, monkeypatch):
    monkeypatch.setitem(BACKBONES, name, REAL[name])
    with torch.device("meta"):
        model = build_model(name, deep_stem=name == "r101", head=head)
    state = theirs(model)
    lines = sorted(f"{key} {'x'.join(map(str, x.shape))}".rstrip() for key, x in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest().startswith(digest)
    assert {rename(key): x.shape for key, x in state.items()} == {k: x.shape for k, x in model.state_dict().items()}


@pytest.mark.parametrize("settings", [{}, {"head": "fcn"}, {"name": "resnet", "deep_stem": True}], ids=str)
def test_mmsegmentations_weights_give_the_same_logits(saved, settings):
    source = random_model(**settings)
    path = saved({"state_dict": as_mmsegmentation(source), "meta": {"epoch": 3}})
    model = build_model(source.config["name"], 3, head=source.config["head"])
    report = load_weights(model, path)
    assert not report.ignored and not report.random and not model.align_corners
    built = load_model(path)[0]
    assert source.config == model.config == built.config and same_logits(source, model, built)


def test_authors_weights_give_the_same_logits(saved):
    source = random_model(align_corners=True)
    state = as_authors(source, prefix="model.")
    for conv, bn in (("aux_head.0", "aux_head.1"), ("conv3x3_ocr.0", "conv3x3_ocr.1")):
        state[f"model.{conv}.bias"] = bias = torch.randn(len(state[f"model.{conv}.weight"]))
        state[f"model.{bn}.running_mean"] = state[f"model.{bn}.running_mean"] + bias  # which the bias shifts
    path = saved(state | {"loss.criterion.weight": torch.ones(19)})
    model = build_model("small", 3)
    report = load_weights(model, path)
    assert report.ignored == ["loss.criterion.weight"] and not report.random
    again = build_model(**model.config)  # as from a checkpoint of a run that started with these weights
    again.load_state_dict(model.state_dict())
    assert same_logits(source, model, again, load_model(path)[0])
    model.set_align_corners(False)
    assert not same_logits(source, model)


@pytest.mark.parametrize("dropout, expected", [(None, 0.05), (0.3, 0.3), (0.0, 0.0)])
def test_authors_dropout_is_the_default_with_their_weights(saved, dropout, expected):
    model = build_model("small", dropout=dropout)
    load_weights(model, saved(as_authors(build_model("small"))))
    assert model.config["dropout"] == model.head.classifier[0].p == expected


@pytest.mark.parametrize("align_corners", [False, True])
def test_checkpoint_of_this_project_gives_the_same_logits_and_classes(tmp_path, align_corners):
    source, model, path = random_model(align_corners=align_corners), build_model("small", 3), tmp_path / "x.pt"
    state = {"model": source.state_dict(), "config": source.config}
    save_checkpoint(path, state)
    load_weights(model, path)
    built, table = load_model(path)
    assert not built.training and table is None and source.config == model.config == built.config
    assert same_tensors(source.state_dict(), built.state_dict()) and same_logits(source, model, built)
    save_checkpoint(path, state | {"classes": CITYSCAPES.rows()})
    assert load_model(path)[1].labels == CITYSCAPES.labels


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "model.module."])
def test_prefixes_of_ddp_compile_and_wrappers_are_removed(saved, prefix):
    source, model = random_model(), build_model("small", 3)
    load_weights(model, saved({prefix + name: x for name, x in source.state_dict().items()} | {"epoch": 3}))
    assert same_logits(source, model)


@pytest.mark.parametrize(  # timm, DeiT, mmengine
    "averaged, last", [("state_dict_ema", "state_dict"), ("model_ema", "model"), ("state_dict", "ema_state_dict")]
)
def test_averaged_weights_are_preferred(saved, averaged, last):
    source, model = random_model(), build_model("small", 3)
    mean = {"module." + name: x for name, x in source.state_dict().items()}  # as AveragedModel names them
    state = {last: build_model("small", 3).state_dict(), averaged: mean | {"n_averaged": torch.tensor(3)}}
    path = saved(state | {"config": "a text"})
    assert load_weights(model, path).ignored == ["n_averaged"]
    assert same_logits(source, model)


def test_half_precision_tensors_are_loaded_as_fp32(saved):
    source, model = random_model(), build_model("small", 3)
    path = saved({"model": source.half().state_dict(), "config": source.config})
    load_weights(model, path)
    loaded = load_model(path)[0]
    assert all(x.dtype == torch.float32 for net in (model, loaded) for x in net.parameters())
    assert same_logits(source.float(), model, loaded)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_are_refused_by_name(saved, value):
    model = build_model("small")
    model.state_dict()["head.g.1.running_var"][3] = value
    path = saved({"model": model.state_dict(), "config": model.config})
    for load in (partial(load_weights, model), load_model):
        assert refused(load, path).startswith(f"{path}: head.g.1.running_var: ")


def test_classifiers_of_other_classes_are_left_out_and_said(saved):
    source, model = build_model("small", 3), build_model("small", 4)
    report = load_weights(model, saved(as_mmsegmentation(source)))
    classifiers = {f"head.{name}.{x}" for name in ("region_head.2", "classifier.1") for x in ("weight", "bias")}
    assert set(report.random) == classifiers and len(report.ignored) == 4
    kept = {name: x for name, x in source.state_dict().items() if name not in classifiers}
    assert same_tensors(kept, model.state_dict())


@pytest.mark.parametrize("head, other", [("fcn", "ocr"), ("ocr", "fcn")])
def test_another_head_is_left_out_and_said(saved, head, other):
    source, model = build_model("small", 3, head=head), build_model("small", 3, head=other)
    head_before = {name: x.clone() for name, x in model.head.state_dict().items()}
    report = load_weights(model, saved(source.state_dict()))
    assert same_tensors(source.backbone.state_dict(), model.backbone.state_dict())
    assert same_tensors(head_before, model.head.state_dict())
    assert set(report.ignored) == {f"head.{name}" for name in source.head.state_dict()}
    assert set(report.random) == {f"head.{name}" for name in head_before if "num_batches" not in name}


@pytest.mark.parametrize("name, build, more", [
    ("small", lambda: random_model().backbone, ["classifier.weight", "classifier.bias", "incre_modules.0.0.bn1.bias"]),
    ("resnet", lambda: TorchvisionResNet(Bottleneck, [1, 1, 1, 1]), ["fc.weight", "fc.bias"]),
])  # fmt: skip
def test_imagenets_hrnet_and_torchvisions_resnet_are_loaded_into_the_backbone(tmp_path, name, build, more):
    source, model = build().state_dict() | {key: torch.zeros(1) for key in more}, build_model(name)
    torch.save(source, tmp_path / "x.pth", _use_new_zipfile_serialization=name == "resnet")  # HRNet's: as in 2019
    report = load_weights(model, tmp_path / "x.pth")
    assert report.ignored == more and all(key.startswith("head.") for key in report.random)
    assert same_tensors(model.backbone.state_dict(), source)
    assert re.findall(r"\((.*?)\)", str(report)) == [", ".join(more), ", ".join([*report.random[:3], "..."])]
    assert re.findall(r"(\d+) \w* ?of the", str(report)) == [str(len(more)), str(len(report.random))]


@pytest.mark.parametrize("name", ["wide", "deep"])
def test_another_backbone_is_refused_with_the_model_that_fits(saved, name):
    model = build_model("small")
    before = {key: x.clone() for key, x in model.state_dict().items()}
    path = saved(build_model(name).state_dict())
    message = refused(load_weights, model, path)
    assert message.startswith(f"{path}: expected the backbone small, ") and f"--model {name} " in message
    assert same_tensors(before, model.state_dict())


@pytest.mark.parametrize(
    "name, shape", [("conv2.weight", (64, 64, 1, 1)), ("layer1.9.bn1.bias", (1,)), ("conv1.6.weight", (64, 32, 3, 3))]
)
def test_backbone_that_no_model_has_is_refused_without_a_remedy(saved, name, shape):
    model = build_model("small")
    message = refused(load_weights, model, saved(model.backbone.state_dict() | {name: torch.zeros(shape)}))
    assert message.endswith(f"backbone.{name} does not fit")


def test_file_with_less_than_95_percent_of_the_backbone_is_refused(saved):
    model = build_model("deep")
    names = [name for name in model.backbone.state_dict() if not name.endswith("num_batches_tracked")]
    assert len(names) == 360
    state = {name: x for name, x in model.backbone.state_dict().items() if name not in names[:18]}
    assert load_weights(model, saved(state)).random[:18] == [f"backbone.{name}" for name in names[:18]]
    del state[names[18]]
    assert refused(load_weights, model, saved(state)).endswith("tensors, backbone.conv1.weight is missing")


@pytest.mark.parametrize("order", [1, -1])
def test_the_largest_backbone_that_fits_is_built_in_any_order_of_the_table(saved, order):
    table = list(BACKBONES.items())[::order]
    BACKBONES.clear()
    BACKBONES.update(table)
    assert load_model(saved(build_model("deep").state_dict()))[0].config["name"] == "deep"


def test_only_whole_models_are_evaluated(saved):
    model = build_model("small")
    path = saved(model.backbone.state_dict())
    assert re.match(f"{path}: expected a whole OCRNet, found .* small", refused(load_model, path))
    state = as_mmsegmentation(model)
    del state["decode_head.1.bottleneck.conv.weight"]
    assert "head.pixel_head.0.weight" in refused(load_model, saved(state))
    path = saved({"classifier.weight": torch.ones(1)})
    assert "expected a backbone of deep, resnet, small, wide" in refused(load_model, path)


class Exploit:
    def __reduce__(self):
        return print, ("this ran",)


def test_code_in_a_file_is_not_run(tmp_path, saved, capsys):
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Exploit(), protocol=2))
    for path in (tmp_path / "bad.pt", saved({"model": Exploit(), "config": {}})):
        for load in (load_checkpoint, load_model, partial(load_weights, build_model("small"))):
            assert refused(load, path).startswith(f"{path}: ")
    assert "this ran" not in capsys.readouterr().out


def test_file_with_other_objects_is_refused_with_a_command_that_keeps_its_tensors(saved, tmp_path, monkeypatch):
    """As checkpoints of mmengine, whose training history is an object."""
    model = build_model("small")
    message = refused(load_weights, model, saved({"state_dict": as_mmsegmentation(model), "meta": Exploit()}))
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'python -c "(.*)"', message)[1], {})
    assert not load_weights(model, tmp_path / "weights.pth").random


@pytest.mark.parametrize("content, found", [
    (b"", "an empty file"), (b"<!DOCTYPE html>", "an HTML page"), (b"\x89PNG", "another format"),
    (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"), (b"PK\x03\x04", "incomplete"),
    (b"\x80\x02", "incomplete"),
])  # fmt: skip
def test_file_that_is_no_checkpoint_is_named_and_described(tmp_path, content, found):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    assert re.match(f"{path}: .*{found}", refused(load_checkpoint, path))


def test_incomplete_or_other_dicts_are_refused(tmp_path, saved, monkeypatch):
    model = build_model("small")
    content = saved({"model": model.state_dict(), "config": model.config}).read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[:2000])
    (tmp_path / "flipped.pt").write_bytes(content.replace(bytes(200), bytes(199) + b"\1", 1))
    paths = [tmp_path / "cut.pt", tmp_path / "flipped.pt", tmp_path / "absent.pt", tmp_path, saved({"something": 1})]
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    for path in (*paths, tmp_path / "list.pt"):
        for load in (load_checkpoint, load_model, partial(load_weights, model)):
            assert str(path) in refused(load, path)
    monkeypatch.chdir(tmp_path.parent)  # a folder's name is no name of hub.py
    assert "best.pt" in refused(load_model, tmp_path.name)


@pytest.mark.parametrize("config", [{"name": "small", "num_classes": 4}, {"name": "small", "depth": 9}, []])
def test_checkpoint_whose_tensors_do_not_fit_its_config_is_refused(saved, config):
    path = saved({"model": build_model("small").state_dict(), "config": config})
    assert refused(load_model, path).startswith(f"{path}: its tensors do not fit its 'config'")
