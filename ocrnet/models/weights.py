"""Loading weights: a file or a name in, tensors under our names out.

Accepted: checkpoints of this project; mmsegmentation's OCRNet and HRNet + FCN; the authors' HRNet-OCR,
https://github.com/HRNet/HRNet-Semantic-Segmentation; and for the backbone ImageNet HRNets, torchvision's ResNets and
mmsegmentation's ResNetV1c. Our backbones have the authors' and torchvision's names.
"""

import re
import socket
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import InputError
from .hub import url_of
from .ocrnet import BACKBONES, OCRNet, build_model

# Other projects' names -> ours: patterns and replacements. Every name passes through all of them, from top to bottom:
# decode_head.1.bottleneck.conv.weight -> decode_head.1.bottleneck.0.weight -> head.pixel_head.0.weight.
# decode_head is mmsegmentation's: .0 the region head, .1 the rest of the OCR head, without a number the FCN head.
RENAMES = {
    r"^((module|_orig_mod|model)\.)+": "",  # of DDP, torch.compile and wrappers
    r"^(decode_head\..*)\.conv\.": r"\1.0.",  # ConvModule(conv, bn) is our Sequential(0, 1)
    r"^(decode_head\..*)\.bn\.": r"\1.1.",
    r"^(ocr_distri_head\..*\.[13])\.0\.": r"\1.",  # the authors' Sequential(conv, Sequential(bn, relu), conv, ...)
    r"\.(f_pixel|f_object)\.([01])\.": r".\1.0.\2.",
    r"\.(f_pixel|f_object)\.2\.": r".\1.1.0.",
    r"\.(f_pixel|f_object)\.3\.": r".\1.1.1.",
    r"^aux_head\.([01])\.": r"head.region_head.0.\1.",
    r"^decode_head\.0\.convs\.0\.": "head.region_head.0.",
    r"^(decode_head\.0\.conv_seg|aux_head\.3)\.": "head.region_head.2.",
    r"^(decode_head\.1\.bottleneck|conv3x3_ocr)\.": "head.pixel_head.",
    r"^(decode_head\.1\.object_context_block\.bottleneck|ocr_distri_head\.conv_bn_dropout)\.": "head.g.",
    r"^(decode_head\.1|ocr_distri_head)\.object_context_block\.": "head.attention.",
    r"\.(query_project|f_pixel)\.": ".phi.",
    r"\.(key_project|f_object)\.": ".psi.",
    r"\.(value_project|f_down)\.": ".delta.",
    r"\.(out_project|f_up)\.": ".rho.",
    r"^decode_head\.convs\.0\.": "head.hidden.",  # HRNet + FCN
    r"^(decode_head\.(1\.)?conv_seg|cls_head)\.": "head.classifier.1.",
    r"^(?!head\.|backbone\.)": "backbone.",  # the authors' HRNet and ImageNet's have no prefix
    r"^backbone\.stem\.7\.": "backbone.bn1.",  # ResNetV1c: the last BatchNorm of the deep stem
    r"^backbone\.stem\.": "backbone.conv1.",
}
# Keys under which a file may keep its tensors, also one inside another. The first found counts: averaged weights come
# first. mmengine's ema_state_dict is last, as the averaged ones are in the state_dict beside it.
ENTRIES = ("ema", "model_ema", "ema_model", "state_dict_ema", "model", "state_dict", "model_state_dict", "weights",
           "module", "ema_state_dict")  # fmt: skip
TIMEOUT = 30  # seconds that a server may be silent


class Report(NamedTuple):
    """What became of the tensors of a file, and of the model's."""

    entry: str  # of the file, from ENTRIES, "" for the file itself
    loaded: list[str]  # our names
    ignored: list[str]  # the file's names
    random: list[str]  # our names

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors loaded" + (f" from {self.entry!r}" if self.entry else "")
        for names, what in ((self.ignored, "of the file ignored"), (self.random, "of the model stay random")):
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            text += f"; {len(names)} {what}" + (f" ({some})" if names else "")
        return text


def read_file(source: Path | str, model: str | None = None) -> Any:
    """The contents of a torch.save file on the CPU, without running code from it.

    ``source`` is a path, or a name of hub.py, whose file ``torch.hub`` downloads once; "imagenet" is that of ``model``.

    Raises:
        InputError: there is no such file or name, it cannot be downloaded, or it does not load without running code.
    """
    path, url = Path(source), None
    if path.is_dir():
        raise InputError(f"{path}: expected a file, found a folder: the weights of a run are its best.pt")
    if not path.is_file() and not path.suffix and len(path.parts) == 1:
        url = url_of(str(source), model)
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        if url:
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # torch.load does not compare the checksums
            raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{url}: not downloaded ({error}): put the file at {path}" if url else str(error)) from None
    except Exception as error:  # damaged bytes raise many types
        if url and not path.exists():  # torch.hub keeps no file with another hash
            raise InputError(f"{url}: {error}") from None
        raise InputError(f"{path}: expected a file of torch.save, found {kind_of(path, error)}") from None
    finally:
        socket.setdefaulttimeout(before)


def kind_of(path: Path, error: Exception) -> str:
    """What a file holds that torch.load refused with ``error``."""
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        command = f"x = torch.load({str(path)!r}, weights_only=False); torch.save(x['state_dict'], 'weights.pth')"
        return f'one with code ({code[1]}); if you trust it, keep only its tensors: python -c "import torch; {command}"'
    with open(path, "rb") as file:
        start = file.read(24)
    if start.startswith((b"PK", b"\x80")):
        return f"a damaged or incomplete one of {path.stat().st_size:,} bytes"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: run git lfs pull"
    return f"{'an HTML page' if start.startswith(b'<') else 'another format'}: {start!r}" if start else "an empty file"


