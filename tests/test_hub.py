"""Weights by name, from a local server in the place of the real ones: models/hub.py."""

import hashlib
import re
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from names import as_mmsegmentation
from PIL import Image

from ocrnet import InputError
from ocrnet.models import build_model, hub, load_weights, weights
from ocrnet.models.hub import url_of


class Server(ThreadingHTTPServer):
    """Serves the files of a folder. ``requests`` are the paths that were asked for."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=folder))
        self.url, self.requests = f"http://127.0.0.1:{self.server_port}", []


class Handler(SimpleHTTPRequestHandler):
    def log_request(self, code="-", size="-"):
        self.server.requests.append(self.path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of the file of "hr18s-40k", an ADE20K model of two classes; torch's hub folder is empty."""
    torch.manual_seed(0)
    folder = tmp_path / "server"
    model = build_model("hr18s", num_classes=2)
    meta = {"CLASSES": ("floor", "ceiling"), "PALETTE": [[80, 50, 50], [120, 120, 80]]}
    (folder / "ocrnet/hr18s").mkdir(parents=True)
    torch.save({"meta": meta, "state_dict": as_mmsegmentation(model)}, folder / "x.pth")
    digest = hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()[:8]
    (folder / "x.pth").rename(folder / f"ocrnet/hr18s/hr18s_2020-{digest}.pth")
    monkeypatch.setitem(hub.MODELS, "hr18s-40k", ("ocrnet/hr18s", f"2020-{digest}", 0.0))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with Server(folder) as server:
        monkeypatch.setattr(hub, "MMSEGMENTATION_URL", server.url)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def cached(tmp_path) -> list:
    return [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_a_name_downloads_once_and_colors_an_image_without_a_data_set(server, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48), "gray").save("street.png")
    for _ in range(2):
        main("evaluate.py", "--ckpt", "hr18s-40k", "--images", "street.png", "--save", "out", "--device", "cpu")
    assert len(server.requests) == 1
    assert [path.name for path in cached(tmp_path)] == [server.requests[0].rsplit("/", 1)[1]]
    colors = np.asarray(Image.open("out/street.png")).reshape(-1, 3).tolist()
    assert set(map(tuple, colors)) <= {(80, 50, 50), (120, 120, 80)}


def test_a_file_of_other_content_is_refused(server, tmp_path):
    for path in (tmp_path / "server").rglob("*.pth"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"^{url_of('hr18s-40k', '')}: .*hash"):
        load_weights(build_model("hr18s"), "hr18s-40k")
    assert not cached(tmp_path)


def test_without_a_network_the_error_says_where_the_file_belongs(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "MMSEGMENTATION_URL", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(InputError, match=f"^{url_of('hr18s-40k', '')}: .*{tmp_path / 'home/hub/checkpoints'}$"):
        load_weights(build_model("hr18s"), "hr18s-40k")


def test_a_server_that_never_answers_is_given_up(server, monkeypatch):
    monkeypatch.setattr(weights, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(hub, "MMSEGMENTATION_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(InputError, match="timed out"):
            load_weights(build_model("hr18s"), "hr18s-40k")
    assert socket.getdefaulttimeout() is None


def test_names_and_the_backbone_of_imagenet():
    urls = [*(url_of(name, "") for name in hub.MODELS), *(url_of("imagenet", model) for model in hub.IMAGENET)]
    assert all(re.search(r"-[0-9a-f]{8}\.pth$", url) for url in urls) and len(set(urls)) == len(urls)  # have a hash
    assert url_of("hr48-160k", "hr48") == (
        "https://download.openmmlab.com/mmsegmentation/v0.5/ocrnet/ocrnet_hr48_512x1024_160k_cityscapes/"
        "ocrnet_hr48_512x1024_160k_cityscapes_20200602_191037-dfbf1b0c.pth"
    )
    assert url_of("imagenet", "hr18").endswith("/pretrain/third_party/hrnetv2_w18-00eb2006.pth")
    for name, model, named in (("hr18-20k", "", "hr18-40k"), ("imagenet", "hr18t", "hr18t"), ("imagenet", "", "none")):
        with pytest.raises(InputError, match=f"^{name}: .*{named}"):
            url_of(name, model)


@pytest.mark.parametrize("path", ["runs/hr18", "hr18.pt"])
def test_a_path_that_is_missing_is_no_name(path):
    with pytest.raises(InputError, match=f"^{path}: no such file$"):
        load_weights(build_model("hr18s"), path)
