"""Generated street scenes in Cityscapes' layout: data to train on where there is no data set.

A scene is painted piece by piece, from far to near, through a pinhole camera. Image and label are painted from the same
flat pieces, so the labels are exact.

Color does not determine the class: road, sidewalk, building, wall and fence share their grays, and vehicles, signs and
clothes share their paints. Shape, texture, position and context do. All buildings of one street have about one color,
as have its walls, its trees and so on, under a light of its own: what a class looks like in *this* image says more than
its color in all images.

World: X to the right, Y up from the ground, Z away from the camera, in meters. Notation: H W the image's size.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
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

Point = tuple[float, float, float]


# ---- colors and textures ---------------------------------------------------------------------------------------------

# red, blue, yellow, white, black, gray, green
PAINTS = [(190, 40, 40), (40, 70, 170), (210, 180, 50), (225, 225, 225), (45, 45, 50), (120, 125, 130), (50, 120, 70)]


def gray(rng: np.random.Generator) -> np.ndarray:
    """One of the grays that road, sidewalk, building, wall and fence share."""
    return rng.uniform(80, 165) + rng.uniform(-12, 12, 3)


def green(rng: np.random.Generator) -> np.ndarray:
    """One of the greens and browns that vegetation and terrain share."""
    return np.array([rng.uniform(60, 125), rng.uniform(80, 135), rng.uniform(35, 75)])


def vivid(rng: np.random.Generator) -> np.ndarray:
    """One of the paints that vehicles, signs and clothes share."""
    return np.array(PAINTS[rng.integers(len(PAINTS))]) + rng.uniform(-20, 20, 3)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Soft patches of several sizes, about -1 .. 1, (H, W)."""
    total = np.zeros(shape, np.float32)
    for cells in (4, 10, 28):
        coarse = Image.fromarray(rng.uniform(-1, 1, (cells, 2 * cells)).astype(np.float32))
        total += np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC)) * 0.6
    return total


def within(x: np.ndarray, period: float, start: float, stop: float) -> np.ndarray:
    """Where x, modulo ``period``, lies between two fractions of it."""
    phase = (x / period) % 1
    return (phase >= start) & (phase < stop)


# Two coordinates of a plane in meters -> brightness factor, about 1.
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda a, b: np.ones_like(a),
    "tiles": lambda a, b: np.where(within(a, 0.9, 0, 0.1) | within(b, 0.9, 0, 0.1), 0.72, 1.06),
    "windows": lambda a, b: np.where(within(a, 2.4, 0.25, 0.75) & within(b, 3.0, 0.35, 0.85), 0.5, 1.05),
    "bricks": lambda a, b: np.where(  # every other row is shifted
        within(b, 0.35, 0, 0.2) | within(a + 0.4 * np.floor(b / 0.35), 0.8, 0, 0.12), 0.7, 1.05
    ),
    "bars": lambda a, b: np.where(within(a, 0.5, 0, 0.4) | within(b, 0.7, 0, 0.2), 1.2, 0.5),
    "sleepers": lambda a, b: np.where(within(b, 0.8, 0, 0.4), 0.7, 1.1),
    "panes": lambda a, b: np.where((b > 1.5) & (b < 2.4) & within(a, 1.2, 0.12, 0.9), 0.35, 1.0),
    "planks": lambda a, b: np.where(within(a, 0.45, 0, 0.15), 0.82, 1.0),
    "spokes": lambda a, b: np.where(within(a + b, 0.22, 0, 0.45), 0.35, 1.1),
}


# ---- the painter -----------------------------------------------------------------------------------------------------


