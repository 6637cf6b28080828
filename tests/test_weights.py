"""Loading weights: what comes in, what is refused, and that nothing in a file is run."""

import pickle

import pytest
import torch

from ocrnet.checkpoint import load_checkpoint, load_model, save_checkpoint
from ocrnet.errors import InputError
from ocrnet.models import build_model, load_weights


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


class Exploit:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("load", [load_checkpoint, lambda path: load_weights(build_model("hr18s"), path)])
def test_code_in_a_file_is_not_run(load, tmp_path, capsys):
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Exploit()))
    torch.save({"model": Exploit(), "config": {}}, tmp_path / "worse.pt")
    for name in ("bad.pt", "worse.pt"):
        with pytest.raises(InputError, match=name):
            load(tmp_path / name)
    assert "this ran" not in capsys.readouterr().out


def test_a_checkpoint_gives_back_the_model_it_describes(tmp_path):
    model = build_model("hr18s", num_classes=4)
    save_checkpoint(tmp_path / "x.pt", {"model": model.state_dict(), "config": model.config})
    again = load_model(tmp_path / "x.pt")
    assert not again.training
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), again.state_dict().values()))


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
