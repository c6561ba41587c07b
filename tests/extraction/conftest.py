"""A hub on loopback, of which datasets are read."""

from collections.abc import Iterator

import pytest
from hub_server import Hub, serving
from huggingface_hub import constants

from medembed.core import hub_http
from medembed.images.hub_dataset import list_data_files


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a hub that this process's huggingface_hub asks, with a token."""
    list_data_files.cache_clear()
    with serving(Hub()) as hub:
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_http, "_PAUSES", (0.01, 0.01))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub
