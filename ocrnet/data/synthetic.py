"""Generated street scenes in Cityscapes' layout: data to train on where there is no data set.

A scene is painted piece by piece, from far to near, through a pinhole camera. Image and label get the same flat pieces,
so the labels are exact. Color does not determine the class: road, sidewalk, building, wall and fence share their grays,
and vehicles, signs and clothes share their paints. Shape, texture, position and context do. All buildings of one street
have about one color, as have its walls, its trees and so on, under a light of its own: what a class looks like in
*this* image says more than its color in all images.

World: X to the right, Y up from the ground, Z away from the camera, in meters. Notation: H W the image's size.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm.contrib.concurrent import process_map

from .. import InputError
from .classes import CITYSCAPES

SIZE = (128, 256)  # H, W of an image
SPLITS = {"train": 480, "val": 60}  # images
SUPERSAMPLING = 2  # images are painted at twice their size and reduced
NEAR = 1.5  # meters; nothing closer is drawn
IDS = {label.name: label.id for label in CITYSCAPES.labels}
IMAGE = "leftImg8bit/{0}/synth{0}/synth{0}_{1:06d}_000000_leftImg8bit.png"  # of a split and an index
LABEL = "gtFine/{0}/synth{0}/synth{0}_{1:06d}_000000_gtFine_labelIds.png"


# ---- the painter -----------------------------------------------------------------------------------------------------


def gray(rng: np.random.Generator) -> np.ndarray:
    """One of the grays that road, sidewalk, building, wall and fence share."""
    return rng.uniform(80, 165) + rng.uniform(-12, 12, 3)


def green(rng: np.random.Generator) -> np.ndarray:
    """One of the greens and browns that vegetation and terrain share."""
    return rng.uniform((60, 80, 35), (125, 135, 75))


def vivid(rng: np.random.Generator) -> np.ndarray:
    """One of the paints that vehicles, signs and clothes share: red, blue, yellow, white, black, gray or green."""
    paints = (190, 40, 40), (40, 70, 170), (210, 180, 50), (225, 225, 225), (45, 45, 50), (120, 125, 130), (50, 120, 70)
    return rng.choice(paints) + rng.uniform(-20, 20, 3)


def within(x: np.ndarray, period: float, start: float, stop: float) -> np.ndarray:
    """Where x, modulo ``period``, lies between two fractions of it."""
    phase = (x / period) % 1
    return (phase >= start) & (phase < stop)


# Two coordinates in meters -> where the pattern is; brightness factors there and elsewhere.
TEXTURES = {
    "plain": (lambda a, b: np.zeros_like(a, bool), 1, 1),
    "tiles": (lambda a, b: within(a, 0.9, 0, 0.1) | within(b, 0.9, 0, 0.1), 0.72, 1.06),
    "windows": (lambda a, b: within(a, 2.4, 0.25, 0.75) & within(b, 3.0, 0.35, 0.85), 0.5, 1.05),
    "bricks": (lambda a, b: within(b, 0.35, 0, 0.2) | within(a + 0.4 * np.floor(b / 0.35), 0.8, 0, 0.12), 0.7, 1.05),
    "bars": (lambda a, b: within(a, 0.5, 0, 0.4) | within(b, 0.7, 0, 0.2), 1.2, 0.5),
    "sleepers": (lambda a, b: within(b, 0.8, 0, 0.4), 0.7, 1.1),
    "panes": (lambda a, b: (b > 1.5) & (b < 2.4) & within(a, 1.2, 0.12, 0.9), 0.35, 1),
    "planks": (lambda a, b: within(a, 0.45, 0, 0.15), 0.82, 1),
    "spokes": (lambda a, b: within(a + b, 0.22, 0, 0.45), 0.35, 1.1),
}


class Scene:
    """An image and its label being painted, and the camera, light and materials of their street."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.rng = rng
        height, width = size
        self.focal = width * rng.uniform(0.75, 1.0)  # pixels, as center and horizon
        self.eye = rng.uniform(1.3, 2.0)  # the camera's height above the ground, meters
        self.center = width * rng.uniform(0.4, 0.6)
        self.horizon = height * rng.uniform(0.36, 0.5)
        self.haze = rng.uniform(0.002, 0.008)  # per meter
        self.sky = rng.choice([(150, 185, 225), (200, 205, 210), (225, 205, 185)]) * rng.uniform(0.7, 1.0)
        self.sun = rng.choice([-1, 1])  # the side of the street that is lit
        self.materials = {kind: gray(rng) for kind in ("building", "wall", "fence", "pole")}
        self.materials |= {kind: green(rng) for kind in ("tree", "hedge", "terrain")}
        y, x = (np.mgrid[: SUPERSAMPLING * height, : SUPERSAMPLING * width] + 0.5) / SUPERSAMPLING
        # of the ray through each pixel, per meter of depth
        self.right, self.down = (x - self.center) / self.focal, (y - self.horizon) / self.focal
        self.label = Image.new("L", (width, height), IDS["unlabeled"])
        self.image = np.zeros((*x.shape, 3), np.float32)
        self.cloud = np.zeros(x.shape, np.float32)  # soft patches of three sizes, about -1 .. 1
        for cells in (4, 10, 28):
            patches = Image.fromarray(rng.uniform(-1, 1, (cells, 2 * cells)).astype(np.float32))
            self.cloud += np.asarray(patches.resize(x.shape[::-1], Image.Resampling.BICUBIC)) * 0.6
        self.grain = rng.standard_normal(x.shape).astype(np.float32)

    def material(self, kind: str) -> np.ndarray:
        """The color of a class in this street, with a little variation."""
        return self.materials[kind] * self.rng.uniform(0.93, 1.07)

    def paint(self, label, points, color, texture="plain", roughness=0.04, patches=0.08) -> None:
        """Paint one flat piece: facing the camera, along the street or on the ground, as its corners (x, y, z) say.

        ``label`` is a name of Cityscapes, or None for a detail, whose pixels keep the label below. ``roughness`` and
        ``patches`` scale the fine and the coarse noise.
        """
        x, y, z = np.array(points, float).T
        polygon = np.stack([self.center + self.focal * x / z, self.horizon + self.focal * (self.eye - y) / z], 1)
        polygon = polygon.round().astype(int)  # whole pixels
        if label:
            ImageDraw.Draw(self.label).polygon(polygon.ravel().tolist(), fill=IDS[label])
        start = SUPERSAMPLING * polygon.min(0).clip(0)
        stop = SUPERSAMPLING * (polygon.max(0) + 1).clip(max=self.label.size)
        if (start >= stop).any():  # outside the image
            return
        mask = Image.new("1", tuple(stop - start))  # not of the whole image: PIL would round edges differently
        ImageDraw.Draw(mask).polygon((SUPERSAMPLING * (polygon + 0.5) - start).ravel().tolist(), fill=1)
        inside, area = np.asarray(mask), (slice(start[1], stop[1]), slice(start[0], stop[0]))
        right, down, grain, cloud = (field[area][inside] for field in (self.right, self.down, self.grain, self.cloud))
        # depth of each pixel, and its coordinates a, b in the plane of the piece, in meters
        if np.ptp(z) < 1e-6:  # faces the camera
            depth = np.full_like(right, z[0])
            a, b = right * depth - x.min(), self.eye - down * depth
        elif np.ptp(x) < 1e-6:  # along the street
            depth = np.clip(x[0] / np.where(abs(right) < 1e-3, 1e-3, right), NEAR, 200)
            a, b = depth, self.eye - down * depth
        else:  # the ground
            depth = np.clip(self.eye / np.maximum(down, 1e-3), NEAR, 200)
            a, b = right * depth, depth
        pattern, there, elsewhere = TEXTURES[texture]
        shade = np.where(pattern(a, b), there, elsewhere) + roughness * grain + patches * cloud
        fog = np.exp(-self.haze * depth)[:, None]
        self.image[area][inside] = fog * shade[:, None] * color + (1 - fog) * self.sky

    def rectangle(self, label, corner, size, *look, **noise) -> None:
        """Paint a rectangle from its ``corner`` (x, y, z) on. One of its sizes (dx, dy, dz) is 0."""
        dx, dy, dz = size
        u, v = np.array([(dx, 0, 0) if dx else (0, 0, dz), (0, dy, 0) if dy else (0, 0, dz)])
        self.paint(label, [corner, corner + u, corner + u + v, corner + v], *look, **noise)

    def figure(self, x, z, pieces, direction=1) -> None:
        """Paint what faces the camera at (x, 0, z): pieces (label, outline, color, ...) as for ``paint``.

        An outline has meters to the right (direction -1: to the left) and up.
        """
        for label, outline, *look in pieces:
            self.paint(label, [(x + direction * u, v, z) for u, v in outline], *look)


