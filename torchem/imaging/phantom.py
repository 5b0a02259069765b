"""The built-in phantom: a seeded pseudo-protein with any point-group symmetry.

Real backbone geometry (alpha helices, beta strands, loops), side chains of the twenty amino acids grown so that
they avoid what is there, folded into domains of layered secondary structure, the domains packed into a rugged
envelope. Its rotational power spectrum is that of a protein: the envelope's at low resolution, helix and sheet
packing about 10 Å, strand spacing about 4.7 Å. Nothing is read from a file and nothing depends on the machine's
number of threads or on a GPU.

In this file x is `(n, 3)` in Å, x, y, z, float64; `operators` is `(g, 3, 3)`; all randomness comes from one
NumPy generator. Long products are ``einsum``, which unlike ``@`` adds in the same order whatever the threads.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from torchem.errors import InputError
from torchem.imaging import symmetry as point_groups

VOLUME_PER_UNIT = 190_000.0  # Å³ of envelope an asymmetric unit, gaps between domains included: some 8,300 atoms
FILL = 0.34  # of the box of its extents that the envelope fills
DOMAINS = 5  # an asymmetric unit, each a compact fold of about 200 residues
RIPPLES = 24  # that make the envelope rugged
RUGGEDNESS = 0.1  # height of each ripple, where the envelope's level is 1 at the centre
HELICES = 0.4  # of the layers; the others are sheets
LAYER = 10.0  # Å between layers of secondary structure in a domain
LAYER_TWIST = np.deg2rad(-30.0)  # of each layer against the one below

# side chains: frequency in per cent, elements from CB on, parent of each further atom (0 is CB)
AMINO_ACIDS = {
    "A": (8.3, "C", ""), "R": (5.5, "CCCNCNN", "012344"), "N": (4.1, "CCON", "011"), "D": (5.5, "CCOO", "011"),
    "C": (1.4, "CS", "0"), "Q": (3.9, "CCCON", "0122"), "E": (6.7, "CCCOO", "0122"), "G": (7.1, "", ""),
    "H": (2.3, "CCNCCN", "01123"), "I": (5.9, "CCCC", "001"), "L": (9.7, "CCCC", "011"), "K": (5.8, "CCCCN", "0123"),
    "M": (2.4, "CCSC", "012"), "F": (3.9, "CCCCCCC", "011234"), "P": (4.7, "CCC", "01"), "S": (6.6, "CO", "0"),
    "T": (5.3, "COC", "00"), "W": (1.1, "CCCCNCCCCC", "011233567"), "Y": (2.9, "CCCCCCCO", "0112346"),
    "V": (6.9, "CCC", "00"),
}  # fmt: skip
ATOMIC_NUMBER = {"C": 6.0, "N": 7.0, "O": 8.0, "S": 16.0}
BACKBONE = ("N", "C", "C", "O")  # N, CA, C, O: the order of backbone atoms in this file


def phantom(symmetry: str = "D2", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Atoms of a pseudo-protein with the given point group, in RELION's axes, centred on the origin.

    8,000 to 9,200 atoms an asymmetric unit. D2 (and C1 and C2, less the copies) has the proportions
    of β-galactosidase, and D2 its extents, 181 × 136 × 92 Å; other groups are rounder. The same symmetry and
    seed give the same atoms.

    Returns
    -------
    xyz
        `(n, 3)` float64, Å.
    weights
        `(n,)` float64, atomic numbers.
    """
    canonical = point_groups.canonical(symmetry)
    operators = point_groups.operators(canonical)
    extents = _extents(canonical, len(operators))
    # how many residues find room, and how far out the outermost lie, is known only once the chains are there
    volume = VOLUME_PER_UNIT * len(operators)
    for trial in range(100):
        rng = np.random.default_rng([seed, trial])
        envelope = _Envelope.random(0.98 * extents / 2, volume, operators, rng)
        backbone, crowd = _fold(envelope, rng)  # (residues, 4, 3)
        residues = rng.choice(len(AMINO_ACIDS), len(backbone), p=_frequencies())
        atoms = 4 * len(residues) + _side_chain_lengths()[residues].sum()
        everywhere = np.einsum("gij,nj->gni", operators, backbone.reshape(-1, 3)).reshape(-1, 3)
        # side chains stand out some 2 Å beyond the outermost backbone atoms
        off = np.abs((np.ptp(everywhere, axis=0) + 4.0) / extents - 1).max()
        if 8000 <= atoms <= 9200 and off < (0.06 if canonical == "D2" else 0.2):
            break
        volume *= np.clip(8300 / atoms, 0.97, 1.05)
    else:
        raise InputError(f"no phantom of symmetry {canonical} was found for seed {seed}; give another seed")
    xyz, weights = _side_chains(backbone, residues, crowd, rng)
    xyz = np.einsum("gij,nj->gni", operators, xyz).reshape(-1, 3)
    weights = np.tile(weights, len(operators))
    return xyz - (weights[:, None] * xyz).sum(0) / weights.sum(), weights


