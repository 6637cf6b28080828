"""Weights by name, from a local server in the place of the real ones: models/hub.py."""

import hashlib
import re
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from ocrnet import InputError
from ocrnet.models import BACKBONES, HRNet, build_model, hub, load_weights, weights
from ocrnet.models.hub import url_of


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
    torch.save(model.backbone.state_dict(), folder / "x.pth")
    digest = hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()[:8]
    (folder / "x.pth").rename(folder / f"small-{digest}.pth")
    monkeypatch.setitem(hub.IMAGENET, "hr18", f"small-{digest}")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as server:
        monkeypatch.setattr(hub, "PRETRAIN_URL", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder
        server.shutdown()
        thread.join()


def cached(tmp_path) -> list:
    return [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_weights_are_downloaded_once(server, model, tmp_path):
    assert not load_weights(model, "imagenet").ignored
    (file,) = server.iterdir()
    assert [path.name for path in cached(tmp_path)] == [file.name]
    file.unlink()
    assert not load_weights(model, "imagenet").ignored


def test_file_of_another_hash_is_refused_and_not_kept(server, model, tmp_path):
    (file,) = server.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"^{url_of('imagenet', 'hr18')}: invalid hash"):
        load_weights(model, "imagenet")
    assert not cached(tmp_path)


def test_without_an_answer_the_error_says_where_the_file_belongs(server, model, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (9, silent.getsockname()[1]):  # nobody listens at 9
            monkeypatch.setattr(hub, "PRETRAIN_URL", f"http://127.0.0.1:{port}")
            url = url_of("imagenet", "hr18")
            place = tmp_path / "home/hub/checkpoints" / url.rsplit("/", 1)[1]
            with pytest.raises(InputError, match=f"^{url}: not downloaded .*: put the file at {place}$"):
                load_weights(model, "imagenet")
    assert socket.getdefaulttimeout() is None


def test_urls_hold_a_hash_and_unknown_names_list_the_known():
    urls = [*map(url_of, hub.MODELS), *(url_of("imagenet", model) for model in hub.IMAGENET)]
    assert all(re.search(r"-[0-9a-f]{8}\.pth$", url) for url in urls) and len(set(urls)) == len(urls)
    assert url_of("hr48-160k") == (
        "https://download.openmmlab.com/mmsegmentation/v0.5/ocrnet/ocrnet_hr48_512x1024_160k_cityscapes/"
        "ocrnet_hr48_512x1024_160k_cityscapes_20200602_191037-dfbf1b0c.pth"
    )
    for name, model, named in (("hr18-20k", None, "hr18-40k"), ("imagenet", "hr18t", "hr18, .*hr18t")):
        with pytest.raises(InputError, match=f"^{name}: .*{named}"):
            url_of(name, model)


def test_path_is_no_name(model):
    for path in ("runs/hr18", "hr18.pt"):
        with pytest.raises(InputError, match=f"No such file.*{path}"):
            load_weights(model, path)