# ---- objects of a street ---------------------------------------------------------------------------------------------


def box(u: float, v: float, width: float, height: float) -> list[tuple[float, float]]:
    return [(u, v), (u + width, v), (u + width, v + height), (u, v + height)]


def disc(u: float, v: float, radius: float | np.ndarray, corners: int = 10) -> np.ndarray:
    angles = np.arange(corners) * 2 * np.pi / corners
    return np.stack([u + radius * np.cos(angles), v + radius * np.sin(angles)], 1)


LEGS = [(-0.22, 0), (-0.05, 0), (0, 0.5), (0.05, 0), (0.22, 0), (0.2, 0.9), (-0.2, 0.9)]
TORSO = [(-0.2, 0.8), (0.2, 0.8), (0.32, 0.85), (0.28, 1.45), (0.1, 1.52), (-0.1, 1.52), (-0.28, 1.45), (-0.32, 0.85)]
PERSON = [*LEGS[:5], *TORSO[1:5], *disc(0, 1.65, 0.15, 6)[:4], *TORSO[5:]]
RIDER = [(-0.3, 0.75), (0.25, 0.7), (0.35, 1.25), (0.2, 1.55), (-0.1, 1.55), (-0.3, 1.3)]
RIDERS_LEG = [(-0.15, 0.3), (0.1, 0.3), (0.25, 0.8), (-0.2, 0.85)]
BICYCLE = [(-0.55, 0.3), (0.55, 0.3), (0.5, 0.95), (-0.3, 0.85)]
MOTORCYCLE = [(-0.8, 0.4), (0.8, 0.4), (0.65, 1.1), (0.3, 0.9), (-0.75, 0.95)]
CABIN = [(0.15, 0.85), (1.65, 0.85), (1.45, 1.5), (0.35, 1.5)]  # of a car
GLASS = [(0.3, 0.9), (1.5, 0.9), (1.38, 1.42), (0.42, 1.42)]
LEAVES = ("plain", 0.2, 0.2)  # texture, roughness, patches
VEHICLES = {  # width, height (a car's without its cabin) and length in meters; texture
    "car": (1.8, 0.85, 4.0, "plain"),
    "truck": (2.5, 3.3, 7.5, "planks"),
    "bus": (2.5, 3.0, 11.0, "panes"),
    "train": (2.8, 3.7, 30.0, "panes"),
}
FACADES = {  # least and greatest height in meters; texture and noise
    "building": (6, 16, "windows"),
    "wall": (2.0, 3.6, "bricks"),
    "fence": (1.6, 2.6, "bars"),
    "hedge": (1.5, 5, *LEAVES),
}


