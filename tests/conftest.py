"""What holds for every test: a seed, no network, no cache left over from the user's own environment."""

import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from loopback import is_loopback

# A shell starts what it runs in the background with Ctrl-C ignored, and processes that tests start would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _loopback_only(connect: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: socket.socket, address: Any) -> Any:
        if not is_loopback(address):
            raise RuntimeError(f"a test tried to reach the network: {address!r}")
        return connect(self, address)

    return guarded


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Session-wide, so that module-scoped fixtures are covered too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _loopback_only(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", _loopback_only(socket.socket.connect_ex))
        yield


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spectrum cached by someone's earlier run must not decide a test."""
    monkeypatch.delenv("OFFPRINCIPAL_CACHE", raising=False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
