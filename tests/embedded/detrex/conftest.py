import pytest
from recorded_cases import RecordedCases


@pytest.fixture(scope="session")
def layer_cases(reference_dir):
    return RecordedCases(reference_dir / "detrex", "layers")