def person(scene: Scene, x: float, z: float) -> None:
    clothes, trousers = vivid(scene.rng), vivid(scene.rng) * 0.7
    head = disc(0, 1.65, 0.15, 8)
    scene.figure(x, z, [("person", PERSON, clothes), (None, LEGS, trousers), (None, head, (190, 150, 125))])


def two_wheeler(scene: Scene, x: float, z: float, label: str, ridden: bool) -> None:
    """A bicycle or motorcycle seen from the side, with its rider or parked."""
    direction, color = -1 if scene.rng.random() < 0.5 else 1, vivid(scene.rng)
    if label == "bicycle":
        pieces = [(label, disc(u, 0.36, 0.36), color * 0.6, "spokes") for u in (-0.55, 0.55)]
        pieces += [(label, BICYCLE, color, "spokes")]
    else:
        wheels = [(label, disc(u, 0.33, 0.33), (35, 35, 38)) for u in (-0.6, 0.6)]
        pieces = [(label, MOTORCYCLE, color), *wheels]
    if ridden:
        body = [("rider", RIDER, vivid(scene.rng)), ("rider", disc(0.1, 1.75, 0.17, 8), (185, 145, 120))]
        pieces = [*body, *pieces, ("rider", RIDERS_LEG, vivid(scene.rng) * 0.6)]
    scene.figure(x, z, pieces, direction)


