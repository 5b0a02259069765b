"""Where files are looked for."""

import pytest

from torchem.data.files import find
from torchem.errors import InputError


@pytest.fixture
def project(tmp_path, monkeypatch):
    for folder in ("project/job/deep", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "project"


def test_root_alone_if_given(project):
    (project / "a.mrcs").touch()
    (project.parent / "elsewhere" / "a.mrcs").touch()
    assert find("a.mrcs", root=project) == project / "a.mrcs"
    with pytest.raises(InputError, match=r"dataset\.root"):
        find("a.mrcs", root=project / "job", beside=project)


def test_current_folder_then_upwards(project):
    (project / "a.mrcs").touch()
    assert find("a.mrcs", beside=project / "job/deep") == project / "a.mrcs"
    (project / "job/deep/a.mrcs").touch()
    assert find("a.mrcs", beside=project / "job/deep") == project / "job/deep/a.mrcs"
    here = project.parent / "elsewhere" / "a.mrcs"
    here.touch()
    assert find("a.mrcs", beside=project / "job/deep") == here
    assert find(project / "a.mrcs") == project / "a.mrcs"


def test_the_error_lists_every_place(project):
    with pytest.raises(InputError) as error:
        find("Extract/a.mrcs", beside=project / "job", where="p.star")
    message = str(error.value)
    assert message.startswith("p.star: file Extract/a.mrcs not found")
    for place in (project.parent / "elsewhere", project / "job", project, project.parent):
        assert str(place / "Extract/a.mrcs") in message
    with pytest.raises(InputError, match="check the path"):
        find(project / "none.mrcs")
