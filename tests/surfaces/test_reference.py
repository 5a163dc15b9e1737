"""The reference of the site is that of today's code."""

import json
import re
from pathlib import Path

import jsonschema

import peft_posthoc
from docs import report_schema

REFERENCE = Path(__file__).parents[2] / "docs/reference"
SCHEMA = REFERENCE / "report.schema.json"


def test_every_public_name_is_in_it():
    page = (REFERENCE / "python.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: peft_posthoc\.(\w+)$", page, re.MULTILINE)) == sorted(peft_posthoc.__all__)


def test_the_schema_is_made_from_the_code():
    assert SCHEMA.read_text(encoding="utf-8") == report_schema.page(), (
        "python -m docs.make reference/report.schema.json"
    )


def test_a_report_is_what_the_schema_says(llama_pair, tmp_path):
    peft_posthoc.extract(*llama_pair, 4).save(tmp_path / "adapter")
    schema = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    report = json.loads((tmp_path / "adapter/phlora_report.json").read_text(encoding="utf-8"))
    schema.validate(report)
    assert not schema.is_valid(report | {"format": 2})
    assert not schema.is_valid(report | {"rows": [row | {"status": "lost"} for row in report["rows"]]})