def vehicle(scene: Scene, label: str, x: float, z: float) -> None:
    """A box on wheels: its shadow, the side toward the middle of the street, its front."""
    color = vivid(scene.rng)
    width, height, length, texture = VEHICLES[label]
    near = x if x > 0 else x + width
    scene.rectangle(None, (x - 0.2, 0, z - 0.2), (width + 0.4, 0, length + 0.2), (35, 35, 35), roughness=0.02)
    scene.rectangle(label, (near, 0.25, z), (0, height - 0.25, length), color * 0.75, texture)
    front = [(label, box(0, 0.25, width, height - 0.25), color)]
    if label == "car":  # the cabin, set back on every side
        scene.rectangle(label, (near, height, z + 0.7), (0, 0.65, length - 1.5), color * 0.3)
        scene.figure(x, z + 0.5, [(label, CABIN, color * 0.9), (None, GLASS, (60, 70, 80))])
    else:  # a windscreen; the truck's cab is lower than its box
        top = 0.72 if label == "truck" else 0.92
        front += [(None, box(0.15, 0.45 * height, width - 0.3, (top - 0.45) * height), (55, 65, 75))]
    for u in (0.05, width - 0.45):
        light = (230, 60, 50) if scene.rng.random() < 0.5 else (235, 235, 235)
        front += [(label, box(u, 0, 0.4, 0.35), (30, 30, 30)), (None, box(u, 0.55, 0.35, 0.2), light)]  # wheel, light
    if label == "car":
        front += [(None, box(0.6, 0.35, 0.6, 0.2), (220, 220, 220))]  # license plate
    scene.figure(x, z, front)


def tree(scene: Scene, x: float, z: float) -> None:
    color, height = scene.material("tree") * 0.9, scene.rng.uniform(4, 8)
    crown = disc(0, 0.68 * height, scene.rng.uniform(0.75, 1.15, 14) * 0.3 * height, 14)  # a radius for each corner
    trunk = box(-0.2, 0, 0.4, 0.5 * height)
    scene.figure(x, z, [("vegetation", trunk, (80, 65, 50)), ("vegetation", crown, color, *LEAVES)])


def pole(scene: Scene, x: float, z: float, carries: str) -> None:
    """A pole with a traffic light, a traffic sign or a lamp on it."""
    height = scene.rng.uniform(2.8, 4.5)
    pieces = [("pole", box(-0.13, 0, 0.26, height), scene.material("pole") * 0.8)]
    if carries == "traffic light":
        pieces += [(carries, box(-0.25, height - 1.1, 0.5, 1.2), (40, 40, 40))]
        lit = scene.rng.integers(3)
        for i, color in enumerate([(60, 200, 110), (230, 180, 50), (220, 50, 40)]):
            pieces += [(None, disc(0, height - 0.88 + 0.37 * i, 0.15, 8), np.array(color) * (1 if i == lit else 0.3))]
    elif carries == "traffic sign":
        corners = scene.rng.choice([3, 4, 12])
        pieces += [(carries, disc(0, height - 0.4, 0.7, corners), vivid(scene.rng))]
        pieces += [(None, disc(0, height - 0.4, 0.42, corners), (225, 225, 225))]
    else:
        pieces += [("pole", box(-0.1, height, 0.9 if x < 0 else -0.7, 0.15), scene.material("pole") * 0.8)]
    scene.figure(x, z, pieces)


