"""A model for tests/completion_server.py."""

from pathlib import Path

import pytest
from completion_server import END, VOCAB, save_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), VOCAB, END)