def _extents(symmetry: str, order: int) -> np.ndarray:
    """Extents along x, y, z in Å that give the molecule its volume at the usual fill."""
    if symmetry in ("C1", "C2", "D2"):
        aspect = np.array([181.0, 136.0, 92.0])
    elif symmetry[0] in "CD":
        aspect = np.array([1.0, 1.0, 0.75])
    else:
        aspect = np.ones(3)
    return aspect * (order * VOLUME_PER_UNIT / FILL / aspect.prod()) ** (1 / 3)


# -- the envelope and its domains ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Envelope:
    """Where the molecule is: an ellipsoid with rugged surface, {x : level(x) > threshold}, cut into domains."""

    half_axes: np.ndarray  # (3,) Å
    waves: np.ndarray  # (m, 3) rad/Å
    phases: np.ndarray  # (m,)
    operators: np.ndarray
    threshold: float
    seeds: np.ndarray  # (DOMAINS, 3) centres of the domains of one asymmetric unit

    @classmethod
    def random(
        cls, half_axes: np.ndarray, volume: float, operators: np.ndarray, rng: np.random.Generator
    ) -> "_Envelope":
        """An envelope of this volume (Å³) with evenly sized domains."""
        directions = rng.normal(size=(RIPPLES, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        waves = directions * (2 * np.pi / rng.uniform(35.0, 70.0, (RIPPLES, 1)))
        phases = rng.uniform(0, 2 * np.pi, RIPPLES)
        blank = cls(half_axes, waves, phases, operators, 0.0, np.zeros((DOMAINS, 3)))
        points = rng.uniform(-1, 1, (20_000, 3)) * half_axes
        level = blank.level(points)
        threshold = float(np.quantile(level, 1 - min(volume / np.prod(2 * half_axes), 0.5)))
        seeds = _spread_seeds(points[level > threshold], operators, rng)
        return cls(half_axes, waves, phases, operators, threshold, seeds)

    def level(self, x: np.ndarray) -> np.ndarray:
        """`(n,)`: falls from 1 at the centre to 0 on the ellipsoid, with ripples of 35–70 Å; −∞ beyond."""
        ripples = np.zeros(len(x))
        for operator in self.operators:  # averaged, so that the point group holds
            ripples += np.cos(np.einsum("ni,mi->nm", x, self.waves @ operator) + self.phases).sum(1)
        radius2 = ((x / self.half_axes) ** 2).sum(1)
        return np.where(radius2 < 1, 1 - radius2 + RUGGEDNESS * ripples / np.sqrt(len(self.operators)), -np.inf)

    @cached_property
    def centres(self) -> np.ndarray:
        """`(g * DOMAINS, 3)` centres of all domains; the first DOMAINS are the seeds (the identity is first)."""
        return np.einsum("gij,nj->gni", self.operators, self.seeds).reshape(-1, 3)

    def inside(self, x: np.ndarray, domain: int) -> np.ndarray:
        """`(n,)` bool: inside the envelope and the domain's Voronoi cell, 2.4 Å clear of its walls."""
        centre = self.centres[domain]
        others = np.delete(self.centres, domain, axis=0)
        others = others[np.linalg.norm(others - centre, axis=1) < 110.0]  # further ones cut no 55 Å ball
        apart = np.linalg.norm(others - centre, axis=1)
        to_wall = ((x[:, None] - others) ** 2).sum(2) - ((x - centre) ** 2).sum(1)[:, None]
        clear = np.ones(len(x), bool) if len(others) == 0 else (to_wall / (2 * apart)).min(1) > 2.4
        clear[clear] = self.level(x[clear]) > self.threshold
        return clear


def _spread_seeds(points: np.ndarray, operators: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`(DOMAINS, 3)` domain centres whose Voronoi cells, symmetry mates included, share the points evenly."""

    def nearest_mate(x: np.ndarray) -> np.ndarray:
        mates = (np.einsum("ij,nj->ni", g, x) for g in operators[1:])
        return np.min([np.linalg.norm(x - mate, axis=1) for mate in mates], axis=0, initial=np.inf)

    room = nearest_mate(points)
    seeds: list[np.ndarray] = []
    for _ in range(DOMAINS):
        # the first candidate with room for a domain around it, else the one with most
        seeds.append(points[np.argmax(np.minimum(room, 30.0))])
        for g in operators:
            room = np.minimum(room, np.linalg.norm(points - g @ seeds[-1], axis=1))
    centres = np.array(seeds)
    for _ in range(12):
        images = np.einsum("gij,nj->gni", operators, centres).reshape(-1, 3)
        owner = np.argmin((images**2).sum(1) - 2 * np.einsum("ni,mi->nm", points, images), axis=1)
        # bring every point to the asymmetric unit of its owner: x = g y, so y = gᵀ x
        home = np.einsum("nji,nj->ni", operators[owner // DOMAINS], points)
        for domain in range(DOMAINS):
            centres[domain] = home[owner % DOMAINS == domain].mean(0)
    return centres


# -- the chains ----------------------------------------------------------------------------------------------------


def _fold(envelope: _Envelope, rng: np.random.Generator) -> tuple[np.ndarray, "_Crowd"]:
    """Backbone of one asymmetric unit, `(residues, 4, 3)` N, CA, C, O, one chain a domain, and how it fills space."""
    helix, strand = _repeat(-57.0, -47.0), _repeat(-139.0, 135.0)
    chains: list[list[np.ndarray]] = []
    for domain in range(DOMAINS):
        chains.append([])
        for start, along, normal, length, is_helix in _elements(envelope, domain, rng):
            residue, rise, turn = helix if is_helix else strand
            n = max(3, int(length / rise) + 1)
            # residues of a strand point up and down alternately, at right angles to their sheet
            spin = rng.uniform(0, 2 * np.pi) if is_helix else np.pi * rng.integers(2) - turn * (n - 1) / 2
            frame = np.stack([np.cross(normal, along), normal, along], axis=1)  # columns: local x, y, z
            chains[-1].append(start + _along_axis(residue, rise, turn, n, spin) @ frame.T)
    pieces = [element for chain in chains for element in chain]
    crowd = _Crowd(np.concatenate(pieces).reshape(-1, 3), envelope.operators)
    for chain in chains:
        for element, following in pairwise(chain):
            pieces.append(_loop(element, following, crowd, rng))
            crowd.add(pieces[-1].reshape(-1, 3))
    return np.concatenate(pieces), crowd


def _elements(
    envelope: _Envelope, domain: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, float, bool]]:
    """A domain's secondary structure in chain order: start, direction, sheet normal, length (Å), helix or strand.

    Parallel elements lie in layers, each layer turned against the next as packed helices and sheets are; the
    chain runs to and fro through a layer, then back through the next.
    """
    centre = envelope.seeds[domain]
    frame, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    reach, step = 55.0, 1.0
    s = np.arange(-reach, reach, step)
    found = []
    for layer in range(-5, 6):
        is_helix = bool(rng.random() < HELICES)
        spacing = 9.6 if is_helix else 4.8
        angle = layer * LAYER_TWIST + rng.normal() * 0.1
        along = np.cos(angle) * frame[0] + np.sin(angle) * frame[1]
        across = -np.sin(angle) * frame[0] + np.cos(angle) * frame[1]
        shift = rng.normal() * 0.9
        lines = []
        for u in np.arange(-reach, reach, spacing) + rng.uniform(0, spacing):
            u += rng.normal() * (0.8 if is_helix else 0.15)
            height = layer * LAYER + shift + rng.normal() * (0.8 if is_helix else 0.4)
            # helices are packed less parallel than the strands of a sheet
            direction = along + rng.normal(size=2) * (0.12 if is_helix else 0.02) @ np.array([across, frame[2]])
            direction /= np.linalg.norm(direction)
            x = centre + s[:, None] * direction + u * across + height * frame[2]
            lines += [(x[a:b], direction) for a, b in _runs(envelope.inside(x, domain))]
        if layer % 2:
            lines.reverse()
        found += [(x, direction, is_helix) for x, direction in lines]
    elements: list[tuple[np.ndarray, np.ndarray, np.ndarray, float, bool]] = []
    for x, along, is_helix in found:
        trim = 3 if is_helix else 2  # room for the loops
        x = x[trim : len(x) - trim]
        if len(x) * step < (7.0 if is_helix else 6.0):
            continue
        if len(elements) % 2:
            x, along = x[::-1], -along
        normal = frame[2] - (frame[2] @ along) * along
        elements.append((x[0], along, normal / np.linalg.norm(normal), len(x) * step, is_helix))
    return elements


def _runs(inside: np.ndarray) -> list[tuple[int, int]]:
    """First and end index of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inside.astype(np.int8), [0]])))
    return list(zip(edges[::2], edges[1::2], strict=True))


