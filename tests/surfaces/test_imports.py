import subprocess
import sys

import pytest

PROBE = "import sys; {code}; print(*sorted({{'peft', 'transformers', 'mergekit', 'matplotlib'}} & set(sys.modules)))"


def loaded_by(code):
    run = subprocess.run([sys.executable, "-c", PROBE.format(code=code)], capture_output=True, text=True, check=True)
    return run.stdout.split()


@pytest.mark.parametrize(
    "code", ["import peft_posthoc", "import peft_posthoc.cli.main", "import mergekit_plugin, hf_callbacks"]
)
def test_importing_the_library_loads_no_host(code):
    assert loaded_by(code) == []


def test_the_probe_can_see_an_import():
    assert "peft" in loaded_by("from peft_posthoc import LoraConfig")


def test_functions_are_not_shadowed_by_the_modules_they_live_in():
    import peft_posthoc.cli.main
    import peft_posthoc.extraction.extract
    import peft_posthoc.verification.verify

    assert callable(peft_posthoc.extract)
    assert callable(peft_posthoc.verify)


def test_every_public_name_exists():
    import peft_posthoc

    assert [name for name in peft_posthoc.__all__ if getattr(peft_posthoc, name, None) is None] == []
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        peft_posthoc.nonsense  # noqa: B018
