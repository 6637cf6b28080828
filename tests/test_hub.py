"""Weights by name, from a local server in the place of the real ones: models/hub.py."""

import hashlib
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from ocrnet import InputError
from ocrnet.models import BACKBONES, HRNet, build_model, hub, load_weights, weights
from ocrnet.models.hub import url_of

CACHE = "home/hub/checkpoints"  # torch's, below tmp_path


@pytest.fixture
def model(monkeypatch):
    """A small model whose ImageNet weights have the name of hr18's. torch's hub folder is empty."""
    monkeypatch.setitem(BACKBONES, "hr18", partial(HRNet, width=4, num_modules=(1, 1, 1), num_blocks=1))
    return build_model("hr18", 3)


@pytest.fixture
def server(tmp_path, monkeypatch, model):
    """The folder of a local server, which holds that file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder = tmp_path / "server"
    folder.mkdir()
    serve(folder, model.backbone.state_dict(), monkeypatch)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as server:
        monkeypatch.setattr(hub, "PRETRAIN_URL", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder
        server.shutdown()
        thread.join()


def serve(folder, content, monkeypatch):
    torch.save(content, folder / "x.pth")
    digest = hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()[:8]
    (folder / "x.pth").rename(folder / f"small-{digest}.pth")
    monkeypatch.setitem(hub.IMAGENET, "hr18", f"small-{digest}")


def test_weights_are_downloaded_once(server, model, tmp_path):
    assert not load_weights(model, "imagenet").ignored
    (served,), (file,) = server.iterdir(), (tmp_path / CACHE).iterdir()
    assert file.name == served.name
    served.unlink()
    assert not load_weights(model, "imagenet").ignored
    file.write_bytes(file.read_bytes()[:-999])
    with pytest.raises(InputError, match=f"^{file}: "):
        load_weights(model, "imagenet")


def test_code_in_a_downloaded_file_is_not_run(server, model, monkeypatch):
    serve(server, {"config": print, "model": model.state_dict()}, monkeypatch)
    with pytest.raises(InputError, match="code .*print"):
        load_weights(model, "imagenet")


def test_file_of_another_hash_is_refused_and_not_kept(server, model, tmp_path):
    (file,) = server.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"^{url_of('imagenet', 'hr18')}: invalid hash"):
        load_weights(model, "imagenet")
    assert not any((tmp_path / CACHE).iterdir())


def test_without_an_answer_the_error_says_where_the_file_belongs(server, model, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (9, silent.getsockname()[1]):  # nobody listens at 9
            monkeypatch.setattr(hub, "PRETRAIN_URL", f"http://127.0.0.1:{port}")
            url = url_of("imagenet", "hr18")
            place = tmp_path / CACHE / url.rsplit("/", 1)[1]
            with pytest.raises(InputError, match=f"^{url}: not downloaded .*: put the file at {place}$"):
                load_weights(model, "imagenet")
    assert socket.getdefaulttimeout() is None


def test_names_stand_for_the_urls_and_scores_of_mmsegmentation_and_unknown_ones_list_the_known():
    lines = [f"{name} {url_of(name)} {score}" for name, (_, _, score) in hub.MODELS.items()]
    lines += [f"{name} {url_of('imagenet', name)}" for name in hub.IMAGENET]
    assert lines[8] == (
        "hr48-160k https://download.openmmlab.com/mmsegmentation/v0.5/ocrnet/ocrnet_hr48_512x1024_160k_cityscapes/"
        "ocrnet_hr48_512x1024_160k_cityscapes_20200602_191037-dfbf1b0c.pth 81.35"
    )
    assert hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest().startswith("8cdbca67f494a8d5")
    for name, model, named in (("hr18-20k", None, "hr18-40k"), ("imagenet", "hr18t", "hr18, .*hr18t")):
        with pytest.raises(InputError, match=f"^{name}: .*{named}"):
            url_of(name, model)


def test_path_is_no_name(model, tmp_path, monkeypatch):
    for path in ("runs/hr18", "hr18.pt"):
        with pytest.raises(InputError, match=f"^(?!.*download).*No such file.*{path}"):
            load_weights(model, path)
    monkeypatch.chdir(tmp_path)
    torch.save(model.state_dict(), "hr18-40k")  # a file, although there are weights of that name
    assert not load_weights(model, "hr18-40k").random
