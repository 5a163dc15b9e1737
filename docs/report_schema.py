"""The JSON Schema of an extraction's report, made from the dataclasses that it is written from."""

import json

from pydantic import TypeAdapter

from peft_posthoc import Report


def page() -> str:
    """`phlora_report.json` as JSON Schema: the fields of a `Report`, and the number of the format."""
    schema = TypeAdapter(Report).json_schema(mode="serialization")
    schema["properties"] = {"format": {"const": 1}} | schema["properties"]
    schema["required"] = ["format", *schema["properties"].keys() - {"format"}]
    schema["required"].sort()
    return json.dumps(schema, indent=2) + "\n"
