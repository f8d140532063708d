"""Fixtures and settings that all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contract_lane import CONTRACT
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("repeatable")


TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Mark the tests of the contract lane."""
    for item in items:
        if item.path.relative_to(TESTS).as_posix() in CONTRACT:
            item.add_marker(pytest.mark.contract)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device that this machine has."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)
