"""The store in which the ranks of a run meet: where it listens, and whose values count.

Ranks learn each other's addresses through the store, and they unpickle what comes from these addresses. torch's TCP store
answers anybody who connects, and by default it listens on every interface. If all ranks are on one host, it listens here on
the loopback interface. On several hosts it listens on the address that the job names, and every value is signed with a key
that only the ranks of this run have. torchrun's agent hosts a store on all interfaces; values in that store are signed, too.

A signature does not hide a value. It does not protect the connections of gloo and NCCL either, which authenticate nobody.
A run on several hosts needs a network in which no stranger can connect to them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import time
from datetime import timedelta
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path

from torch.distributed import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _get_default_store

from megatron_rpp.dist.deadline import Deadline, deadline
from megatron_rpp.dist.signed_store import KEY_VARIABLE, SignedStore
from megatron_rpp.dist.world import World
from megatron_rpp.errors import ConfigError, DeadlineError, StoreError

MIN_KEY_CHARS = 32
_ANNOUNCED = "run-key"  # the one name with an unsigned value: which file has the key
_MOST_NAMED = 8  # missing ranks in one message


def open_run_store(world: World, run_dir: Path, deadline_s: float) -> Store:
    """The store of this run. Every rank calls it once.

    run_dir: holds the key until all ranks have it, unless KEY_VARIABLE is set.
    Units: deadline_s in seconds, for a rank that does not come.
    Raises: ConfigError when rank 0 cannot listen or the key is too short; StoreError when a value is not signed with the
    key of the run; DeadlineError.
    """
    if world.size == 1:
        return HashStore()  # no port, hence nothing that two runs on one host could fight over
    host, port = world.master_addr, world.master_port
    waiting_for = f"the store of the run at {host}:{port}"
    with deadline("join the run", deadline_s, rank=world.rank, waiting_for=waiting_for) as wait:
        if world.rank == 0 and not world.has_agent_store:
            store = serve(host, port, deadline_s, is_one_host=world.is_one_host)
        else:
            store = connect(host, port, deadline_s)
        if world.has_agent_store:
            store = PrefixStore(f"attempt-{world.attempt}", store)
        if world.is_one_host and not world.has_agent_store:
            return store
        return _signed(store, world, run_dir, wait)


def run_store() -> Store:
    """The store of the default process group, which is that of the run."""
    return _get_default_store()


def serve(host: str, port: int, timeout_s: float, *, is_one_host: bool = True) -> TCPStore:
    """Host a store on the address that `host` names. Port 0 means any free one (`store.port`). Raises: ConfigError."""
    listener = _listen(host, port, is_one_host=is_one_host)
    _, port = listener.getsockname()[:2]
    fd = listener.detach()  # the store closes it
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=fd)


def connect(host: str, port: int, timeout_s: float) -> TCPStore:
    """A store that another process hosts. Raises: torch's DistNetworkError after timeout_s."""
    return TCPStore(host, port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False)


