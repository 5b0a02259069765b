"""cryoSPARC's files: the twin of a RELION file, poses, passthrough."""

import numpy as np
import pytest
import torch

from torchem.data.mrc import write_stack
from torchem.data.particles import Particles
from torchem.errors import InputError
from torchem.imaging.symmetry import rotation_matrix

PATH = "S40"


def records(n, **columns):
    """A structured array as cryoSPARC saves it."""
    columns = {"uid": np.arange(100, 100 + n, dtype=np.uint64) + (1 << 63), **columns}
    dtype = [(name, values.dtype, values.shape[1:]) for name, values in columns.items()]
    array = np.zeros(n, dtype)
    for name, values in columns.items():
        array[name] = values
    return array


def save(path, array):
    with path.open("wb") as file:  # np.save by name would add .npy
        np.save(file, array)


def blob(n, sign=-1):
    return {
        "blob/path": np.array([b">J1/extract/a.mrc"] * n, PATH),
        "blob/idx": np.arange(n, dtype=np.uint32)[::-1],
        "blob/shape": np.full((n, 2), 8, np.uint32),
        "blob/psize_A": np.full(n, 1.5, np.float32),
        "blob/sign": np.full(n, sign, np.float32),
    }


def ctf(n):
    return {
        "ctf/exp_group_id": np.arange(n, dtype=np.uint32) % 2,
        "ctf/accel_kv": np.full(n, 300, np.float32),
        "ctf/cs_mm": np.full(n, 2.7, np.float32),
        "ctf/amp_contrast": np.full(n, 0.1, np.float32),
        "ctf/df1_A": np.linspace(1e4, 2e4, n, dtype=np.float32),
        "ctf/df2_A": np.linspace(1e4, 2e4, n, dtype=np.float32) - 100,
        "ctf/df_angle_rad": np.full(n, np.pi / 6, np.float32),
        "ctf/phase_shift_rad": np.full(n, np.pi / 2, np.float32),
        "ctf/tilt_A": np.tile(np.array([2.7e4, -2.7e4], np.float32), (n, 1)),
    }


def pose(n):
    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(n, 3)).astype(np.float32)
    vectors[0] = 0
    return {
        "alignments3D/pose": vectors,
        "alignments3D/shift": rng.normal(size=(n, 2)).astype(np.float32),
        "alignments3D/psize_A": np.full(n, 3.0, np.float32),
        "alignments3D/split": (np.arange(n) % 2).astype(np.uint32),
    }


@pytest.fixture
def project(tmp_path):
    (tmp_path / "J1/extract").mkdir(parents=True)
    (tmp_path / "J2").mkdir()
    stack = np.random.default_rng(5).normal(size=(6, 8, 8)).astype(np.float32)
    write_stack(tmp_path / "J1/extract/a.mrc", stack, 1.5)
    return tmp_path, stack


def test_pair_with_relion(shared):
    folder = shared / "data/metadata/cryosparc_and_relion_pair"
    sparc = Particles.read(folder / "empiar_10076_7.cs")
    star = Particles.read(folder / "empiar_10076_7.star")
    np.testing.assert_allclose(sparc.ctf_parameters, star.ctf_parameters, rtol=1e-6)
    for name in ("voltage", "cs", "amplitude_contrast", "pixel_size", "box", "beam_tilt"):
        assert getattr(sparc.optics[0], name) == pytest.approx(getattr(star.optics[0], name), rel=1e-6), name
    # blob/sign is -1 here: bright on dark only from the .cs file
    np.testing.assert_array_equal(sparc.images([0, 6]), -star.images([0, 6]))
    assert not sparc.has_poses and sparc.random_subset is None
    sparc.check(particle_diameter=300.0)


