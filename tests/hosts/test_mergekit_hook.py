"""`phlora mergekit enable` in environments of their own: with everything, without us, without mergekit."""

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from mergekit_plugin.autoload import MODULE
from tests.make import mergekit_runs

HERE = Path(__file__).parents[2]
LIBRARIES = sysconfig.get_path("purelib")
SUFFIXES = {".py", ".pth", ".start"}


class Environment:
    """A virtual environment that sees these folders beside its own."""

    def __init__(self, folder, *beside):
        venv.create(folder, with_pip=False)
        self.folder, self.python = folder, folder / "bin/python"
        self.packages = Path(self("import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        (self.packages / "beside.pth").write_text("\n".join(map(str, beside)))

    def __call__(self, *arguments, **how):
        flags = ["-c"] if len(arguments) == 1 else []
        how = {"cwd": self.folder, **how}  # not in the repository, which would be found there
        return subprocess.run([self.python, *flags, *arguments], capture_output=True, text=True, check=False, **how)

    def ours(self):
        return {path.suffix: path for path in self.packages.glob(f"{MODULE}.*")}

    def phlora(self, *arguments):
        return self("-m", "peft_posthoc", "mergekit", *arguments)


@pytest.fixture(scope="module")
def enabled(tmp_path_factory):
    """An environment with everything, in which `enable` was run."""
    environment = Environment(tmp_path_factory.mktemp("enabled") / "venv", HERE, LIBRARIES)
    ran = environment.phlora("enable")
    assert ran.returncode == 0, ran.stderr
    assert environment.ours().keys() == SUFFIXES
    return environment


def test_mergekits_own_commands_take_the_method_once_enabled(enabled, llama_pair, tmp_path):
    (tmp_path / "config.yml").write_text(yaml.safe_dump(mergekit_runs.config(*llama_pair, parameters={"rank": 8})))
    ran = enabled("-m", "mergekit.scripts.run_yaml", "config.yml", "out", "--quiet", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    got, wanted = mergekit_runs.tensors(tmp_path / "out"), mergekit_runs.expected(*llama_pair, 8)
    assert all((got[name] == wanted[name]).all() for name in wanted)
    # And a misspelt parameter is seen there too.
    (tmp_path / "config.yml").write_text(yaml.safe_dump(mergekit_runs.config(*llama_pair, parameters={"rnk": 8})))
    ran = enabled("-m", "mergekit.scripts.run_yaml", "config.yml", "again", "--quiet", cwd=tmp_path)
    assert ran.returncode != 0
    assert "no parameter `rnk`" in ran.stderr.splitlines()[-1]


def test_status_and_disable(tmp_path):
    environment = Environment(tmp_path / "venv", HERE, LIBRARIES)
    assert environment.phlora("status").stdout.startswith("disabled")
    environment.phlora("enable")
    environment.phlora("enable")
    assert environment.phlora("status").stdout.startswith("enabled")
    environment.phlora("disable")
    assert not environment.ours()
    assert environment.phlora("status").stdout.startswith("disabled")
    assert environment.phlora("disable").returncode == 0


def test_starting_python_costs_one_small_module(enabled, tmp_path):
    loaded = "import sys; print(sorted(sys.modules))"
    bare = Environment(tmp_path / "venv", HERE, LIBRARIES)
    before, after = (set(eval(one(loaded).stdout)) for one in (bare, enabled))
    assert after - before == {MODULE}


@pytest.mark.parametrize("beside", [[], [LIBRARIES]], ids=["nothing else", "mergekit without us"])
def test_an_interpreter_without_the_rest_is_as_it_was(beside, enabled, tmp_path):
    environment = Environment(tmp_path / "venv", *beside)
    for path in enabled.ours().values():
        (environment.packages / path.name).write_bytes(path.read_bytes())
    start = environment("print('here')")
    assert (start.returncode, start.stdout, start.stderr) == (0, "here\n", "")
    run = environment("import mergekit.merge_methods as m; print(len(m.registered_methods())); m.get('phlora')")
    assert run.stdout == ("" if not beside else f"{stock_methods()}\n")
    assert run.stderr.splitlines()[-1] == (
        "RuntimeError: Unimplemented merge method phlora"
        if beside
        else "ModuleNotFoundError: No module named 'mergekit'"
    )


def stock_methods():
    from mergekit.merge_methods import registered_methods

    return sum(method.spec.name != "phlora" for method in registered_methods())


def test_another_mergekit_than_ours_goes_on_with_its_own_methods(enabled, tmp_path):
    package = tmp_path / "mergekit/merge_methods"
    package.mkdir(parents=True)
    (tmp_path / "mergekit/__init__.py").touch()
    (package / "__init__.py").write_text("mine = 1")
    ran = enabled(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mergekit.merge_methods as m; print(m.mine)"
    )
    assert ran.stdout == "1\n"
    assert "could not be registered" in ran.stderr


def test_a_folder_that_cannot_be_written_is_told_in_a_line(monkeypatch, tmp_path):
    from click.testing import CliRunner

    from peft_posthoc.cli import main as cli

    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    result = CliRunner().invoke(cli.main, ["mergekit", "enable"])
    assert result.exit_code == 1
    assert result.stderr.startswith("phlora: error: `" + str(tmp_path / "nowhere"))
    assert "could not be written: No such file" in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_cannot_be_written_again_stays_as_it_is(monkeypatch, tmp_path):
    from click.testing import CliRunner

    from peft_posthoc.cli import main as cli

    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert CliRunner().invoke(cli.main, ["mergekit", "enable"]).exit_code == 0
    move, before = os.replace, {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(made, target):
        if Path(target).suffix == ".pth":
            raise PermissionError(13, "Permission denied")
        move(made, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert CliRunner().invoke(cli.main, ["mergekit", "enable"]).exit_code == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_mergekit_the_command_says_what_to_install(tmp_path):
    start = (
        "import runpy, sys; sys.modules['mergekit'] = None; runpy.run_module('mergekit_plugin', run_name='__main__')"
    )
    ran = mergekit_runs.run("-c", start, cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr == (
        "mergekit-phlora: error: mergekit is not installed. Use `pip install 'peft-posthoc[mergekit]'`.\n"
    )


def test_the_entry_point_that_mergekit_may_look_for_one_day_is_the_method():
    from importlib import metadata

    from mergekit_plugin.method import PHLORA

    (point,) = metadata.entry_points(group="mergekit.merge_methods")
    assert point.load() is PHLORA
