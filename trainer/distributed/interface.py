"""The network interface that leads to the other nodes of a run."""

import fcntl
import os
import socket
import struct

SIOCGIFADDR = 0x8915  # linux/sockios.h: get an interface's address


def interface_toward(peer: str) -> str | None:
    """Name of the network interface that routes to another node, or None if unknown."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))  # UDP: sends nothing, only selects the route
        except OSError:
            return None
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # has no address
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return None


def choose_interface() -> None:
    """Makes gloo and NCCL use the interface that routes to the other nodes, unless the user chose one. By default they take
    the first one that is up, on many clusters a management network or a container bridge."""
    peers = os.environ.get("DISBACK_PEERS", "").split()
    if len(peers) < 2:
        return
    name = interface_toward(peers[1] if os.environ.get("SLURM_NODEID", "0") == "0" else peers[0])
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": exact name, not a prefix
