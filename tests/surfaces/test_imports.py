import subprocess
import sys

import pytest

HEAVY = ["matplotlib", "mergekit", "peft", "torch", "transformers"]
PROBE = "import sys; {code}; print(*sorted(set({heavy}) & set(sys.modules)))"


def loaded_by(code):
    run = subprocess.run(
        [sys.executable, "-c", PROBE.format(code=code, heavy=HEAVY)], capture_output=True, text=True, check=True
    )
    return run.stdout.split()


HELP = "from click.testing import CliRunner; from peft_posthoc.cli.main import main; CliRunner().invoke(main, {})"


@pytest.mark.parametrize(
    "code",
    [
        "import peft_posthoc",
        "import peft_posthoc.cli.main",
        "import mergekit_plugin, hf_callbacks",
        HELP.format(["--help"]),
        *(
            HELP.format([command, "--help"])
            for command in ("extract", "inspect", "verify", "check", "export", "resize")
        ),
    ],
)
def test_importing_the_library_and_asking_for_help_loads_no_host_and_no_tensors(code):
    assert loaded_by(code) == []


def test_public_names_load_tensors_and_no_host():
    assert loaded_by("from peft_posthoc import extract") == ["torch"]


def test_the_probe_can_see_an_import():
    assert {"peft", "torch"} <= set(loaded_by("from peft_posthoc import LoraConfig"))


def test_a_command_takes_what_pytorch_s_import_makes_out_of_every_search_for_garbage():
    told = "import gc, sys; print('torch' in sys.modules, gc.isenabled(), gc.get_freeze_count() > 100_000)"
    run = [sys.executable, "-c", f"{HELP.format(['inspect', 'a', 'b'])}; {told}"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.split() == ["True"] * 3


def test_functions_are_not_shadowed_by_the_modules_they_live_in():
    import peft_posthoc.cli.main
    import peft_posthoc.extraction.extract
    import peft_posthoc.verification.verify

    assert callable(peft_posthoc.extract)
    assert callable(peft_posthoc.verify)


def test_every_public_name_exists():
    import peft_posthoc

    assert [name for name in peft_posthoc.__all__ if getattr(peft_posthoc, name, None) is None] == []
    with pytest.raises(AttributeError, match="nonsense"):
        peft_posthoc.nonsense  # noqa: B018


def test_the_callbacks_have_a_place_under_the_librarys_own_name():
    from hf_callbacks import PosthocLoraCallback
    from peft_posthoc.callbacks import PosthocLoraCallback as same

    assert same is PosthocLoraCallback
