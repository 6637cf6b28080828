"""Loading weights: what comes in, what is refused, and that nothing in a file is run."""

import pickle

import pytest
import torch
import torchvision
from conftest import as_mmsegmentation, as_theirs

from ocrnet.checkpoint import load_checkpoint, load_model, save_checkpoint
from ocrnet.errors import InputError
from ocrnet.models import build_model, load_weights
from ocrnet.models.weights import AUTHORS


@pytest.fixture(scope="module")
def model():
    return build_model("hr18s")


def test_an_imagenet_hrnet_fits_the_backbone_without_a_map(model, tmp_path):
    torch.manual_seed(1)
    source = build_model("hr18s").backbone.state_dict()
    torch.save({**source, "classifier.weight": torch.zeros(1000, 2048), "incre_modules.0.0.bn1.bias": torch.zeros(1)},
               tmp_path / "imagenet.pth")  # fmt: skip
    report = load_weights(model, tmp_path / "imagenet.pth")
    assert len(report.loaded) == len(source)
    assert report.ignored == ["classifier.weight", "incre_modules.0.0.bn1.bias"]
    assert report.missing and all(name.startswith("head.") for name in report.missing)
    for name, x in source.items():
        assert torch.equal(model.backbone.state_dict()[name], x)


def test_weights_of_another_variant_are_refused_by_the_tensors_name(model, tmp_path):
    torch.save(build_model("hr32").state_dict(), tmp_path / "hr32.pth")
    with pytest.raises(InputError, match=r"backbone\.\S+ is \(.*the model expects \("):
        load_weights(model, tmp_path / "hr32.pth")


def test_a_file_with_too_little_of_the_backbone_is_refused(model, tmp_path):
    torch.save({"conv1.weight": model.backbone.conv1.weight}, tmp_path / "little.pth")
    with pytest.raises(InputError, match="holds 0% of the backbone's tensors"):
        load_weights(model, tmp_path / "little.pth")


def random_model(name, **more):
    """Random weights and random BatchNorm statistics."""
    torch.manual_seed(0)
    model = build_model(name, **more).eval()
    for key, x in model.state_dict().items():
        if "running" in key:
            x.uniform_(0.5, 1.5)
    return model


@torch.inference_mode()
def same_logits(a, b, size=(65, 97)):
    image = torch.randn(1, 3, *size)
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(a.eval()(image), b.eval()(image)))


def test_mmsegmentations_names_are_understood(tmp_path):
    source = random_model("hr18s")
    state = as_mmsegmentation(source)
    assert "decode_head.1.object_context_block.query_project.1.bn.running_var" in state
    torch.save({"state_dict": state, "meta": {"epoch": 3}}, tmp_path / "mmseg.pth")
    model = build_model("hr18s")
    report = load_weights(model, tmp_path / "mmseg.pth")
    assert report.source == "mmsegmentation" and not report.ignored and not report.missing
    assert same_logits(model, source)
    assert same_logits(load_model(tmp_path / "mmseg.pth")[0], source)  # the variant is read off the shapes


def test_a_file_of_more_than_tensors_says_how_to_keep_the_tensors(tmp_path):
    """As checkpoints of mmengine, whose training history is an object of its own."""
    torch.save({"state_dict": {}, "meta": Exploit()}, tmp_path / "history.pth")
    with pytest.raises(InputError, match=r"weights_only=False\)\['state_dict'\], 'weights.pth'"):
        load_weights(build_model("hr18s"), tmp_path / "history.pth")


def test_mmsegmentations_resnet_brings_its_deep_stem(tmp_path):
    source = random_model("r50", num_classes=5, deep_stem=True)
    state = as_mmsegmentation(source)
    assert state["backbone.stem.0.weight"].shape == (32, 3, 3, 3)
    torch.save({"state_dict": state}, tmp_path / "resnet.pth")
    model = build_model("r50", num_classes=5)
    load_weights(model, tmp_path / "resnet.pth")
    assert model.config["deep_stem"] and same_logits(model, source)
    assert same_logits(load_model(tmp_path / "resnet.pth")[0], source)


def test_the_authors_weights_bring_their_resizing_and_fold_their_biases(tmp_path):
    source = random_model("hr18s", align_corners=True)
    state = as_theirs(source, AUTHORS, prefix="model.")
    for conv, bn in (("aux_head.0", "aux_head.1"), ("conv3x3_ocr.0", "conv3x3_ocr.1")):
        bias = torch.randn(state[f"model.{conv}.weight"].shape[0])
        state[f"model.{conv}.bias"] = bias
        state[f"model.{bn}.running_mean"] = state[f"model.{bn}.running_mean"] + bias  # of what the bias shifted
    torch.save({**state, "loss.criterion.weight": torch.ones(19)}, tmp_path / "authors.pth")
    model = build_model("hr18s")
    report = load_weights(model, tmp_path / "authors.pth")
    assert report.ignored == ["loss.criterion.weight"] and not report.missing
    assert model.config["align_corners"] and model.align_corners and model.backbone.stage4[0].align_corners
    assert model.head.classifier[0].p == model.config["dropout"] == 0.05
    assert same_logits(model, source) and same_logits(load_model(tmp_path / "authors.pth")[0], source)
    assert not same_logits(build_model("hr18s"), source)
    again = build_model(**model.config)  # what a checkpoint of a run that started from them does
    again.load_state_dict(model.state_dict())
    assert same_logits(again, source)


