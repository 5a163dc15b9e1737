import pytest

from tests.make.spoiled import forbid_svd, moved, tensors, write


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder that commands run in: a good `base` and a good `tuned`."""
    write(tmp_path / "work" / "base", tensors())
    write(tmp_path / "work" / "tuned", moved(tensors()))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def no_svd(monkeypatch):
    forbid_svd(monkeypatch)
