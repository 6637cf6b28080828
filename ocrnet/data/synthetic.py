"""Generated street scenes in Cityscapes' layout: data to train on where there is no data set.

A scene is painted piece by piece, from far to near, through a pinhole camera. Image and label get the same flat pieces,
so the labels are exact. Color does not determine the class: road, sidewalk, building, wall and fence share their grays,
vegetation and terrain their greens, vehicles, signs and clothes their paints. Shape, texture, position and context do.
All buildings of one street have about one color, as have its walls, its trees and so on, under a light of its own: what
a class looks like in *this* image says more than its color in all images.

World: X to the right, Y up from the ground, Z away from the camera, in meters. Notation: H W the image's size.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm.contrib.concurrent import process_map

from .. import InputError
from ..files import atomic_write
from .classes import CITYSCAPES

SIZE = (128, 256)  # H, W of an image
SPLITS = {"train": 480, "val": 60}  # images
NEAR, FAR = 1.5, 150  # meters: depths that are painted
IDS = {label.name: label.id for label in CITYSCAPES.labels}
IMAGE = "leftImg8bit/{0}/synth{0}/synth{0}_{1:06d}_000000_leftImg8bit.png"  # of a split and an index
LABEL = "gtFine/{0}/synth{0}/synth{0}_{1:06d}_000000_gtFine_labelIds.png"


# ---- colors and textures ---------------------------------------------------------------------------------------------


def gray(rng: np.random.Generator) -> np.ndarray:
    """One of the grays that road, sidewalk, building, wall and fence share."""
    return rng.uniform(80, 165) + rng.uniform(-12, 12, 3)


def vivid(rng: np.random.Generator) -> np.ndarray:
    """One of the paints that vehicles, signs and clothes share: red, blue, yellow, white, black, gray or green."""
    paints = (190, 40, 40), (40, 70, 170), (210, 180, 50), (225, 225, 225), (45, 45, 50), (120, 125, 130), (50, 120, 70)
    return rng.choice(paints) + rng.uniform(-20, 20, 3)


def within(x: np.ndarray, period: float, start: float, stop: float) -> np.ndarray:
    """Where x, modulo ``period``, lies between two fractions of it."""
    phase = (x / period) % 1
    return (phase >= start) & (phase < stop)


# Two coordinates in meters -> where the pattern is; brightness there and elsewhere.
TEXTURES = {
    "plain": (lambda a, b: np.zeros_like(a, bool), 1, 1),
    "tiles": (lambda a, b: within(a, 0.9, 0, 0.1) | within(b, 0.9, 0, 0.1), 0.72, 1.06),
    "windows": (lambda a, b: within(a, 2.4, 0.25, 0.75) & within(b, 3.0, 0.35, 0.85), 0.5, 1.05),
    "bricks": (lambda a, b: within(b, 0.35, 0, 0.2) | within(a + 0.4 * np.floor(b / 0.35), 0.8, 0, 0.12), 0.7, 1.05),
    "bars": (lambda a, b: within(a, 0.5, 0, 0.4) | within(b, 0.7, 0, 0.2), 1.2, 0.5),
    "panes": (lambda a, b: (b > 1.5) & (b < 2.4) & within(a, 1.2, 0.12, 0.9), 0.35, 1),
}


class Scene:
    """An image and its label while they are painted, at twice their size, and the camera and materials of a street."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.rng, (height, width) = rng, (2 * size[0], 2 * size[1])
        self.image, self.label = np.zeros((height, width, 3)), np.zeros((height, width), np.uint8)
        self.focal = width * rng.uniform(0.75, 1.0)  # pixels, as center and horizon
        self.center, self.horizon = width * rng.uniform(0.4, 0.6), height * rng.uniform(0.36, 0.5)
        self.eye = rng.uniform(1.3, 2.0)  # height of the camera, meters
        self.materials = {kind: gray(rng) for kind in ("building", "wall", "fence", "pole")}
        self.materials |= {kind: rng.uniform((60, 80, 35), (125, 135, 75)) for kind in ("vegetation", "terrain")}

    def material(self, kind: str) -> np.ndarray:
        """The color of a class in this street, with a little variation."""
        return self.materials[kind] * self.rng.uniform(0.93, 1.07)

    def paint(self, label, points, color, texture="plain", noise=0.08) -> None:
        """Paint a flat piece with corners (x, y, z): facing the camera, along the street or on the ground.

        ``label`` is a name of Cityscapes, or None for a detail, whose pixels keep the label below. ``texture`` is of
        ``TEXTURES``, ``noise`` the standard deviation of the brightness, which is about 1.
        """
        x, y, z = corners = np.array(points, float).T
        polygon = np.stack([self.center + self.focal * x / z, self.horizon + self.focal * (self.eye - y) / z], 1)
        start, stop = polygon.min(0).astype(int).clip(0), polygon.max(0).astype(int) + 1
        stop = stop.clip(max=self.label.shape[::-1])
        if (start >= stop).any():  # outside the image
            return
        mask = Image.new("1", tuple(stop - start))
        ImageDraw.Draw(mask).polygon((polygon - start).ravel().tolist(), fill=1)
        v, u = np.add(np.nonzero(mask), start[::-1, None])  # the pixels inside
        ray = np.stack([(u + 0.5 - self.center) / self.focal, (self.horizon - v - 0.5) / self.focal, np.ones(len(u))])
        eye = np.array([0, self.eye, 0])
        normal = np.ptp(corners, axis=1).argmin()  # 0: the piece is along the street, 1: on the ground, 2: facing us
        # where the ray meets the plane; 1e-9 for rays that are parallel to it
        depth = np.clip((corners[normal, 0] - eye[normal]) / (ray[normal] + 1e-9), NEAR, FAR)
        a, b = (eye[:, None] + depth * ray)[[[2, 1], [0, 2], [0, 1]][normal]]  # coordinates in the piece, meters
        pattern, there, elsewhere = TEXTURES[texture]
        shade = np.where(pattern(a, b), there, elsewhere) + noise * self.rng.standard_normal(len(u))
        self.image[v, u] = shade[:, None] * color
        if label:
            self.label[v, u] = IDS[label]

    def rectangle(self, label, corner, size, *look) -> None:
        """Paint a rectangle from its ``corner`` (x, y, z) on. One of its sizes (dx, dy, dz) is 0."""
        dx, dy, dz = size
        u, v = np.array([(dx, 0, 0) if dx else (0, 0, dz), (0, dy, 0) if dy else (0, 0, dz)])
        self.paint(label, [corner, corner + u, corner + u + v, corner + v], *look)

    def figure(self, x, z, *pieces) -> None:
        """Paint what faces the camera at (x, 0, z): pieces (label, outline in meters right and up, color, ...)."""
        for label, outline, *look in pieces:
            self.paint(label, [(x + u, v, z) for u, v in outline], *look)