class Scene:
    """An image and its label being painted, and the camera, light and materials of their street."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.rng = rng
        self.height, self.width = size
        self.label = Image.new("L", (self.width, self.height), IDS["unlabeled"])
        self.focal = self.width * rng.uniform(0.75, 1.0)
        self.eye = rng.uniform(1.3, 2.0)  # the camera's height above the ground, meters
        self.center = self.width * rng.uniform(0.4, 0.6)
        self.horizon = self.height * rng.uniform(0.36, 0.5)
        self.haze = rng.uniform(0.002, 0.008)  # per meter
        sky = [(150, 185, 225), (200, 205, 210), (225, 205, 185)][rng.integers(3)]
        self.sky = np.array(sky) * rng.uniform(0.7, 1.0)
        self.sun = rng.choice([-1, 1])  # the side of the street that is lit
        self.materials = {kind: gray(rng) for kind in ("building", "wall", "fence", "pole")}
        self.materials |= {kind: green(rng) for kind in ("tree", "hedge", "terrain")}
        rows, columns = np.mgrid[: SUPERSAMPLING * self.height, : SUPERSAMPLING * self.width]
        self.x, self.y = (columns + 0.5) / SUPERSAMPLING, (rows + 0.5) / SUPERSAMPLING
        self.image = np.zeros((*self.x.shape, 3), np.float32)
        self.cloud = smooth_noise(rng, self.x.shape)
        self.grain = rng.standard_normal(self.x.shape).astype(np.float32)

    def material(self, kind: str) -> np.ndarray:
        """The color of a class in this street, with a little variation."""
        return self.materials[kind] * self.rng.uniform(0.93, 1.07)

    def project(self, x: float, y: float, z: float) -> tuple[int, int]:
        """World -> whole pixel."""
        scale = self.focal / max(z, NEAR)
        return round(self.center + scale * x), round(self.horizon + scale * (self.eye - y))

    def plane(self, points: Sequence[Point], x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
        """Pixels of a flat piece -> two coordinates in its plane and the depth, all in meters."""
        xs, _, zs = zip(*points)
        right, down = (x - self.center) / self.focal, (y - self.horizon) / self.focal  # of a ray, per meter of depth
        if max(zs) - min(zs) < 1e-6:  # faces the camera
            z = np.full_like(x, zs[0])
            return right * z - min(xs), self.eye - down * z, z
        if max(xs) - min(xs) < 1e-6:  # along the street
            z = np.clip(xs[0] / np.where(abs(right) < 1e-3, 1e-3, right), NEAR, 200)
            return z, self.eye - down * z, z
        z = np.clip(self.eye / np.maximum(down, 1e-3), NEAR, 200)  # the ground
        return right * z, z, z

    def paint(self, label, points, color, texture="plain", roughness=0.04, patches=0.08) -> None:
        """Paint one flat piece: facing the camera, along the street or on the ground, as its points say.

        Args:
            label: of Cityscapes. None for a detail, whose pixels keep the label below.
            points: corners (x, y, z) in the world.
            color: red, green, blue, 0 .. 255.
            roughness, patches: scales of the fine and the coarse noise.
        """
        polygon = [self.project(*point) for point in points]
        if label:
            ImageDraw.Draw(self.label).polygon(polygon, fill=IDS[label])
        mask = Image.new("1", self.x.shape[::-1])
        ImageDraw.Draw(mask).polygon([((x + 0.5) * SUPERSAMPLING, (y + 0.5) * SUPERSAMPLING) for x, y in polygon], 1)
        box = mask.getbbox()
        if box is None:  # outside the image
            return
        left, top, right, bottom = box
        area, inside = (slice(top, bottom), slice(left, right)), np.asarray(mask.crop(box))
        a, b, depth = self.plane(points, self.x[area][inside], self.y[area][inside])
        shade = TEXTURES[texture](a, b) + roughness * self.grain[area][inside] + patches * self.cloud[area][inside]
        fog = np.exp(-self.haze * depth)[:, None]
        self.image[area][inside] = fog * shade[:, None] * np.asarray(color) + (1 - fog) * self.sky

    # Rectangles; positions and sizes in meters, the rest as for ``paint``.

    def front(self, label, x, y, width, height, z, color, texture="plain", **noise) -> None:
        """Faces the camera, its lower left corner at (x, y, z)."""
        corners = [(x, y, z), (x + width, y, z), (x + width, y + height, z), (x, y + height, z)]
        self.paint(label, corners, color, texture, **noise)

    def side(self, label, x, z, length, height, color, texture="plain", y=0.0, **noise) -> None:
        """Along the street, from depth z to z + length."""
        corners = [(x, y, z), (x, y, z + length), (x, y + height, z + length), (x, y + height, z)]
        self.paint(label, corners, color, texture, **noise)

    def ground(self, label, x0, x1, z0, z1, color, texture="plain", **noise) -> None:
        self.paint(label, [(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], color, texture, **noise)

    def finish(self) -> tuple[Image.Image, Image.Image]:
        """The image, with the light, tint and noise of its camera, and the label."""
        gain = self.rng.uniform(0.6, 1.2) * self.rng.uniform(0.8, 1.2, 3)
        image = (self.image * gain + 3 * self.grain[..., None]).clip(0, 255).astype(np.uint8)
        return Image.fromarray(image).reduce(SUPERSAMPLING), self.label


# ---- objects of a street ---------------------------------------------------------------------------------------------


def outline(points: Sequence[tuple[float, float]], x: float, z: float, flip: bool = False) -> list[Point]:
    """Meters to the right of and above a foot point -> a silhouette that faces the camera at (x, 0, z)."""
    return [(x + (-u if flip else u), v, z) for u, v in points]


def disc(u: float, v: float, radius: float, corners: int = 10) -> list[tuple[float, float]]:
    angles = np.arange(corners) * 2 * np.pi / corners
    return [(u + radius * float(np.cos(t)), v + radius * float(np.sin(t))) for t in angles]


LEGS = [(-0.22, 0), (-0.05, 0), (0, 0.5), (0.05, 0), (0.22, 0), (0.2, 0.9), (-0.2, 0.9)]
TORSO = [(-0.2, 0.8), (0.2, 0.8), (0.32, 0.85), (0.28, 1.45), (0.1, 1.52), (-0.1, 1.52), (-0.28, 1.45), (-0.32, 0.85)]
PERSON = LEGS[:5] + TORSO[1:5] + disc(0, 1.65, 0.15, 6)[:4] + TORSO[5:]
VEHICLES = {  # width, height (a car's without its cabin), length in meters; texture
    "car": (1.8, 0.85, 4.0, "plain"),
    "truck": (2.5, 3.3, 7.5, "planks"),
    "bus": (2.5, 3.0, 11.0, "panes"),
    "train": (2.8, 3.7, 30.0, "panes"),
}
FACADES = {  # least and greatest height in meters; texture
    "building": (6, 16, "windows"),
    "wall": (2.0, 3.6, "bricks"),
    "fence": (1.6, 2.6, "bars"),
    "hedge": (1.5, 5, "plain"),
}
LEAVES = dict(roughness=0.2, patches=0.2)


def person(scene: Scene, x: float, z: float) -> None:
    scene.paint("person", outline(PERSON, x, z), vivid(scene.rng))
    scene.paint(None, outline(LEGS, x, z), vivid(scene.rng) * 0.7)
    scene.paint(None, outline(disc(0, 1.65, 0.15, 8), x, z), (190, 150, 125))


def two_wheeler(scene: Scene, x: float, z: float, label: str, ridden: bool) -> None:
    """A bicycle or motorcycle seen from the side, with its rider or parked."""
    rng, flip = scene.rng, bool(scene.rng.random() < 0.5)
    color = vivid(rng)
    if ridden:
        trunk = [(-0.3, 0.75), (0.25, 0.7), (0.35, 1.25), (0.2, 1.55), (-0.1, 1.55), (-0.3, 1.3)]
        scene.paint("rider", outline(trunk, x, z, flip), vivid(rng))
        scene.paint("rider", outline(disc(0.1, 1.75, 0.17, 8), x, z, flip), (185, 145, 120))
    if label == "bicycle":
        for u in (-0.55, 0.55):
            scene.paint(label, outline(disc(u, 0.36, 0.36), x, z, flip), color * 0.6, "spokes")
        scene.paint(label, outline([(-0.55, 0.3), (0.55, 0.3), (0.5, 0.95), (-0.3, 0.85)], x, z, flip), color, "spokes")
    else:
        body = [(-0.8, 0.4), (0.8, 0.4), (0.65, 1.1), (0.3, 0.9), (-0.75, 0.95)]
        scene.paint(label, outline(body, x, z, flip), color)
        for u in (-0.6, 0.6):
            scene.paint(label, outline(disc(u, 0.33, 0.33), x, z, flip), (35, 35, 38))
    if ridden:
        leg = [(-0.15, 0.3), (0.1, 0.3), (0.25, 0.8), (-0.2, 0.85)]
        scene.paint("rider", outline(leg, x, z, flip), vivid(rng) * 0.6)


def vehicle(scene: Scene, label: str, x: float, z: float) -> None:
    """A box on wheels: its shadow, the side toward the middle of the street, its front."""
    rng, color = scene.rng, vivid(scene.rng)
    width, height, length, texture = VEHICLES[label]
    near = x if x > 0 else x + width
    scene.ground(None, x - 0.2, x + width + 0.2, z - 0.2, z + length, np.full(3, 35), roughness=0.02)
    scene.side(label, near, z, length, height - 0.25, color * 0.75, texture, y=0.25)
    if label == "car":  # the cabin, set back on every side
        scene.side(label, near, z + 0.7, length - 1.5, 0.65, color * 0.3, y=height)
        roof = [(0.15, height), (width - 0.15, height), (width - 0.35, 1.5), (0.35, 1.5)]
        scene.paint(label, outline(roof, x, z + 0.5), color * 0.9)
        glass = [(0.3, height + 0.05), (width - 0.3, height + 0.05), (width - 0.42, 1.42), (0.42, 1.42)]
        scene.paint(None, outline(glass, x, z + 0.5), (60, 70, 80))
    scene.front(label, x, 0.25, width, height - 0.25, z, color)
    if label != "car":  # a windscreen; the truck's cab is lower than its box
        top = 0.72 if label == "truck" else 0.92
        scene.front(None, x + 0.15, 0.45 * height, width - 0.3, (top - 0.45) * height, z, (55, 65, 75))
    for u in (0.05, width - 0.45):  # wheels and lights
        scene.front(label, x + u, 0, 0.4, 0.35, z, (30, 30, 30))
        scene.front(None, x + u, 0.55, 0.35, 0.2, z, (230, 60, 50) if rng.random() < 0.5 else (235, 235, 235))
    if label == "car":  # license plate
        scene.front(None, x + 0.6, 0.35, 0.6, 0.2, z, (220, 220, 220))


def tree(scene: Scene, x: float, z: float) -> None:
    color, height = scene.material("tree") * 0.9, scene.rng.uniform(4, 8)
    scene.front("vegetation", x - 0.2, 0, 0.4, 0.5 * height, z, (80, 65, 50))
    radii = scene.rng.uniform(0.75, 1.15, 14) * 0.3 * height
    crown = [(r * u, 0.68 * height + r * v) for r, (u, v) in zip(radii, disc(0, 0, 1, 14))]
    scene.paint("vegetation", outline(crown, x, z), color, **LEAVES)


def pole(scene: Scene, x: float, z: float, carries: str) -> None:
    """A pole with a traffic light, a traffic sign or a lamp on it."""
    rng, height = scene.rng, scene.rng.uniform(2.8, 4.5)
    scene.front("pole", x - 0.13, 0, 0.26, height, z, scene.material("pole") * 0.8)
    if carries == "traffic light":
        scene.front("traffic light", x - 0.25, height - 1.1, 0.5, 1.2, z, (40, 40, 40))
        lit = int(rng.integers(3))
        for i, color in enumerate([(60, 200, 110), (230, 180, 50), (220, 50, 40)]):
            spot = outline(disc(0, height - 0.88 + 0.37 * i, 0.15, 8), x, z)
            scene.paint(None, spot, np.array(color) * (1 if i == lit else 0.3))
    elif carries == "traffic sign":
        corners, color = int(rng.choice([3, 4, 12])), vivid(rng)
        scene.paint("traffic sign", outline(disc(0, height - 0.4, 0.7, corners), x, z), color)
        scene.paint(None, outline(disc(0, height - 0.4, 0.42, corners), x, z), (225, 225, 225))
    else:
        scene.front("pole", x - 0.1, height, 0.9 if x < 0 else -0.7, 0.15, z, scene.material("pole") * 0.8)


def facade(scene: Scene, kind: str, x: float, z: float, length: float) -> None:
    """What lines the street: a stretch of building, wall, fence or hedge at X = x, from depth z on."""
    low, high, texture = FACADES[kind]
    height, color = scene.rng.uniform(low, high), scene.material(kind)
    light = 1.0 if x * scene.sun > 0 else 0.7
    if kind == "building":  # its end wall is lit when its front is not
        scene.front(kind, x if x > 0 else x - 10, 0, 10, height, z, color * (1.7 - light), texture)
    label, noise = ("vegetation", LEAVES) if kind == "hedge" else (kind, {})
    scene.side(label, x, z, length, height, color * light, texture, **noise)


def street(rng: np.random.Generator, size: tuple[int, int] = SIZE) -> tuple[Image.Image, Image.Image]:
    """One scene: an RGB image, and its label, mode L, of Cityscapes' label ids."""
    scene = Scene(rng, size)
    half = rng.uniform(3.5, 6.0)  # of the road's width
    walk = rng.uniform(1.8, 3.2)  # width of a sidewalk
    verge = rng.uniform(1.2, 3.0)  # from there to what lines the street
    edge = half + walk

    scene.front("sky", -400, -5, 800, 400, 199.0, scene.sky * 1.1, patches=0.12)
    for x in np.arange(-160, 160, 20):  # what closes the view
        kind = rng.choice(["building", "vegetation", "none"])
        if kind != "none":
            color = gray(rng) if kind == "building" else green(rng)
            scene.front(kind, x, 0, 24, rng.uniform(6, 20), 100.0, color, roughness=0.1)

    ground = gray(rng)
    scene.ground("terrain", -300, 300, NEAR, 150, scene.material("terrain") * 1.1, roughness=0.12, patches=0.15)
    scene.ground("road", -half, half, NEAR, 150, ground, roughness=0.07)
    for side in (-1, 1):
        inner, outer = sorted((side * half, side * edge))
        scene.ground("sidewalk", inner, outer, NEAR, 150, ground * rng.uniform(0.85, 1.2), "tiles")
    dash = rng.uniform(2, 4)
    for z in np.arange(rng.uniform(2, 5), 60, 2 * dash):  # lane markings are road
        scene.ground(None, -0.09, 0.09, z, z + dash, (205, 205, 205))

    rails = rng.random() < 0.4 and rng.choice([-1, 1])  # a side with a train, or none
    for side in (-1, 1):
        z, stretches = rng.uniform(2.5, 6), []
        while z < 70:
            length = rng.uniform(6, 16)
            kind = rng.choice([*FACADES, "none"], p=[0.36, 0.2, 0.2, 0.14, 0.1])
            stretches.append((kind, side * (edge + verge + (3.5 if rails == side else 0)), z, length))
            z += length
        for kind, x, z, length in reversed(stretches):
            if kind != "none":
                facade(scene, kind, x, z, length)
    if rails:
        x, z = rails * (edge + 0.4 + 2.8 / 2) - 2.8 / 2, rng.uniform(7, 25)
        scene.ground("rail track", x - 0.3, x + 3.1, NEAR, 150, (110, 100, 95), "sleepers")
        vehicle(scene, "train", x, z)

    things = []  # (depth, side of the street, how to paint it)

    def put(count: int, near: float, far: float, paint: Callable[[float, int], None]) -> None:
        for _ in range(count):
            things.append((rng.uniform(near, far), int(rng.choice([-1, 1])), paint))

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
        gray(rng)  # not used, but drawn: published figures were measured on the scenes that follow from it
    bonnet = rng.uniform(0.02, 0.08) * scene.height  # pixels of the car that carries the camera
    low, high = (scene.eye - (scene.height - y - scene.horizon) * NEAR / scene.focal for y in (0, bonnet))
    x0, x1, x2, x3 = ((x * scene.width - scene.center) * NEAR / scene.focal for x in (0.1, 0.25, 0.75, 0.9))
    corners = [(x0, low, NEAR), (x3, low, NEAR), (x2, high, NEAR), (x1, high, NEAR)]
    scene.paint("ego vehicle", corners, vivid(rng) * 0.5)
    return scene.finish()


