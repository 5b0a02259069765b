"""Every configuration composes, gives options within bounds, and says what the documentation says."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchem.commands import check_option_names, to_options
from torchem.em.options import RefineOptions
from torchem.errors import InputError
from torchem.refine import known_options  # the module registers the schema too

ROOT = Path(__file__).resolve().parents[1]
DATASETS = sorted(path.stem for path in (ROOT / "configs" / "dataset").glob("*.yaml"))

# fixed: other programs call the command with them
KEYS = """
dataset.name dataset.star dataset.root dataset.pixel_size dataset.particle_diameter dataset.symmetry
reference.map reference.ini_high reference.mask reference.absolute_greyscale
sampling.healpix_order sampling.offset_range sampling.offset_step sampling.oversampling sampling.adaptive_fraction
sampling.perturb sampling.local_healpix_order sampling.low_resol_join_halves sampling.start_from_poses
sampling.sigma_ang tau2_fudge zero_mask norm scale ctf solvent_correct_fsc max_iterations seed device precision
deterministic distributed.backend resume run_name
""".split()


def options(*overrides: str) -> RefineOptions:
    with initialize_config_module("torchem.configs", version_base="1.3"):
        config = compose("refine", overrides=list(overrides))
    return to_options(RefineOptions, OmegaConf.to_container(config, resolve=True))


def test_defaults_are_those_of_the_dataclasses() -> None:
    assert options() == RefineOptions()


@pytest.mark.parametrize("dataset", DATASETS)
def test_dataset(dataset: str) -> None:
    composed = options(f"+dataset={dataset}")
    composed.check()
    assert composed.dataset.name == dataset
    assert composed.dataset.particle_diameter and composed.dataset.symmetry
    assert composed.dataset.star is None or not Path(composed.dataset.star).is_absolute()


def test_options_override_a_dataset() -> None:
    composed = options("+dataset=betagal", "dataset.symmetry=C1", "dataset.star=mine.star", "reference.ini_high=40")
    assert (composed.dataset.symmetry, composed.dataset.star) == ("C1", "mine.star")
    assert (composed.dataset.particle_diameter, composed.reference.ini_high) == (200, 40)


@pytest.mark.parametrize("key", KEYS)
def test_fixed_key(key: str) -> None:
    check_option_names([f"{key}=1"], known_options(), groups=("dataset",))


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        ([], "outputs/demo/run"),
        (["+dataset=betagal"], "outputs/betagal/run"),
        (["dataset.star=a/mine.star", "run_name=second"], "outputs/mine/second"),
        (["dataset.name=x", "dataset.star=y.star"], "outputs/x/run"),
    ],
)
def test_run_folder_is_named_after_the_run(overrides: list[str], folder: str) -> None:
    with initialize_config_module("torchem.configs", version_base="1.3"):
        config = compose("refine", overrides=overrides, return_hydra_config=True)
    assert config.hydra.run.dir == folder
    assert config.hydra.sweep.dir == folder + "_sweep"


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ("typo=3", "no option typo"),
        ("+typo=3", "no option typo"),
        ("sampling.healpix_ordr=3", "did you mean sampling.healpix_order?"),
        ("healpix_order=3", "did you mean sampling.healpix_order?"),
        ("dataset.diameter=200", "did you mean dataset.particle_diameter?"),
        ("diameter=200", "did you mean dataset.particle_diameter?"),
        ("sym=D2", "did you mean dataset.symmetry?"),
        ("--particle_diameter=200", "written NAME=VALUE, as dataset.particle_diameter=…"),
        ("particles.star", "written NAME=VALUE, without blanks"),
        ("dataset=betagal", r"write \+dataset=betagal"),
        ("dataset.star=my (2).star", """write 'dataset.star="my \\(2\\).star"' with all"""),
        ("dataset.root=a#b", "with all these quotes"),
        ("seed=1,2", "add -m to run one job for each value"),
        ("+dataset=null", r"write \+dataset=NAME"),
        ("dataset.root=it's#1", """write 'dataset.root="it'"'"'s#1"' with all"""),
        ('dataset.root="a', r"""write 'dataset.root="\\"a"' with all"""),
        ("dataset.name=a,b", """write 'dataset.name="a,b"' with all"""),
    ],
)
def test_unknown_option_is_refused(argument: str, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        check_option_names([argument], known_options(), groups=("dataset",))


def test_unknown_option_in_a_file_is_refused() -> None:
    with pytest.raises(OmegaConfBaseException, match="typo"):
        to_options(RefineOptions, {"sampling": {"typo": 3}})


def test_flag_between_options_is_refused() -> None:
    with pytest.raises(InputError, match="-m: write it before or after all options"):
        check_option_names(["seed=1,2", "-m", "run_name=a"], known_options(), groups=("dataset",))


def test_hydra_options_and_flags_are_let_through() -> None:
    for arguments in (
        ["-m", "--cfg", "job"],
        ["hydra.run.dir=/x", "hydra/job_logging=none"],
        ["+dataset=a", "seed=1"],
        ["seed=1,2", "-m"],
        ["--multi", "seed=1,2"],
        ["hydra.mode=MULTIRUN", "seed=1,2"],
        ["seed=1,2", "-m", "--cfg", "job"],
        ['reference.map="my map (2),.mrc"', "dataset.name=null", "~seed"],
    ):
        check_option_names(arguments, known_options(), groups=("dataset",))
