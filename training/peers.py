"""
Notice within seconds that another rank has died, also while this one waits for it inside NCCL.

gloo raises an error when a connection closes. NCCL waits until its timeout, and a process that waits in it runs no
Python: neither an exception nor torchrun's SIGTERM reaches it, and torchrun kills it after its --shutdown-timeout. So
every rank holds a TCP connection to rank 0, on which one byte is sent when the run ends well. If the process ends in
any other way, the system closes the connection, and a thread of rank 0, then of every other rank, ends its own.
"""

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator

GRACE = 5.0  # seconds that a rank has to end by itself, with an error of its own
DONE = b"."


@contextlib.contextmanager
def watch(store, rank: int, world_size: int) -> Iterator[None]:
    """
    Within this context, end the process GRACE seconds after another rank has ended or left it by an exception.

    store: with set(name, text) and get(name) -> bytes, as torch.distributed's, in which the ranks meet
    Without a connection between the ranks, as behind a firewall, nothing is watched.
    """
    left, peers, server, token = threading.Event(), [], None, b""
    if rank == 0:
        with contextlib.suppress(OSError):
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=world_size)
        token = secrets.token_hex(16).encode()
        store.set("watch", f"{server.getsockname()[1] if server else 0} {token.decode()}")  # 0: watch nothing
    else:
        port, token = store.get("watch").split()
        with contextlib.suppress(OSError):
            if int(port):
                peers = [socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout=30)]
                peers[0].sendall(token)
    threading.Thread(target=_listen, args=(rank, server, peers, token, left), daemon=True).start()
    yield
    left.set()
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.sendall(DONE)


def _listen(rank: int, server: socket.socket | None, peers: list, token: bytes, left: threading.Event) -> None:
    """Wait for what happens to the connections of this rank; rank 0 accepts those that begin with the token."""
    selector = selectors.DefaultSelector()
    for each in [server, *peers] if server else peers:
        selector.register(each, selectors.EVENT_READ)
    while selector.get_map():
        for key, _ in selector.select():
            peer, known = key.fileobj, key.fileobj in peers
            if peer is server:
                selector.register(server.accept()[0], selectors.EVENT_READ)
                continue
            received = _receive(peer, len(DONE) if known else len(token))
            if not known and received == token:
                peers.append(peer)
                continue
            selector.unregister(peer)
            if known and received != DONE and not left.is_set():
                _end(rank, peers)


def _receive(peer: socket.socket, size: int) -> bytes:
    peer.settimeout(1)
    with contextlib.suppress(OSError):
        return peer.recv(size)
    return b""


def _end(rank: int, peers: list[socket.socket]) -> None:
    """End this process, unless it ends by itself, after telling the other ranks by closing their connections."""
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.shutdown(socket.SHUT_RDWR)
    time.sleep(GRACE)
    sys.stderr.write(f"error: rank {rank}: lost contact with another rank\n")
    sys.stderr.flush()
    os._exit(2)  # as if the lost connection had been noticed in a collective
