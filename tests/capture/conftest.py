import pytest

from .models import Toy


@pytest.fixture
def toy():
    return Toy().eval().requires_grad_(False)