def test_columns_of_a_refinement(project):
    folder, stack = project
    n = 6
    save(folder / "J2/r.cs", records(n, **blob(n), **ctf(n), **pose(n)))
    particles = Particles.read(folder / "J2/r.cs")
    particles.check()
    assert particles.table["rlnImageName"].iloc[0] == "000006@J1/extract/a.mrc"
    np.testing.assert_array_equal(particles.images(range(n)), -stack[::-1])
    np.testing.assert_allclose(particles.origin_angst, pose(n)["alignments3D/shift"] * 3.0, rtol=1e-6)
    assert particles.random_subset.tolist() == [1, 2] * 3
    np.testing.assert_allclose(particles.ctf_parameters[:, 2:4], [[30, 90]] * n, rtol=1e-6)
    # two exposure groups; Cs 2.7 mm · sin(1 mrad) = 2.7e4 Å
    assert len(particles.optics) == 2 and particles.optics_group.tolist() == [0, 1] * 3
    assert particles.optics[0].beam_tilt == pytest.approx((1.0, -1.0), rel=1e-4)
    assert particles.optics[0].amplitude_contrast == 0.1


def test_pose_is_the_rotation_vector_of_the_transposed_euler_matrix(project):
    folder, _ = project
    n = 6
    save(folder / "J2/r.cs", records(n, **blob(n), **pose(n)))
    particles = Particles.read(folder / "J2/r.cs")
    matrices = rotation_matrix(*torch.from_numpy(particles.euler).unbind(1)).numpy()
    for vector, matrix in zip(pose(n)["alignments3D/pose"].astype(np.float64), matrices, strict=True):
        # A v = v, and for w across v: Aᵀ w = cos t w + sin t (v × w)/t
        np.testing.assert_allclose(matrix @ vector, vector, atol=1e-6)
        angle = np.linalg.norm(vector)
        across = np.cross(vector, [0.3, -0.2, 0.9])
        turned = np.cos(angle) * across + np.sin(angle) * np.cross(vector, across) / max(angle, 1e-30)
        np.testing.assert_allclose(matrix.T @ across, turned, atol=1e-6)


def test_passthrough_is_joined_by_uid(project):
    folder, _ = project
    n = 6
    micrographs = np.array([f">J1/mic{k}.mrc".encode() for k in range(n + 2)], PATH)
    save(folder / "J2/p.cs", records(n, **pose(n)))
    passthrough = records(n + 2, **blob(n + 2), **ctf(n + 2), **{"location/micrograph_path": micrographs})
    save(folder / "J2/J2_passthrough_particles_other.cs", passthrough[:2])  # not all of them: no use
    save(folder / "J2/J2_passthrough_particles.cs", passthrough[::-1])
    particles = Particles.read(folder / "J2/p.cs")
    assert particles.table["rlnMicrographName"].tolist() == [f"J1/mic{k}.mrc" for k in range(n)]
    np.testing.assert_allclose(particles.table["rlnDefocusU"], ctf(n + 2)["ctf/df1_A"][:n], rtol=1e-7)
    assert particles.has_poses


def test_sign_survives_writing(project, monkeypatch):
    folder, stack = project
    save(folder / "J2/r.cs", records(6, **blob(6), **ctf(6)))
    Particles.read(folder / "J2/r.cs").write(folder / "out.star")
    np.testing.assert_array_equal(Particles.read(folder / "out.star").images([5]), -stack[:1])


def test_unusable_files_are_named(project):
    folder, _ = project
    path = folder / "J2/r.cs"
    save(path, records(3, **pose(3)))
    with pytest.raises(InputError, match=r"r\.cs has no blob/path.*passthrough"):
        Particles.read(path)
    path.write_bytes(b"garbage" * 20)
    with pytest.raises(InputError, match=r"r\.cs is no \.cs file"):
        Particles.read(path)
    save(path, np.zeros(3))
    with pytest.raises(InputError, match="no uid"):
        Particles.read(path)
    with pytest.raises(InputError, match=r"cannot read .*none\.cs"):
        Particles.read(folder / "none.cs")
    save(path, records(3, **blob(3)))
    with pytest.raises(InputError, match="no CTF"):
        Particles.read(path).check()


def test_what_is_not_converted_is_said(project, caplog):
    folder, _ = project
    save(folder / "r.cs", records(3, **blob(3), **ctf(3), **{"ctf/trefoil_A": np.ones((3, 2), np.float32)}))
    Particles.read(folder / "r.cs")
    assert "ctf/trefoil_A is not carried over" in caplog.text