def _repeat(phi: float, psi: float) -> tuple[np.ndarray, float, float]:
    """Backbone of one residue of a regular chain about the z axis: `(4, 3)` Å, rise (Å) and turn (rad) a residue.

    The chain is built from standard bond lengths and angles (Engh & Huber 1991) with trans peptides; the screw
    motion that takes one residue to the next gives the axis. CA is at angle 0.
    """
    atoms = [np.array([0.0, 0.0, 0.0]), np.array([1.458, 0.0, 0.0]), np.array([2.004, 1.424, 0.0])]
    for _ in range(2):
        atoms.append(_extend(atoms[-3:], 1.329, 116.6, psi))  # N
        atoms.append(_extend(atoms[-3:], 1.458, 121.7, 180.0))  # CA
        atoms.append(_extend(atoms[-3:], 1.525, 111.0, phi))  # C
    oxygen = _extend(atoms[:3], 1.231, 120.1, psi + 180.0)
    frames = [_frame(atoms[i], atoms[i + 1], atoms[i + 2]) for i in (0, 3)]
    rotation = frames[1] @ frames[0].T
    shift = atoms[4] - rotation @ atoms[1]  # CA to CA
    turn = np.arccos(np.clip((np.trace(rotation) - 1) / 2, -1, 1))
    axis = np.linalg.eigh((rotation + rotation.T) / 2)[1][:, -1]  # the eigenvector of eigenvalue 1
    axis = axis if axis @ shift > 0 else -axis
    skew = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    turn = float(turn if skew @ axis >= 0 else -turn)
    # a point of the axis moves along it only: (1 - R) p = shift - (shift . axis) axis
    rise = float(axis @ shift)
    point = np.linalg.lstsq(np.eye(3) - rotation, shift - rise * axis, rcond=None)[0]
    radial = atoms[1] - point
    radial -= (radial @ axis) * axis
    local_x = radial / np.linalg.norm(radial)
    basis = np.stack([local_x, np.cross(axis, local_x), axis])
    residue = np.array([atoms[0], atoms[1], atoms[2], oxygen])
    return (residue - point) @ basis.T - [0, 0, (atoms[1] - point) @ axis], rise, turn


