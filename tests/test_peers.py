"""Ranks that notice when another one dies, although they are waiting in C, as inside NCCL."""

import os
import subprocess
import sys
import time

import pytest

RANK = """
import ctypes, os, socket, sys, time
from pathlib import Path
from training import peers

class Store:
    def set(self, name, text):
        Path(f"{name}.part").write_text(text, encoding="utf-8")
        os.replace(f"{name}.part", name)

    def get(self, name):
        while not Path(name).exists():
            time.sleep(0.01)
        return Path(name).read_bytes()

if sys.argv[3] == "0":  # rank 0 cannot open a socket
    def refuse(*_, **__):
        raise OSError("too many open files")

    socket.create_server = refuse
peers.GRACE, rank, world_size = 0.3, int(sys.argv[1]), int(sys.argv[2])
with peers.watch(Store(), rank, world_size):
    time.sleep(0.5)
    print("within", flush=True)
    stay = sys.argv[3 + rank]
    if stay == "forever":
        ctypes.CDLL(None).sleep(600)  # no Python runs meanwhile
    if stay == "error":
        raise SystemExit("error: no room on the disk")
    if rank == 0 and stay != "0":  # strangers: one says something else, one nothing
        for words in (b"GET / HTTP/1.1", b""):
            with socket.create_connection(("localhost", int(Store().get("watch").split()[0]))) as stranger:
                stranger.sendall(words)
    time.sleep(float(stay))
"""


@pytest.fixture
def start(tmp_path):
    """A function: start ranks that stay within for the given seconds, "forever", or leave with an "error"."""
    started = []

    def ranks(*stays):
        environment = os.environ | {"MASTER_ADDR": "localhost"}
        for rank in range(len(stays)):
            command = [sys.executable, "-c", RANK, str(rank), str(len(stays)), *map(str, stays)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
        for process in started:
            assert process.stdout.readline() == "within\n", process.stderr.read()
        return started

    yield ranks
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="waits in the C library")
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_is_killed_ends_those_that_wait_in_c(start, dies):
    ranks = start("forever", "forever", "forever")
    began = time.monotonic()
    ranks.pop(dies).kill()
    for rank in ranks:
        assert "lost contact with another rank" in rank.communicate(timeout=20)[1]
    assert time.monotonic() - began < 10


def test_a_rank_that_leaves_by_an_error_ends_the_others(start):
    failed, other = start("error", "forever")
    assert failed.wait(timeout=20) == 1 and other.wait(timeout=20) == 2
    assert "lost contact" in other.stderr.read() and "lost contact" not in failed.stderr.read()


def test_ranks_that_leave_at_different_times_and_strangers_that_call_end_nobody(start):
    assert [rank.wait(timeout=20) for rank in start(0.2, 1.5, 0.8)] == [0, 0, 0]


def test_without_a_socket_on_rank_0_the_ranks_are_not_watched_and_do_not_wait(start):
    assert [rank.wait(timeout=20) for rank in start(0, 0.1)] == [0, 0]
