"""Shapes x colours: generated pictures, some combinations of which are held out of training."""

from __future__ import annotations

from typing import Any

import numpy as np

SIZE, SUPERSAMPLED = 16, 8
COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 127, 14),
    "yellow": (230, 200, 30),
    "green": (44, 160, 44),
    "cyan": (23, 190, 207),
    "blue": (31, 60, 200),
    "purple": (130, 60, 170),
    "black": (30, 30, 30),
}


def _polygon(x: Any, y: Any, corners: int) -> Any:
    """Inside a regular polygon whose corners lie on the unit circle, one of them above."""
    angle = np.arctan2(x, y) % (2 * np.pi / corners) - np.pi / corners
    return np.hypot(x, y) * np.cos(angle) <= np.cos(np.pi / corners)


SHAPES = {
    "disc": lambda x, y: np.hypot(x, y) <= 0.9,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.8,
    "triangle": lambda x, y: _polygon(x, y, 3),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1,
    "ring": lambda x, y: (np.hypot(x, y) <= 0.95) & (np.hypot(x, y) >= 0.5),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.95),
    "bar": lambda x, y: (abs(y) <= 0.35) & (abs(x) <= 1),
    "moon": lambda x, y: (np.hypot(x, y) <= 0.95) & (np.hypot(x - 0.45, y) > 0.75),
}
"""By name: whether a point is inside, for x to the right and y upwards in units of the shape's radius."""


def held_out_pairs() -> Any:
    """Which (shape, colour) no training picture has, bool `[8, 8]`: two colours of each shape, two shapes of each."""
    rows = np.arange(len(SHAPES))
    held = np.zeros((len(SHAPES), len(COLOURS)), bool)
    held[rows, rows] = held[rows, (rows + 3) % len(COLOURS)] = True
    return held


def draw(shapes: Any, colours: Any, seed: int) -> Any:
    """Pictures uint8 `[n, 16, 16, 3]` on white, each with a radius, a place and a shade of its own.

    Args:
        shapes: numbers of `SHAPES`, `[n]`.
        colours: numbers of `COLOURS`, `[n]`.
        seed: of radius (4 to 6.5 pixels), place (inside the picture) and shade (brightness 0.85 to 1.15).
    """
    rng, inside = np.random.default_rng(seed), list(SHAPES.values())
    palette = np.array(list(COLOURS.values()), np.float64)
    grid = (np.arange(SIZE * SUPERSAMPLED) + 0.5) / SUPERSAMPLED
    pictures = np.empty((len(shapes), SIZE, SIZE, 3), np.uint8)
    for row, (shape, colour) in enumerate(zip(shapes, colours, strict=True)):
        radius = rng.uniform(4, 6.5)
        across, down = rng.uniform(radius, SIZE - radius, 2)
        shade = rng.uniform(0.85, 1.15)
        hit = inside[shape]((grid[None] - across) / radius, (down - grid[:, None]) / radius)
        cover = hit.reshape(SIZE, SUPERSAMPLED, SIZE, SUPERSAMPLED).mean((1, 3))[..., None]
        paint = np.clip(palette[colour] * shade, 0, 255)
        pictures[row] = np.round(255 * (1 - cover) + paint * cover)
    return pictures