# ---- writing a data set ----------------------------------------------------------------------------------------------


def scene_paths(root: Path, split: str, index: int) -> tuple[Path, Path]:
    """Image and label of a scene."""
    city = f"synth{split}"
    name = f"{city}_{index:06d}_000000"
    return (
        root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png",
        root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png",
    )


def write_scene(root: Path, scene: tuple[str, int]) -> None:
    """Write image and label of one scene, which depends only on split and index."""
    split, index = scene
    images = street(np.random.default_rng([0, sorted(SPLITS).index(split), index]))
    for image, path in zip(images, scene_paths(root, split, index)):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def write_dataset(root: Path, splits: Mapping[str, int] = SPLITS) -> None:
    """Write a data set in Cityscapes' layout as ``root``, which is whole or absent at any moment. Kept if it exists.

    Args:
        splits: number of scenes in "train" and "val".

    Raises:
        InputError: ``root`` exists and is something else.
    """
    if root.exists():
        for split in splits:
            image, _ = scene_paths(root, split, 0)
            if not image.exists():
                raise InputError(
                    f"{root}: expected generated data or a folder that does not exist, found no {image}: choose "
                    f"another folder, or remove this one"
                )
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{root.name}.part", dir=root.parent) as part:
        scenes = [(split, index) for split, count in splits.items() for index in range(count)]
        process_map(partial(write_scene, Path(part, root.name)), scenes, desc="drawing streets", disable=None)
        Path(part, root.name).rename(root)
