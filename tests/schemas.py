"""Documents held against their types and against the JSON Schemas that are made from those."""

import jsonschema
import msgspec
import pytest

from sepconvert.report.schema.published import json_schema


def assert_conforms(document, kind, schema=None):
    """The schema (by default that of `kind`) admits the document, and the type has all of its keys."""
    jsonschema.validate(document, schema or json_schema(kind))
    restored = msgspec.json.decode(msgspec.json.encode(msgspec.convert(document, kind)))
    assert restored == document


def assert_refused(document, kind, where):
    """Neither the type nor its schema admits the document; the type names the place."""
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, json_schema(kind))
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(document, kind)
    assert where in str(caught.value)