def _along_axis(residue: np.ndarray, rise: float, turn: float, n: int, spin: float) -> np.ndarray:
    """`(n, 4, 3)` residues along +z from the origin; the first CA at angle `spin` from +y (a sheet's normal)."""
    angle = np.pi / 2 + spin + turn * np.arange(n)
    c, s, zero = np.cos(angle), np.sin(angle), np.zeros(n)
    rotations = np.stack([c, -s, zero, s, c, zero, zero, zero, zero + 1], axis=1).reshape(n, 3, 3)
    out = np.einsum("nij,aj->nai", rotations, residue)
    out[:, :, 2] += rise * np.arange(n)[:, None]
    return out


def _loop(element: np.ndarray, following: np.ndarray, crowd: "_Crowd", rng: np.random.Generator) -> np.ndarray:
    """`(m, 4, 3)` residues that join an element's end to the next one's start on the emptiest of 32 curved ways.

    m is 0 for elements too far apart: there the chain is broken, as where a crystal shows no loop.
    """
    first, last = element[-1, 1], following[0, 1]
    if np.linalg.norm(last - first) > 28.0:
        return np.empty((0, 4, 3))
    out, back = first - element[-3, 1], last - following[2, 1]
    out, back = out / np.linalg.norm(out), back / np.linalg.norm(back)
    t = np.linspace(0, 1, 101)[:, None]
    best, least = np.empty((0, 3)), np.inf
    for _ in range(32):
        height = rng.uniform(4.0, 14.0, (2, 1))
        a, b = np.array([first, last]) + height * [out, back] + rng.normal(size=(2, 3)) * 3.0
        curve = (1 - t) ** 3 * first + 3 * t * (1 - t) ** 2 * a + 3 * t**2 * (1 - t) * b + t**3 * last
        length = np.concatenate([[0.0], np.linalg.norm(np.diff(curve, axis=0), axis=1).cumsum()])
        m = max(1, round(length[-1] / 3.8) - 1)
        at = np.linspace(0, length[-1], m + 2)
        alpha = np.stack([np.interp(at, length, curve[:, i]) for i in range(3)], axis=1)
        crowding = crowd.at(alpha[1:-1]).mean() + 0.02 * m
        if crowding < least:
            best, least = alpha, crowding
    # atoms of a trans peptide in the plane of two CA 3.8 Å apart, the plane turned at random
    step = np.diff(best, axis=0)
    size = np.linalg.norm(step, axis=1, keepdims=True)
    ahead = step / size
    side = np.cross(ahead, rng.normal(size=ahead.shape))
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    carbon = best[:-1] + 0.374 * size * ahead + 0.54 * side
    oxygen = best[:-1] + 0.44 * size * ahead + 1.75 * side
    nitrogen = best[:-1] + 0.63 * size * ahead - 0.38 * side
    return np.stack([nitrogen[:-1], best[1:-1], carbon[1:], oxygen[1:]], axis=1)


