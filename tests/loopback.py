"""Which socket addresses stay on this machine.

Apart from helpers.py, because conftest.py needs it: what a conftest's imports print (and PEFT's optional
dependencies do print) would come out after pytest's summary, which is to be the last line.
"""

import ipaddress
from typing import Any


def is_loopback(address: Any) -> bool:
    """Whether a socket address stays on this machine: a Unix socket's path, `localhost`, 127.0.0.0/8, ::1."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:  # a name that would have to be resolved first
        return False