def facades(scene: Scene, x: float) -> None:
    """What lines the street at X = x: stretches of building, wall, fence, hedge or nothing."""
    z, stretches = scene.rng.uniform(2.5, 6), []
    while z < 70:
        length = scene.rng.uniform(6, 16)
        stretches.append((scene.rng.choice([*FACADES, "none"], p=[0.36, 0.2, 0.2, 0.14, 0.1]), z, length))
        z += length
    light = 1.0 if x * scene.sun > 0 else 0.7
    for kind, z, length in reversed(stretches):
        if kind == "none":
            continue
        low, high, *look = FACADES[kind]
        height, color = scene.rng.uniform(low, high), scene.material(kind)
        if kind == "building":  # its end wall is lit when its front is not
            scene.rectangle(kind, (x if x > 0 else x - 10, 0, z), (10, height, 0), color * (1.7 - light), *look)
        label = "vegetation" if kind == "hedge" else kind
        scene.rectangle(label, (x, 0, z), (0, height, length), color * light, *look)


def street(rng: np.random.Generator, size: tuple[int, int] = SIZE) -> tuple[Image.Image, Image.Image]:
    """One scene: an RGB image, and its label of Cityscapes' label ids (mode L)."""
    scene = Scene(rng, size)
    half = rng.uniform(3.5, 6.0)  # of the road's width
    walk = rng.uniform(1.8, 3.2)  # width of a sidewalk
    verge = rng.uniform(1.2, 3.0)  # from there to what lines the street
    edge = half + walk

    scene.rectangle("sky", (-400, -5, 199), (800, 400, 0), scene.sky * 1.1, patches=0.12)
    for x in range(-160, 160, 20):  # what closes the view
        kind = rng.choice(["building", "vegetation", "none"])
        if kind != "none":
            color = gray(rng) if kind == "building" else green(rng)
            scene.rectangle(kind, (x, 0, 100), (24, rng.uniform(6, 20), 0), color, roughness=0.1)

    ground, far = gray(rng), 150 - NEAR
    grass = scene.material("terrain") * 1.1
    scene.rectangle("terrain", (-300, 0, NEAR), (600, 0, far), grass, roughness=0.12, patches=0.15)
    scene.rectangle("road", (-half, 0, NEAR), (2 * half, 0, far), ground, roughness=0.07)
    for x in (-edge, half):
        scene.rectangle("sidewalk", (x, 0, NEAR), (walk, 0, far), ground * rng.uniform(0.85, 1.2), "tiles")
    dash = rng.uniform(2, 4)
    for z in np.arange(rng.uniform(2, 5), 60, 2 * dash):  # lane markings are road
        scene.rectangle(None, (-0.09, 0, z), (0.18, 0, dash), (205, 205, 205))

    rails = rng.random() < 0.4 and rng.choice([-1, 1])  # a side with a train, or none
    for side in (-1, 1):
        facades(scene, side * (edge + verge + (3.5 if rails == side else 0)))
    if rails:
        x, z = rails * (edge + 1.8) - 1.4, rng.uniform(7, 25)
        scene.rectangle("rail track", (x - 0.3, 0, NEAR), (3.4, 0, far), (110, 100, 95), "sleepers")
        vehicle(scene, "train", x, z)

    things = []  # (depth, side of the street, how to paint it)

    def put(count, near, far, paint):
        things.extend((rng.uniform(near, far), rng.choice([-1, 1]), paint) for _ in range(count))

    on_walk = partial(rng.uniform, half + 0.4, edge - 0.2)
    on_road = partial(rng.uniform, 0.8, half - 0.8)
    put(rng.integers(1, 4), 7, 30, lambda z, s: tree(scene, s * (edge + rng.uniform(0.3, verge - 0.4)), z))
    put(rng.integers(2, 5), 5, 20, lambda z, s: pole(scene, s * (half + 0.3), z, rng.choice(["lamp", "traffic sign"])))
    put(rng.integers(1, 4), 5, 16, lambda z, s: pole(scene, s * (half + 0.3), z, "traffic light"))
    put(rng.integers(2, 6), 4, 15, lambda z, s: person(scene, s * on_walk(), z))
    put(rng.integers(1, 4), 7, 40, lambda z, s: vehicle(scene, "car", s * half - (2.0 if s > 0 else -0.2), z))
    put(rng.integers(0, 3), 9, 30, lambda z, s: vehicle(scene, "car", s * half / 2 - 0.9, z))
    put(rng.random() < 0.4, 9, 22, lambda z, s: vehicle(scene, "truck", s * (half / 2 + 0.4) - 1.25, z))
    put(rng.random() < 0.4, 9, 22, lambda z, s: vehicle(scene, "bus", s * (half / 2 + 0.4) - 1.25, z))
    put(rng.integers(0, 3), 5, 14, lambda z, s: two_wheeler(scene, s * on_road(), z, "bicycle", True))
    put(rng.integers(0, 2), 5, 14, lambda z, s: two_wheeler(scene, s * on_road(), z, "motorcycle", True))
    put(rng.integers(0, 3), 5, 14, lambda z, s: two_wheeler(scene, s * on_walk(), z, "bicycle", False))
    put(rng.integers(0, 2), 5, 14, lambda z, s: two_wheeler(scene, s * on_walk(), z, "motorcycle", False))
    for z, side, paint in sorted(things, key=lambda thing: -thing[0]):
        paint(z, side)

    if rng.random() < 0.3:
        person(scene, rng.uniform(-half, half), rng.uniform(25, 40))
        gray(rng)  # drawn and not used: the scenes stay those that published figures were measured on
    height, width = size
    bonnet = rng.uniform(0.02, 0.08) * height  # of the car that carries the camera, in pixels
    pixels = [(0.1, 0.0), (0.9, 0.0), (0.75, bonnet), (0.25, bonnet)]
    xy = [(x * width - scene.center, scene.horizon - (height - y)) for x, y in pixels]
    outline = [(x * NEAR / scene.focal, scene.eye + y * NEAR / scene.focal) for x, y in xy]
    scene.figure(0, NEAR, [("ego vehicle", outline, vivid(rng) * 0.5)])

    gain = rng.uniform(0.6, 1.2) * rng.uniform(0.8, 1.2, 3)  # light and tint; the grain is the camera's noise
    image = (scene.image * gain + 3 * scene.grain[..., None]).clip(0, 255).astype(np.uint8)
    return Image.fromarray(image).reduce(SUPERSAMPLING), scene.label


# ---- writing a data set ----------------------------------------------------------------------------------------------


def write_scene(root: Path, split: str, index: int) -> None:
    """Write image and label of one scene, which depends only on split and index."""
    images = street(np.random.default_rng([0, sorted(SPLITS).index(split), index]))
    for image, name in zip(images, (IMAGE, LABEL)):
        path = root / name.format(split, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def write_dataset(root: Path, splits: dict[str, int] = SPLITS) -> None:
    """Write ``splits`` (name -> scenes) in Cityscapes' layout as ``root``, whole or not at all, unless they are there.

    Raises:
        InputError: ``root`` exists and is something else.
    """
    if root.exists():
        if all((root / IMAGE.format(split, 0)).exists() for split in splits):
            return
        raise InputError(f"{root}: expected generated data or no such folder, found other files: choose another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{root.name}.part", dir=root.parent) as part:
        whole = Path(part, root.name)
        scenes = [(split, index) for split, count in splits.items() for index in range(count)]
        process_map(partial(write_scene, whole), *zip(*scenes), desc="drawing streets", disable=None)
        whole.rename(root)
