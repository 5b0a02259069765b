"""Multi-reference alignment again, written out in float64 NumPy: direct sums, no transform, no shared code."""

import numpy as np


def ring_lengths(first: int, last: int) -> dict[int, int]:
    """Samples of the ring of each radius: a power of two, at least 64 and at least 2πr."""
    lengths = {}
    for radius in range(first, last + 1):
        n = 64
        while n < 2 * np.pi * radius:
            n *= 2
        lengths[radius] = n
    return lengths


def bilinear(image: np.ndarray, x: float, y: float) -> float:
    """Value at column x, row y; outside, that of the nearest pixel."""
    box = len(image)
    x, y = min(max(x, 0.0), box - 1.0), min(max(y, 0.0), box - 1.0)
    left, top = min(int(x), box - 2), min(int(y), box - 2)
    fx, fy = x - left, y - top
    return (
        image[top, left] * (1 - fx) * (1 - fy) + image[top, left + 1] * fx * (1 - fy)
        + image[top + 1, left] * (1 - fx) * fy + image[top + 1, left + 1] * fx * fy
    )  # fmt: skip


class Rings:
    """Where samples lie: radius, angle and weight (share of the disc) of each."""

    def __init__(self, first: int, last: int) -> None:
        lengths = ring_lengths(first, last)
        self.n_angles = max(lengths.values())
        total = sum(lengths)
        self.lengths = np.concatenate([np.full(n, n) for n in lengths.values()])
        self.radius = np.concatenate([np.full(n, r) for r, n in lengths.items()])
        self.theta = np.concatenate([(np.arange(n) + 0.5) * 2 * np.pi / n for n in lengths.values()])
        self.weight = self.radius / (total * self.lengths)
        self.angles = (np.arange(self.n_angles) + 0.5) * 2 * np.pi / self.n_angles

    def sample(self, image: np.ndarray, x: float, y: float) -> np.ndarray:
        """Polar image around pixel L//2 + (x, y), of zero mean and unit variance over the disc."""
        centre = len(image) // 2
        values = np.array([
            bilinear(image, centre + x + r * np.cos(t), centre + y + r * np.sin(t))
            for r, t in zip(self.radius, self.theta, strict=True)
        ])  # fmt: skip
        values -= np.sum(self.weight * values)
        return values / np.sqrt(np.sum(self.weight * values**2))

    def turned(self, polar: np.ndarray, angle: float, mirror: bool) -> np.ndarray:
        """A reference as an image shows it that is turned by an angle: its Fourier series on every ring."""
        phi = np.pi + angle - self.theta if mirror else self.theta - angle
        result = np.zeros_like(polar)
        for radius in np.unique(self.radius):
            on = self.radius == radius
            n = on.sum()
            for m in range(n // 2):
                coefficient = np.sum(polar[on] * np.exp(-1j * m * self.theta[on])) / n
                result[on] += (1 if m == 0 else 2) * np.real(coefficient * np.exp(1j * m * phi[on]))
        return result


def quadratic_maximum(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Place and height of the maximum of the quadratic that fits 3 × 3 × 3 values best."""
    places = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), -1).reshape(27, 3)
    pairs = [(i, j) for i in range(3) for j in range(i, 3)]
    terms = np.column_stack([np.ones(27), places, *(places[:, i] * places[:, j] for i, j in pairs)])
    c = np.linalg.lstsq(terms, values.reshape(27), rcond=None)[0]
    hessian = np.zeros((3, 3))
    for (i, j), value in zip(pairs, c[4:], strict=True):
        hessian[i, j] += value
        hessian[j, i] += value
    if np.linalg.eigvalsh(hessian).max() >= 0:
        hessian = np.diag(np.minimum(np.diag(hessian), -np.finfo(float).tiny))
    step = np.clip(np.linalg.solve(hessian, -c[1:4]), -1, 1)
    return step, float(c[0] + c[1:4] @ step + 0.5 * step @ hessian @ step)


class Alignment:
    """All correlation coefficients of images with references, and the best of each image."""

    def __init__(self, references: np.ndarray, first: int, last: int) -> None:
        self.rings = Rings(first, last)
        self.references = [self.rings.sample(reference, 0, 0) for reference in references]

    def table(self, image: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """`(t, 2, k, a)` correlation coefficients at every shift, straight and mirrored."""
        if not hasattr(self, "patterns"):
            self.patterns = np.array([
                [[self.rings.turned(q, angle, mirror) for angle in self.rings.angles] for q in self.references]
                for mirror in (False, True)
            ])  # fmt: skip
        polar = np.array([self.rings.weight * self.rings.sample(image, x, y) for x, y in shifts])
        return np.einsum("ts,mkas->tmka", polar, self.patterns)

    def refined(
        self, image: np.ndarray, x: float, y: float, reference: int, mirror: bool, number: int
    ) -> tuple[float, float, float, float]:
        """Angle, x, y and height of the peak near a point of the grid, by two quadratics."""
        unit = 2 * np.pi / self.rings.n_angles
        for _ in range(2):
            values = np.zeros((3, 3, 3))
            for a in (-1, 0, 1):
                pattern = self.rings.turned(self.references[reference], (number + a + 0.5) * unit, mirror)
                for j in (-1, 0, 1):
                    for i in (-1, 0, 1):
                        polar = self.rings.sample(image, x + i, y + j)
                        values[a + 1, j + 1, i + 1] = np.sum(self.rings.weight * polar * pattern)
            step, peak = quadratic_maximum(values)
            angle, x, y = (number + 0.5 + step[0]) * unit, x + step[2], y + step[1]
            number = round(number + step[0])
        return angle, x, y, peak
