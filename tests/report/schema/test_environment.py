"""The document of `sepconvert env` as its type describes it, on machines that tell little."""

import pytest
from schemas import assert_conforms, assert_refused

from sepconvert.report.schema.environment import EnvironmentDocument

UNKNOWN = {
    "schema": "sepconvert.environment/1", "sepconvert": "0.1.0", "python": "3.10.0", "platform": "any",
    "cpu": "", "instruction_sets": [], "missing_instruction_sets": [], "cores": 1, "available_cores": 1,
    "clock_mhz": None, "load_average": None, "memory_bytes": 0, "free_memory_bytes": 0, "onnxruntime": None,
    "onnxruntime_error": "absent", "providers": [], "packages": {"torch": None},
}  # fmt: skip


def test_a_machine_of_which_little_is_known():
    assert_conforms(UNKNOWN, EnvironmentDocument)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"cores": 0}, "$.cores"),
        ({"packages": {"torch": 2}}, "$.packages"),
        ({"load_average": -1.0}, "$.load"),
    ],
)
def test_other_documents(change, where):
    assert_refused({**UNKNOWN, **change}, EnvironmentDocument, where)
