"""Build mmsegmentation 1.2.2's OCRNet with mmcv-lite, which has no compiled operators.

    pip install mmsegmentation==1.2.2 mmengine==0.10.7 mmcv-lite==2.1.0 ftfy regex

make_reference.py and the benchmark use it. The tests do not.
"""

import importlib.util
import sys
import types
import warnings
from pathlib import Path

from torch import nn


class StubModule(types.ModuleType):
    """Stands in for mmcv.ops: every name is an empty module. OCRNet uses none of them."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


def load_config(model: str):
    """The mmengine Config of ocrnet_MODEL_4xb2-40k_cityscapes-512x1024, for hr18s, hr18, hr48 or r101."""
    warnings.filterwarnings("ignore")
    if importlib.util.find_spec("mmcv._ext") is None:
        sys.modules["mmcv.ops"] = StubModule("mmcv.ops")
    import mmseg.datasets
    import mmseg.models
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    init_default_scope("mmseg")
    variant = {"r101": "r101-d8"}.get(model, model)
    folder = Path(mmseg.__file__).parent / ".mim/configs/ocrnet"
    return Config.fromfile(str(folder / f"ocrnet_{variant}_4xb2-40k_cityscapes-512x1024.py"))


def build_peer(config, crop_size: tuple[int, int]) -> nn.Module:
    """The model of a config in training mode: random weights, and BatchNorm in place of SyncBatchNorm."""
    from mmseg.registry import MODELS

    config.model.pretrained = None
    config.model.data_preprocessor.size = tuple(crop_size)
    replace_sync_bn(config.model)
    return MODELS.build(config.model).train()


def replace_sync_bn(node: dict | list) -> None:
    """Set every norm_cfg in a nested config to BN, in place."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key == "norm_cfg" and value:
            value["type"] = "BN"
        elif isinstance(value, (dict, list)):
            replace_sync_bn(value)
