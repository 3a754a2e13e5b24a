"""A drawn table with things on it, and what a camera that was moved sees of it."""

import cv2
import numpy as np

H, W = 480, 640


def scene(seed, height=720, width=960):
    """A table with things on it: soft light, boxes, discs, texture, larger than the picture."""
    chance = np.random.default_rng(seed)
    soft = chance.integers(60, 180, (6, 8, 3)).astype(np.uint8)
    picture = cv2.resize(soft, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(60):
        colour = [int(value) for value in chance.integers(20, 236, 3)]
        x, y, size = int(chance.integers(0, width)), int(chance.integers(0, height)), int(chance.integers(12, 70))
        if chance.random() < 0.5:
            cv2.rectangle(picture, (x, y), (x + size, y + int(0.7 * size)), colour, -1)
        else:
            cv2.circle(picture, (x, y), size // 2, colour, -1)
    return cv2.GaussianBlur(picture, (3, 3), 0)


def shot(seed, *, shift=(0.0, 0.0), rotation=0.0, scale=1.0, noise=2.0, noise_seed=0):
    """What the camera sees of a scene; ``shift`` in pixels right and down, ``rotation`` counter-clockwise (degrees)."""
    big = scene(seed) if isinstance(seed, int) else seed
    centre = ((big.shape[1] - 1) / 2, (big.shape[0] - 1) / 2)
    matrix = cv2.getRotationMatrix2D(centre, rotation, scale)
    matrix[:, 2] += shift
    seen = cv2.warpAffine(big, matrix, (big.shape[1], big.shape[0]), flags=cv2.INTER_LINEAR)
    top, left = (big.shape[0] - H) // 2, (big.shape[1] - W) // 2
    seen = seen[top : top + H, left : left + W].astype(float)
    seen += np.random.default_rng(noise_seed).normal(0, noise, seen.shape)
    return np.clip(seen, 0, 255).astype(np.uint8)