def find_tensors(state: Any, source: Path | str) -> tuple[str, dict[str, Tensor]]:
    """The named tensors in the contents of a file, and their entry: averaged weights where it has them beside others.

    Raises:
        InputError: there are none, or one is nan or infinite.
    """
    state, entry = state if isinstance(state, dict) else {}, ""
    for key in ENTRIES:
        if isinstance(state.get(key), dict):
            state, entry = state[key], entry or key
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    if not tensors:
        raise InputError(f"{source}: expected a dict of tensors, found {', '.join(map(str, state)) or 'none'}")
    check_finite(tensors, source)
    return entry, tensors


def check_finite(tensors: dict[str, Tensor], source: Path | str) -> None:
    """Raise InputError if a tensor has a value that is nan or infinite."""
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise InputError(f"{source}: {name}: expected finite values, found nan or infinity")


def rename(name: str) -> str:
    """Our name of a tensor of any of the projects."""
    for pattern, ours in RENAMES.items():
        name = re.sub(pattern, ours, name)
    return name


def backbone_of(tensors: dict[str, Tensor]) -> str | None:
    """The largest of ``BACKBONES`` all of whose parameters are among ``tensors`` (our names). None without."""
    found = {name: x.shape for name, x in tensors.items()}
    fits = [(0, None)]  # number of parameters, name
    for name, build in BACKBONES.items():
        with torch.device("meta"):
            parameters = build().named_parameters()
        # without the first convolution, which may be a deep stem
        shapes = {f"backbone.{key}": x.shape for key, x in parameters if not key.startswith("conv1.")}
        if shapes.items() <= found.items():
            fits.append((len(shapes), name))
    return max(fits)[1]


def load_weights(model: OCRNet, source: Path | str, state: Any = None) -> Report:
    """Load the tensors of a file, or of a name of hub.py, into the model. ``state`` are its contents if they are read.

    What belongs to the weights but is no tensor is set too: align_corners, the authors' dropout, ResNet's deep stem.
    Another head is left out, and so are tensors of the head that have another shape, as those of other classes have.

    Raises:
        InputError: the file has another backbone, or under 95 % of the model's; and as ``read_file``, ``find_tensors``.
    """
    state = read_file(source, model.config["name"]) if state is None else state
    entry, theirs = find_tensors(state, source)
    names = {rename(name): name for name in theirs}
    tensors = {name: theirs[old] for name, old in names.items()}
    for conv in ("head.region_head.0.", "head.pixel_head."):
        # the authors' biases before a BatchNorm: (Wx + b - mean) / std = (Wx - (mean - b)) / std
        if (bias := tensors.pop(f"{conv}0.bias", None)) is not None:
            tensors[f"{conv}1.running_mean"] = tensors[f"{conv}1.running_mean"] - bias
    if "backbone.conv1.6.weight" in tensors and hasattr(model.backbone, "use_deep_stem"):
        model.backbone.use_deep_stem()
        model.config["deep_stem"] = True

    own, name = model.state_dict(), model.config["name"]
    loaded = {key: x for key, x in tensors.items() if key in own and x.shape == own[key].shape}
    needed = [key for key in own if not key.endswith("num_batches_tracked")]
    backbone = [key for key in needed if key.startswith("backbone.")]
    missing = [key for key in backbone if key not in loaded]
    # a tensor of another shape, or blocks that the model does not have: another backbone
    modules = tuple(f"backbone.{key}." for key, _ in model.backbone.named_children())
    wrong = [key for key in tensors if key.startswith(modules) and key not in loaded]
    if wrong or len(missing) > 0.05 * len(backbone):
        found = f"{len(backbone) - len(missing)} of its {len(backbone)} tensors"
        fault = f"{wrong[0]} does not fit" if wrong else f"{missing[0]} is missing"
        other = backbone_of(tensors)
        remedy = f": --model {other} fits" if other not in (None, name) else ""
        raise InputError(f"{source}: expected the backbone {name}, found {found}, {fault}{remedy}")

    if ("head.hidden.0.weight" in tensors) != ("head.hidden.0.weight" in own):  # one FCNHead, one OCRHead
        loaded = {key: x for key, x in loaded.items() if not key.startswith("head.")}
    model.load_state_dict(loaded, strict=False)
    authors = any(old.endswith("cls_head.weight") for old in theirs)
    if authors or (isinstance(state.get("config"), dict) and state["config"].get("align_corners")):
        model.set_align_corners(True)
    if authors and model.config["dropout"] is None:
        model.config["dropout"] = model.head.classifier[0].p = 0.05  # as in the authors' model
    ignored = [old for key, old in names.items() if key in tensors and key not in loaded]
    return Report(entry, list(loaded), ignored, [key for key in needed if key not in loaded])


def build_from_weights(state: Any, source: Path | str) -> OCRNet:
    """The OCRNet that the contents of a file belong to, with those weights. Backbone and K follow from the shapes.

    Raises:
        InputError: the head's tensors are missing, or no backbone fits; and as ``load_weights``.
    """
    tensors = {rename(name): x for name, x in find_tensors(state, source)[1].items()}
    if (backbone := backbone_of(tensors)) is None:
        raise InputError(f"{source}: expected a backbone of {', '.join(BACKBONES)}, found another")
    if "head.classifier.1.weight" not in tensors:
        raise InputError(f"{source}: expected a whole OCRNet, found the backbone {backbone}: train with --weights")
    head = "fcn" if "head.hidden.0.weight" in tensors else "ocr"
    model = build_model(backbone, len(tensors["head.classifier.1.weight"]), head=head)
    if random := load_weights(model, source, state).random:
        raise InputError(f"{source}: expected all tensors of {backbone}, {len(random)} do not fit, {random[0]} first")
    return model
