"""Where public weights are, by name. The names of files end in digits of their sha256, which ``torch.hub`` checks."""

from .. import InputError

MMSEGMENTATION_URL = "https://download.openmmlab.com/mmsegmentation/v0.5"
# mmsegmentation's models: (folder, date and hash, published mIoU in %). 40k to 160k are iterations on Cityscapes.
MODELS = {
    "hr18s-40k": ("ocrnet/ocrnet_hr18s_4xb2-40k_cityscapes-512x1024", "20230227_145026-6c052a14", 76.61),
    "hr18-40k": ("ocrnet/ocrnet_hr18_512x1024_40k_cityscapes", "20200601_033320-401c5bdd", 77.72),
    "hr48-40k": ("ocrnet/ocrnet_hr48_512x1024_40k_cityscapes", "20200601_033336-55b32491", 80.58),
    "hr18s-80k": ("ocrnet/ocrnet_hr18s_512x1024_80k_cityscapes", "20200601_222735-55979e63", 77.16),
    "hr18-80k": ("ocrnet/ocrnet_hr18_512x1024_80k_cityscapes", "20200614_230521-c2e1dd4a", 78.57),
    "hr48-80k": ("ocrnet/ocrnet_hr48_512x1024_80k_cityscapes", "20200601_222752-9076bcdf", 80.70),
    "hr18s-160k": ("ocrnet/ocrnet_hr18s_512x1024_160k_cityscapes", "20200602_191005-f4a7af28", 78.45),
    "hr18-160k": ("ocrnet/ocrnet_hr18_512x1024_160k_cityscapes", "20200602_191001-b9172d0c", 79.47),
    "hr48-160k": ("ocrnet/ocrnet_hr48_512x1024_160k_cityscapes", "20200602_191037-dfbf1b0c", 81.35),
    "r101-40k": ("ocrnet/ocrnet_r101-d8_512x1024_40k_b8_cityscapes", "20200717_110721-02ac0f13", 80.09),
    "r101-40k-b16": ("ocrnet/ocrnet_r101-d8_512x1024_40k_b16_cityscapes", "20200723_193726-db500f80", 80.30),
    "r101-80k-b16": ("ocrnet/ocrnet_r101-d8_512x1024_80k_b16_cityscapes", "20200723_192421-78688424", 80.81),
    "hr18s-ade20k": ("ocrnet/ocrnet_hr18s_512x512_160k_ade20k", "20200615_184505-8e913058", 37.19),
    "hr18-ade20k": ("ocrnet/ocrnet_hr18_512x512_160k_ade20k", "20200615_200940-d8fcd9d1", 39.32),
    "hr48-ade20k": ("ocrnet/ocrnet_hr48_512x512_160k_ade20k", "20200615_184705-a073726d", 43.25),
    "hr18s-voc": ("ocrnet/ocrnet_hr18s_512x512_40k_voc12aug", "20200614_002025-42b587ac", 72.76),
    "hr18-voc": ("ocrnet/ocrnet_hr18_512x512_40k_voc12aug", "20200614_015958-714302be", 74.98),
    "hr48-voc": ("ocrnet/ocrnet_hr48_512x512_40k_voc12aug", "20200614_015958-255bc5ce", 77.14),
    "hr18s-fcn-40k": ("hrnet/fcn_hr18s_512x1024_40k_cityscapes", "20200601_014216-93db27d0", 73.86),
    "hr18-fcn-40k": ("hrnet/fcn_hr18_512x1024_40k_cityscapes", "20200601_014216-f196fb4e", 77.19),
    "hr48-fcn-40k": ("hrnet/fcn_hr48_512x1024_40k_cityscapes", "20200601_014240-a989b146", 78.48),
    "hr18s-fcn-80k": ("hrnet/fcn_hr18s_512x1024_80k_cityscapes", "20200601_202700-1462b75d", 75.31),
    "hr18-fcn-80k": ("hrnet/fcn_hr18_512x1024_80k_cityscapes", "20200601_223255-4e7b345e", 78.65),
    "hr48-fcn-80k": ("hrnet/fcn_hr48_512x1024_80k_cityscapes", "20200601_202606-58ea95d6", 79.93),
    "hr18s-fcn-160k": ("hrnet/fcn_hr18s_512x1024_160k_cityscapes", "20200602_190901-4a0797ea", 76.31),
    "hr18-fcn-160k": ("hrnet/fcn_hr18_512x1024_160k_cityscapes", "20200602_190822-221e4a4f", 78.80),
    "hr48-fcn-160k": ("hrnet/fcn_hr48_512x1024_160k_cityscapes", "20200602_190946-59b7973e", 80.65),
}
# For --weights imagenet, by --model. ResNets have the deep stem of mmsegmentation's recipe.
PRETRAIN_URL = "https://download.openmmlab.com/pretrain/third_party"
IMAGENET = {
    "hr18s": "hrnetv2_w18_small-b5a04e21",
    "hr18": "hrnetv2_w18-00eb2006",
    "hr32": "hrnetv2_w32-dc9eeb4f",
    "hr48": "hrnetv2_w48-d2186c55",
    "r50": "resnet50_v1c-2cccc1ad",
    "r101": "resnet101_v1c-e67eebb6",
}


def url_of(name: str, model: str | None = None) -> str:
    """The URL of weights with a name: a key of ``MODELS``, or "imagenet" for the backbone ``model``.

    Raises:
        InputError: there are none of that name.
    """
    if name in MODELS:
        folder, version, _ = MODELS[name]
        return f"{MMSEGMENTATION_URL}/{folder}/{folder.split('/')[1]}_{version}.pth"
    if name == "imagenet" and model in IMAGENET:
        return f"{PRETRAIN_URL}/{IMAGENET[model]}.pth"
    if name == "imagenet":
        raise InputError(f"imagenet: expected --model {', '.join(IMAGENET)}, found {model or 'no model'}")
    raise InputError(f"{name}: no such file, and no weights of that name: expected imagenet, {', '.join(MODELS)}")