# ---- objects of a street ---------------------------------------------------------------------------------------------

VEHICLES = {  # width, height and length in meters; the front's window: its lowest and highest point; the side's texture
    "car": (1.8, 1.45, 4.0, 0.85, 1.35), "truck": (2.5, 3.3, 7.5, 1.4, 2.1),
    "bus": (2.5, 3.0, 11.0, 0.9, 2.7, "panes"), "train": (2.8, 3.7, 30.0, 1.5, 2.9, "panes"),
}  # fmt: skip
FACADES = {  # probability; least and greatest height in meters; texture and noise
    "building": (0.4, 6, 16, "windows"), "wall": (0.22, 2, 3.6, "bricks"), "fence": (0.22, 1.6, 2.6, "bars"),
    "vegetation": (0.16, 1.5, 5, "plain", 0.2),
}  # fmt: skip


def box(u: float, v: float, width: float, height: float) -> list[tuple[float, float]]:
    return [(u, v), (u + width, v), (u + width, v + height), (u, v + height)]


def disc(u: float, v: float, radius: float | np.ndarray, corners: int = 10) -> np.ndarray:
    angles = np.arange(corners) * 2 * np.pi / corners
    return np.stack([u + radius * np.cos(angles), v + radius * np.sin(angles)], 1)


def body(label: str, rng: np.random.Generator, seat: float = 0) -> list[tuple]:
    """Legs, torso and head of a person, or of a rider on a ``seat`` of that height."""
    torso = [(-0.3, seat + 0.8), (0.3, seat + 0.8), (0.2, seat + 1.5), (-0.2, seat + 1.5)]
    legs, head = box(-0.2, seat, 0.4, 0.9), disc(0, seat + 1.65, 0.16, 8)
    return [(label, legs, vivid(rng) * 0.7), (label, torso, vivid(rng)), (label, head, (190, 150, 125))]