def test_torchvisions_resnet_fits_the_backbone(tmp_path):
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    report = load_weights(build_model("r50"), tmp_path / "resnet50.pth")
    assert report.ignored == ["fc.bias", "fc.weight"] and all(name.startswith("head.") for name in report.missing)


def test_a_larger_variant_of_equal_shapes_is_refused(model, tmp_path):
    """hr18 holds every tensor of hr18s in the right shape, and more."""
    torch.save(build_model("hr18").state_dict(), tmp_path / "hr18.pth")
    with pytest.raises(InputError, match=r"no place for backbone\.\S+: weights of another variant"):
        load_weights(model, tmp_path / "hr18.pth")


def test_a_backbone_alone_is_no_model_to_score(tmp_path):
    torch.save(build_model("hr18s").backbone.state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(InputError, match="no OCR head in it"):
        load_model(tmp_path / "backbone.pth")


class Exploit:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("load", [load_checkpoint, lambda path: load_weights(build_model("hr18s"), path)])
def test_code_in_a_file_is_not_run(load, tmp_path, capsys):
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Exploit(), protocol=2))
    torch.save({"model": Exploit(), "config": {}}, tmp_path / "worse.pt")
    for name in ("bad.pt", "worse.pt"):
        with pytest.raises(InputError, match=name):
            load(tmp_path / name)
    assert "this ran" not in capsys.readouterr().out


def test_a_checkpoint_gives_back_the_model_it_describes(tmp_path):
    model = build_model("hr18s", num_classes=4)
    save_checkpoint(tmp_path / "x.pt", {"model": model.state_dict(), "config": model.config})
    again, _ = load_model(tmp_path / "x.pt")
    assert not again.training
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), again.state_dict().values()))


def test_a_checkpoint_whose_tensors_are_of_another_model_is_refused(tmp_path):
    model = build_model("hr18s")
    for config in (model.config | {"num_classes": 4}, {"name": "hr18s", "depth": 9}, {"name": "no such"}, []):
        save_checkpoint(tmp_path / "x.pt", {"model": model.state_dict(), "config": config})
        with pytest.raises(InputError, match="x.pt|no such"):
            load_model(tmp_path / "x.pt")


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "x.pt", {"model": {}, "config": {}, "iter": 1})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "x.pt", {"model": {}, "config": (i for i in "no pickle")})
    assert load_checkpoint(tmp_path / "x.pt")["iter"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"something": 1}, tmp_path / "other.pt")
    save_checkpoint(tmp_path / "cut.pt", {"model": {"x": torch.zeros(1000)}, "config": {}})
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:2000])
    for name in ("text.pt", "empty.pt", "other.pt", "cut.pt", "absent.pt"):
        with pytest.raises(InputError, match=name):
            load_checkpoint(tmp_path / name)


def test_weights_with_the_other_head_are_refused_by_its_name(tmp_path):
    for head, other in (("fcn", "ocr"), ("ocr", "fcn")):
        source = build_model("hr18s", head=head)
        torch.save(source.state_dict(), tmp_path / "x.pth")
        with pytest.raises(InputError, match=f"weights with head {head}: the model has {other}: set --head to theirs"):
            load_weights(build_model("hr18s", head=other), tmp_path / "x.pth")
        assert load_model(tmp_path / "x.pth")[0].config["head"] == head


def test_an_ocrnet_of_other_classes_gives_all_but_its_classifiers(tmp_path):
    source, model = build_model("hr18s", num_classes=19), build_model("hr18s", num_classes=4)
    torch.save({"state_dict": as_mmsegmentation(source)}, tmp_path / "x.pth")
    report = load_weights(model, tmp_path / "x.pth")
    classifiers = {f"head.{name}.{x}" for name in ("region_head.2", "classifier.1") for x in ("weight", "bias")}
    assert set(report.missing) == classifiers and len(report.ignored) == 4
    own = model.state_dict()
    assert all(torch.equal(x, own[name]) for name, x in source.state_dict().items() if name not in classifiers)
    assert own["head.classifier.1.weight"].shape[0] == 4


def test_a_dropout_that_was_asked_for_stays(tmp_path):
    torch.save(as_theirs(build_model("hr18s"), AUTHORS), tmp_path / "x.pth")
    for asked, expected in ((None, 0.05), (0.3, 0.3)):
        model = build_model("hr18s", dropout=asked)
        load_weights(model, tmp_path / "x.pth")
        assert model.config["dropout"] == model.head.classifier[0].p == expected