def _extend(atoms: list[np.ndarray], bond: float, angle: float, dihedral: float) -> np.ndarray:
    """The atom bound to the last of three, at a bond length (Å), bond angle and dihedral (degrees)."""
    angle, dihedral = np.deg2rad(angle), np.deg2rad(dihedral)
    a, b, c = atoms
    forward = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, forward)
    normal /= np.linalg.norm(normal)
    up = np.cross(normal, forward)
    direction = -np.cos(angle) * forward + np.sin(angle) * (np.cos(dihedral) * up + np.sin(dihedral) * normal)
    return c + bond * direction


def _frame(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Orthonormal columns fixed to three atoms."""
    x = (b - a) / np.linalg.norm(b - a)
    z = np.cross(x, c - b)
    z /= np.linalg.norm(z)
    return np.stack([x, np.cross(z, x), z], axis=1)


# -- side chains ---------------------------------------------------------------------------------------------------


def _frequencies() -> np.ndarray:
    p = np.array([entry[0] for entry in AMINO_ACIDS.values()])
    return p / p.sum()


def _side_chain_lengths() -> np.ndarray:
    return np.array([len(entry[1]) for entry in AMINO_ACIDS.values()])


def _side_chains(
    backbone: np.ndarray, residues: np.ndarray, crowd: "_Crowd", rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """All atoms of one asymmetric unit, `(n, 3)` and weights `(n,)`: the backbone and what grows from it.

    Atom by atom, each of 32 ways on the cone of the bond angle is looked up in a map of how crowded space is
    (symmetry mates included), and the least crowded is taken.
    """
    elements = [entry[1] for entry in AMINO_ACIDS.values()]
    parents = [entry[2] for entry in AMINO_ACIDS.values()]
    length = _side_chain_lengths()[residues]
    n_atom, ca, c = backbone[:, 0], backbone[:, 1], backbone[:, 2]
    grown = np.full((len(residues), length.max(), 3), np.nan)
    # CB stands tetrahedrally to N and C, on the side of L amino acids
    bisector = 2 * ca - n_atom - c
    bisector /= np.linalg.norm(bisector, axis=1, keepdims=True)
    plane = np.cross(n_atom - ca, c - ca)
    plane /= np.linalg.norm(plane, axis=1, keepdims=True)
    grown[:, 0] = ca + 1.53 * (0.577 * bisector + 0.816 * plane)

    crowd.add(grown[length > 0, 0])
    for k in range(1, grown.shape[1]):
        for batch in np.array_split(rng.permutation(np.flatnonzero(length > k)), 16):
            if len(batch) == 0:
                continue
            parent = np.array([int(parents[residue][k - 1]) for residue in residues[batch]])
            # what the parent is bound to: CA for CB
            before = np.array([int(("0" + parents[r])[p]) for r, p in zip(residues[batch], parent, strict=True)])
            root = grown[batch, parent]
            forward = root - np.where((parent == 0)[:, None], ca[batch], grown[batch, before])
            forward /= np.linalg.norm(forward, axis=1, keepdims=True)
            ways = np.cross(forward[:, None], rng.normal(size=(len(batch), 32, 3)))
            ways /= np.linalg.norm(ways, axis=2, keepdims=True)
            candidates = root[:, None] + 1.52 * (0.36 * forward[:, None] + 0.933 * ways)  # bond angle 111°
            crowding = crowd.at(candidates.reshape(-1, 3)).reshape(len(batch), 32)
            new = candidates[np.arange(len(batch)), crowding.argmin(1)]
            grown[batch, k] = new
            crowd.add(new)
    there = np.arange(grown.shape[1]) < length[:, None]
    weights = [ATOMIC_NUMBER[e] for residue in residues for e in elements[residue]]
    xyz = np.concatenate([backbone.reshape(-1, 3), grown[there]])
    return xyz, np.array([ATOMIC_NUMBER[e] for e in BACKBONE] * len(residues) + weights)


class _Crowd:
    """How crowded space is around an asymmetric unit: a map of 1 Å, each atom and symmetry mate a Gaussian of 1.6 Å."""

    def __init__(self, xyz: np.ndarray, operators: np.ndarray) -> None:
        self.operators = operators
        self.corner = np.floor(xyz.min(0)) - 24.0
        self.shape = tuple((np.ceil(xyz.max(0)) + 25.0 - self.corner).astype(int))
        self.map = np.zeros(self.shape).reshape(-1)
        axis = np.arange(-4, 5)
        cells = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
        cells = cells[(cells**2).sum(1) <= 16]
        self.stencil = cells @ [self.shape[1] * self.shape[2], self.shape[2], 1]
        self.kernel = np.exp(-(cells**2).sum(1) / (2 * 1.6**2))
        self.add(xyz)

    def _cell(self, xyz: np.ndarray) -> np.ndarray:
        return np.rint(xyz - self.corner).astype(np.int64)

    def add(self, xyz: np.ndarray) -> None:
        """Put atoms there, and their mates where they fall on the map."""
        cell = self._cell(np.einsum("gij,nj->gni", self.operators, xyz).reshape(-1, 3))
        cell = cell[((cell >= 4) & (cell < np.array(self.shape) - 4)).all(1)]
        flat = np.ravel_multi_index(cell.T, self.shape)
        index = (flat[:, None] + self.stencil).reshape(-1)
        self.map += np.bincount(index, np.tile(self.kernel, len(flat)), self.map.size)

    def at(self, xyz: np.ndarray) -> np.ndarray:
        """`(n,)` crowding at points within 20 Å of the first atoms."""
        return self.map[np.ravel_multi_index(self._cell(xyz).T, self.shape)]