def two_wheeler(scene: Scene, x: float, z: float, ridden: bool) -> None:
    """A bicycle or motorcycle seen from the side, with its rider or parked."""
    label, color = scene.rng.choice(["bicycle", "motorcycle"]), vivid(scene.rng)
    frame, tire = [(-0.5, 0.35), (0.5, 0.35), (0.45, 0.95), (-0.3, 0.8)], color * 0.6
    if label == "motorcycle":
        frame, tire = [(-0.9, 0.3), (0.9, 0.3), (0.7, 1.1), (0.3, 0.9), (-0.8, 0.95)], (35, 35, 38)
    wheels = [(label, disc(u, 0.36, 0.36), tire) for u in (-0.6, 0.6)]
    scene.figure(x, z, *(body("rider", scene.rng, 0.2) if ridden else ()), *wheels, (label, frame, color))


def vehicle(scene: Scene, label: str, x: float, z: float) -> None:
    """A box on wheels: its shadow, the side toward the middle of the street, its front with a window."""
    color = vivid(scene.rng)
    width, height, length, low, high, *look = VEHICLES[label]
    scene.rectangle(None, (x - 0.2, 0, z - 0.2), (width + 0.4, 0, length + 0.2), (35, 35, 35))
    scene.rectangle(label, (x if x > 0 else x + width, 0.25, z), (0, height - 0.25, length), color * 0.75, *look)
    wheels = [(label, box(u, 0, 0.4, 0.35), (30, 30, 30)) for u in (0.05, width - 0.45)]
    window = (None, box(0.15, low, width - 0.3, high - low), (55, 65, 75))
    scene.figure(x, z, (label, box(0, 0.25, width, height - 0.25), color), *wheels, window)


def tree(scene: Scene, x: float, z: float) -> None:
    height = scene.rng.uniform(4, 8)
    crown = disc(0, 0.68 * height, scene.rng.uniform(0.22, 0.35, 14) * height, 14)  # a radius for each corner
    trunk = ("vegetation", box(-0.2, 0, 0.4, 0.5 * height), (80, 65, 50))
    scene.figure(x, z, trunk, ("vegetation", crown, scene.material("vegetation") * 0.9, "plain", 0.2))


def pole(scene: Scene, x: float, z: float, carries: str) -> None:
    """A pole with a traffic light, a traffic sign or nothing on it."""
    rng, height = scene.rng, scene.rng.uniform(2.8, 4.5)
    pieces = [("pole", box(-0.13, 0, 0.26, height), scene.material("pole") * 0.8)]
    if carries == "traffic sign":
        corners = rng.choice([3, 4, 12])
        board, inside = (disc(0, height - 0.4, radius, corners) for radius in (0.7, 0.42))
        pieces += [(carries, board, vivid(rng)), (None, inside, (225, 225, 225))]
    if carries == "traffic light":
        pieces += [(carries, box(-0.25, height - 1.1, 0.5, 1.2), (40, 40, 40))]
        lamps = enumerate([(60, 200, 110), (230, 180, 50), (220, 50, 40)])
        pieces += [(None, disc(0, height - 0.88 + 0.37 * i, 0.15, 8), color) for i, color in lamps]
    scene.figure(x, z, *pieces)


def facades(scene: Scene, x: float, light: float) -> None:
    """What lines the street at X = x: stretches of building, wall, fence or hedge, the far ones first."""
    z, rng = 75.0, scene.rng
    while z > 2 * NEAR:
        length = min(rng.uniform(6, 16), z - NEAR)
        z -= length
        kind = rng.choice([*FACADES], p=[row[0] for row in FACADES.values()])
        _, low, high, *look = FACADES[kind]
        height, color = rng.uniform(low, high), scene.material(kind)
        if kind == "building":  # its end wall is lit when its front is not
            scene.rectangle(kind, (x if x > 0 else x - 10, 0, z), (10, height, 0), color * (1.7 - light), *look)
        scene.rectangle(kind, (x, 0, z), (0, height, length), color * light, *look)


