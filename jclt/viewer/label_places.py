"""Where a name can stand in a picture: beside its mark, or further off."""

Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""


def list_near_places(mark: Box, width: float, height: float) -> list[tuple[float, float]]:
    """Where a name touches its mark: above, below or beside it."""
    left, bottom, right, top = mark
    x, y = (left + right) / 2, (bottom + top) / 2
    above, below, gap = top + 0.01 + height / 2, bottom - 0.01 - height / 2, 0.03 + width / 2
    places = [(x + shift * width, level) for level in (above, below) for shift in (0, 0.3, -0.3, 0.5, -0.5)]
    return [*places[:2], (right + gap, y), (left - gap, y), *places[2:]]


def list_far_places(x: float, y: float, width: float, height: float) -> list[tuple[float, float]]:
    """Where a name stands to the left or right of its mark, the nearest first."""
    steps = [(rise, reach) for rise in (0, 1, -1, 2, -2, 3, -3, 4, -4) for reach in (0.2, 0.35, 0.55, 0.8, 1.1, 1.5)]
    steps.sort(key=lambda step: abs(step[0]) * height + step[1])
    return [(x + side * (reach + width / 2), y + rise * 1.1 * height) for rise, reach in steps for side in (-1, 1)]


def do_overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
