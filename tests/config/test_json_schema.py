"""What editors and other checkers are told of quotas.yaml is what the proxy reads."""

import json
from pathlib import Path

from proxy.config import fields
from proxy.config.json_schema import json_schema

ROOT = Path(__file__).resolve().parents[2]


def test_the_json_schema_in_config_is_the_one_that_is_printed():
    """Mend it with: python -m proxy schema > config/quotas.schema.json."""
    assert (ROOT / "config" / "quotas.schema.json").read_text(encoding="utf-8") == json_schema()


def test_the_json_schema_refuses_what_the_file_refuses():
    """Unknown keys, names that are none, and null but for the admin listener and what is kept for ever."""
    whole = json.loads(json_schema())
    assert whole["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert whole["required"] == ["upstreams"]
    assert whole["$defs"]["Quota"]["required"] == ["per"]
    assert all(part["additionalProperties"] is False for part in (whole, *whole["$defs"].values()))
    assert whole["properties"]["groups"]["additionalProperties"] is False
    assert list(whole["properties"]["groups"]["patternProperties"]) == [fields.scalars.NAME.pattern]
    assert json_schema().count('"null"') == 3
    assert [whole["$defs"]["Keep"]["properties"][name]["type"] for name in ("calls", "days")] == [
        ["string", "null"]
    ] * 2
    assert whole["$defs"]["Server"]["properties"]["admin"]["type"] == ["string", "null"]
    assert "title" not in json_schema()