def street(rng: np.random.Generator, size: tuple[int, int] = SIZE) -> tuple[Image.Image, Image.Image]:
    """One scene: an RGB image, and its label of Cityscapes' label ids (mode L)."""
    scene, ground, length = Scene(rng, size), gray(rng), FAR - NEAR
    half, walk, verge = rng.uniform((3.5, 1.8, 1.2), (6.0, 3.2, 3.0))  # half the road's width, sidewalk, what follows
    edge = half + walk

    sky = rng.choice([(150, 185, 225), (200, 205, 210), (225, 205, 185)]) * rng.uniform(0.7, 1.0)
    scene.rectangle("sky", (-400, -5, FAR), (800, 400, 0), sky, "plain", 0.04)
    for x in range(-160, 160, 20):  # what closes the view
        kind = rng.choice(["building", "vegetation"])
        scene.rectangle(kind, (x, 0, 100), (24, rng.uniform(1, 20), 0), scene.material(kind))
    scene.rectangle("terrain", (-300, 0, NEAR), (600, 0, length), scene.material("terrain"), "plain", 0.16)
    scene.rectangle("road", (-half, 0, NEAR), (2 * half, 0, length), ground)
    for x in (-edge, half):
        scene.rectangle("sidewalk", (x, 0, NEAR), (walk, 0, length), ground * rng.uniform(0.85, 1.2), "tiles")
    for z in np.arange(rng.uniform(2, 5), 60, 6):  # lane markings are road
        scene.rectangle(None, (-0.09, 0, z), (0.18, 0, 3), (205, 205, 205))

    sun, rails = rng.choice([-1, 1]), rng.choice([-1, 1, 0], p=[0.2, 0.2, 0.6])  # sides; 0: there is no train
    for side in (-1, 1):
        facades(scene, side * (edge + verge + (3.5 if side == rails else 0)), 1.0 if side == sun else 0.7)
    if rails:
        vehicle(scene, "train", rails * (edge + 1.8) - 1.4, rng.uniform(7, 25))

    on_walk, on_road = partial(rng.uniform, half + 0.4, edge - 0.2), partial(rng.uniform, 0.8, half - 0.8)
    things = [  # how many, nearest and farthest in meters, how one is painted at depth z on side s
        (rng.integers(1, 4), 7, 30, lambda z, s: tree(scene, s * (edge + rng.uniform(0.3, verge - 0.4)), z)),
        (rng.integers(2, 5), 5, 20, lambda z, s: pole(scene, s * (half + 0.3), z, rng.choice(["", "traffic sign"]))),
        (rng.integers(1, 4), 5, 16, lambda z, s: pole(scene, s * (half + 0.3), z, "traffic light")),
        (rng.integers(2, 6), 4, 12, lambda z, s: scene.figure(s * on_walk(), z, *body("person", rng))),
        (rng.integers(1, 6), 7, 35, lambda z, s: vehicle(scene, "car", s * half - (2.0 if s > 0 else -0.2), z)),
        (rng.integers(0, 3), 9, 22, lambda z, s: vehicle(scene, rng.choice(["truck", "bus"]), s * half / 2 - 1.25, z)),
        (rng.integers(0, 4), 5, 14, lambda z, s: two_wheeler(scene, s * on_road(), z, True)),
        (rng.integers(0, 4), 5, 14, lambda z, s: two_wheeler(scene, s * on_walk(), z, False)),
    ]
    placed = [(rng.uniform(near, far), paint) for count, near, far, paint in things for _ in range(count)]
    for z, paint in sorted(placed, key=lambda thing: -thing[0]):
        paint(z, rng.choice([-1, 1]))
    lowest = scene.eye - (scene.label.shape[0] - scene.horizon) * NEAR / scene.focal  # Y in the image's last row
    scene.rectangle("ego vehicle", (-0.6, lowest, NEAR), (1.2, rng.uniform(0.02, 0.1), 0), vivid(rng) * 0.5)

    tint = rng.uniform(0.6, 1.2) * rng.uniform(0.8, 1.2, 3)
    image = Image.fromarray((scene.image * tint).clip(0, 255).astype(np.uint8))
    return image.reduce(2), Image.fromarray(scene.label[::2, ::2])


def write_scene(root: Path, split: str, index: int) -> None:
    """Write image and label of one scene, which depends only on split and index."""
    for image, name in zip(street(np.random.default_rng([0, sorted(SPLITS).index(split), index])), (IMAGE, LABEL)):
        with atomic_write(root / name.format(split, index)) as part:
            image.save(part, format="PNG")


def write_dataset(root: Path, splits: dict[str, int] = SPLITS) -> None:
    """Write ``splits`` (name -> scenes) in Cityscapes' layout as ``root``, whole or not at all, unless they are there.

    Raise InputError if ``root`` exists and is something else.
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
        if not root.exists():  # as it does where another process was faster
            whole.rename(root)