def _listen(host: str, port: int, *, is_one_host: bool) -> socket.socket:
    """A socket that listens on the address that `host` names.

    It listens on all interfaces if other hosts use an address that this host does not have, as behind a load balancer, or if
    `host` is a loopback address here, as Debian resolves a host's own name.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        what, got = "the address of rank 0 does not resolve", f"{host}: {error.strerror}"
        raise ConfigError(what, where="MASTER_ADDR", expected="a host name or an address", got=got) from error
    places = [(family, place) for family, _, _, _, place in found if is_one_host or not _is_loopback(place[0])]
    if not is_one_host:
        has_ipv6 = socket.has_dualstack_ipv6()
        places.append((socket.AF_INET6, ("::", port)) if has_ipv6 else (socket.AF_INET, ("0.0.0.0", port)))
    refused = OSError("no address")
    for family, place in places:
        try:
            return _bound(family, place)
        except OSError as error:
            refused = error
            if error.errno == errno.EADDRINUSE:
                break
    raise ConfigError(
        f"rank 0 cannot listen there: {refused.strerror}",
        where="MASTER_ADDR and MASTER_PORT",
        expected="a free port on an address of this host",
        got=f"{host}:{port}",
        fix="set MASTER_PORT to a free port, or end the program that uses this one",
    ) from refused


def _bound(family: socket.AddressFamily, place: tuple) -> socket.socket:
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(place[0] != "::"))
        listener.bind(place)
        listener.listen(socket.SOMAXCONN)
    except OSError:
        listener.close()
        raise
    return listener


def _is_loopback(address: str) -> bool:
    return ip_address(address.partition("%")[0]).is_loopback


def _signed(store: Store, world: World, run_dir: Path, wait: Deadline) -> SignedStore:
    """The store with signatures, once every rank has shown that it has the key."""
    own = os.environ.pop(KEY_VARIABLE, "")  # no engine and no verifier inherits it
    if own:
        return _meet(SignedStore(store, _digest(own)), world, wait)
    if world.rank != 0:
        return _meet(SignedStore(store, _digest(_read_key(store, run_dir, wait))), world, wait)
    _remove_stale_keys(run_dir, wait.limit_s)
    path = run_dir / f".{_ANNOUNCED}-{secrets.token_hex(16)}"
    try:
        key = _write_key(path)
        store.set(_ANNOUNCED, path.name)
        return _meet(SignedStore(store, _digest(key)), world, wait)
    finally:
        path.unlink(missing_ok=True)  # every rank has read it, or the run has failed


def _digest(key: str) -> bytes:
    if len(key) < MIN_KEY_CHARS:
        raise ConfigError(
            "the key of the run is too short",
            where=KEY_VARIABLE,
            expected=f"at least {MIN_KEY_CHARS} characters that nobody can guess",
            got=f"{len(key)} characters",
            fix=f"export {KEY_VARIABLE}=$(openssl rand -hex 32) before srun or torchrun, or leave it unset",
        )
    return sha256(key.encode()).digest()


def _write_key(path: Path) -> str:
    key = secrets.token_hex(32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(fd, "w", encoding="ascii") as file:
            file.write(key)
    except OSError as error:
        what, fix = "the key of the run cannot be written", f"make run.dir writable, or give all ranks a key in {KEY_VARIABLE}"
        raise ConfigError(what, where=str(path), got=error.strerror, fix=fix) from error
    return key


def _remove_stale_keys(run_dir: Path, limit_s: float) -> None:
    """Of runs that were killed while their ranks met. No run meets for longer than limit_s."""
    for path in run_dir.glob(f".{_ANNOUNCED}-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > limit_s:
                path.unlink()


def _read_key(store: Store, run_dir: Path, wait: Deadline) -> str:
    """What rank 0 wrote. A network file system may show the file some seconds late."""
    name = store.get(_ANNOUNCED).decode("ascii", errors="replace")
    if not re.fullmatch(rf"\.{_ANNOUNCED}-[0-9a-f]{{32}}", name):
        what = "another process has written to the store of the run"
        raise StoreError(what, where=_ANNOUNCED, expected="the name of a key file", got=repr(name[:100]))
    path = run_dir / name
    try:
        wait.poll(path.exists)
    except DeadlineError as error:
        what, fix = "the key of the run is missing", f"use a run.dir that all hosts share, or set {KEY_VARIABLE} for all ranks"
        raise DeadlineError(what, where=str(path), expected="a file that rank 0 wrote", fix=fix) from error
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), encoding="ascii") as file:
        mode = os.fstat(file.fileno()).st_mode
        if mode & 0o077:
            what, expected = "the key of the run is open to other users", "a file that only its owner can read"
            raise StoreError(what, where=str(path), expected=expected, got=f"mode {mode & 0o777:o}")
        return file.read()


def _meet(store: SignedStore, world: World, wait: Deadline) -> SignedStore:
    """Return when rank 0 has seen every rank, and the others have seen rank 0.

    Raises: StoreError for a rank with another key.
    """
    store.set(f"here/{world.rank}", "")
    for rank in range(world.size) if world.rank == 0 else (0,):
        name = f"here/{rank}"
        try:
            wait.poll(lambda name=name: store.check([name]))
        except DeadlineError as error:
            missing = [rank for rank in range(world.size) if not store.check([f"here/{rank}"])]
            named = ", ".join(map(str, missing[:_MOST_NAMED]))
            what = f"ranks {named}{' and more' if len(missing) > _MOST_NAMED else ''} of {world.size} did not come"
            raise DeadlineError(what, where="join the run", fix="read the logs of these ranks") from error
        store.get(name)
    return store
