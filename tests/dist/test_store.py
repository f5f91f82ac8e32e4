"""The store of a run on real sockets: who can reach it, and what becomes of values that no rank wrote."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from megatron_rpp.dist import store as store_module
from megatron_rpp.dist.signed_store import KEY_VARIABLE, SignedStore
from megatron_rpp.dist.store import connect, open_run_store, run_store, serve
from megatron_rpp.dist.world import World
from megatron_rpp.errors import ConfigError, DeadlineError, RppError, StoreError
from tests.dist.ranks import free_port, run_ranks

KEY = b"k" * 32


def own_address() -> str:
    """An address of this host that others could reach."""
    found = [place.address for places in psutil.net_if_addrs().values() for place in places if place.family == socket.AF_INET]
    return next((address for address in found if not address.startswith("127.")), "")


needs_network = pytest.mark.skipif(not own_address(), reason="this host has no network interface but lo")


def world(rank: int, size: int, port: int, **changes: object) -> World:
    known = {"local_size": size, "local_rank": rank, "master_port": port, "launcher": "torchrun"}
    return World(rank, size, **(known | changes))


def several_hosts(rank: int, size: int, port: int, address: str = "127.0.0.1") -> World:
    return world(rank, size, port, num_nodes=size, is_one_host=False, master_addr=address)


def listeners() -> set[str]:
    """Addresses on which this process listens."""
    return {each.laddr.ip for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN}


def together(size: int, call: Callable[[int], object]) -> dict[int, object]:
    """What each rank's call returned or raised, each in a thread of its own."""
    found: dict[int, object] = {}

    def run(rank: int) -> None:
        try:
            found[rank] = call(rank)
        except RppError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def _addresses_of_a_run(rank: int, folder: Path) -> tuple[set[str], str]:
    dist.init_process_group("gloo", store=open_run_store(World.from_env(), folder, 30), rank=rank, world_size=2)
    dist.all_reduce(torch.ones(1))
    return listeners(), type(dist.distributed_c10d._get_default_store().underlying_store).__name__


def test_on_one_host_everything_listens_on_the_loopback_interface(tmp_path: Path) -> None:
    assert run_ranks(2, _addresses_of_a_run, tmp_path, init=False) == [({"127.0.0.1"}, "TCPStore")] * 2
    assert list(tmp_path.iterdir()) == []


@needs_network
@pytest.mark.parametrize(
    ("host", "is_one_host", "expected"),
    [
        (own_address(), False, own_address()),
        ("127.0.0.1", True, "127.0.0.1"),
        ("localhost", False, "::"),  # as a host's own name resolves on Debian: the other hosts cannot come by it
    ],
)
def test_the_store_listens_where_the_job_says(host: str, is_one_host: bool, expected: str) -> None:
    before = listeners()
    hosted = serve(host, 0, 10, is_one_host=is_one_host)
    assert (listeners() - before or {expected}) == {expected}
    assert TCPStore(host, hosted.port, None, False, timedelta(seconds=10), wait_for_workers=False).num_keys() == 0


def test_a_port_that_is_taken_and_a_host_without_address_are_one_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="MASTER_PORT: rank 0 cannot listen there"):
        serve("127.0.0.1", taken.getsockname()[1], 5)
    with pytest.raises(ConfigError, match="MASTER_ADDR: the address of rank 0 does not resolve"):
        serve("no-such-host.invalid", 0, 5)


def test_a_signed_store_does_what_a_store_does() -> None:
    hosted = serve("127.0.0.1", 0, 10)
    one, two = SignedStore(hosted, KEY), SignedStore(connect("127.0.0.1", hosted.port, 10), KEY).clone()
    one.set("name", "value")
    assert (two.get("name"), two.check(["name"]), two.check(["other"])) == (b"value", True, False)
    assert [one.add("count", 2), two.add("count", -5), one.add("count", 0)] == [2, -3, -3]
    assert [one.compare_set("turn", "", "a"), two.compare_set("turn", "b", "c"), two.compare_set("turn", "a", "c")] == [b"a", b"a", b"c"]
    assert PrefixStore("", one).multi_get([]) == []
    one.set("/a", "1")
    one.set("/b", "2")
    assert PrefixStore("", two).multi_get(["b", "a"]) == [b"2", b"1"]
    assert two.delete_key("name")
    with pytest.raises(dist.DistStoreError):
        two.wait(["name"], timedelta(seconds=0.2))


def test_numbers_of_many_writers_add_up() -> None:
    hosted = serve("127.0.0.1", 0, 10)
    clients = [SignedStore(connect("127.0.0.1", hosted.port, 10), KEY) for _ in range(4)]
    claimed = together(4, lambda rank: [clients[rank].add("claimed", 1) for _ in range(25)])
    assert sorted(number for numbers in claimed.values() for number in numbers) == list(range(1, 101))


def test_adding_nothing_does_not_write() -> None:
    hosted = serve("127.0.0.1", 0, 10)
    store = SignedStore(hosted, KEY)
    assert store.add("claimed", 0) == 0
    written = hosted.get("claimed")
    assert (store.add("claimed", 0), hosted.get("claimed")) == (0, written)


@pytest.mark.parametrize("forged", [b"", b"127.0.0.1:9999", b"\0" * 40])
def test_a_value_that_no_rank_wrote_is_refused(forged: bytes) -> None:
    hosted = serve("127.0.0.1", 0, 10)
    signed, stranger = SignedStore(hosted, KEY), connect("127.0.0.1", hosted.port, 10)
    signed.set("address", "here")
    signed.add("count", 1)
    for name in ("address", "count"):
        stranger.set(name, forged)
    with pytest.raises(StoreError, match="'address': a value in the store of the run is not signed with the run's key"):
        signed.get("address")
    if forged:  # an empty counter is one that nobody has counted yet
        with pytest.raises(StoreError, match="'count': a value"):
            signed.add("count", 1)


def test_a_value_under_another_name_and_of_another_run_is_refused() -> None:
    hosted = serve("127.0.0.1", 0, 10)
    signed = SignedStore(hosted, KEY)
    signed.set("a", "1")
    hosted.set("b", hosted.get("a"))
    SignedStore(hosted, b"x" * 32).set("c", "1")
    for name in ("b", "c"):
        with pytest.raises(StoreError):
            signed.get(name)


def _meet_a_forger(rank: int, folder: Path, port: int) -> str:
    """A stranger on the network replaces the addresses of rank 0 before rank 1 asks for them."""
    signed = open_run_store(several_hosts(rank, 2, port), folder, 30)
    if rank == 0:
        threading.Thread(target=_join, args=(0, signed.clone()), daemon=True).start()
        signed.wait(["rank-1-is-done"], timedelta(seconds=20))
        return ""
    stranger = connect("127.0.0.1", port, 10)
    while not (names := [name for name in stranger.list_keys() if "cpu" in name]):  # gloo's
        time.sleep(0.01)
    for name in names:
        stranger.set(name, stranger.get(name)[:48] + b"\x02\x00\x27\x0f\x7f\x00\x00\x01" + bytes(120))
    outcome = _join(1, signed)
    signed.set("rank-1-is-done", "")
    return outcome


def _join(rank: int, signed: SignedStore) -> str:
    try:
        dist.init_process_group("gloo", store=signed, rank=rank, world_size=2, timeout=timedelta(seconds=1 + 4 * rank))
    except StoreError:
        return "refused"
    except RuntimeError as error:
        return str(error)
    return "joined"


def test_process_groups_do_not_trust_addresses_that_a_stranger_wrote(tmp_path: Path) -> None:
    assert run_ranks(2, _meet_a_forger, tmp_path, free_port(), init=False, timeout_s=60)[1] == "refused"


def _work_on_several_hosts(rank: int, folder: Path, port: int) -> tuple[float, bool]:
    dist.init_process_group("gloo", store=open_run_store(several_hosts(rank, 2, port), folder, 30), rank=rank, world_size=2)
    total = torch.ones(1)
    dist.all_reduce(total, group=dist.new_group([0, 1]))
    claims = PrefixStore("claims", run_store().clone())
    claims.add("count", 1)
    dist.barrier()
    return total.item(), claims.add("count", 0) == 2


def test_ranks_on_several_hosts_share_a_key_through_the_run_directory_and_leave_none(tmp_path: Path) -> None:
    assert run_ranks(2, _work_on_several_hosts, tmp_path / "run", free_port(), init=False) == [(2.0, True)] * 2
    assert list((tmp_path / "run").iterdir()) == []


def test_the_key_is_in_a_file_that_only_its_owner_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    read = store_module._read_key

    def spy(store: Store, run_dir: Path, wait: object) -> str:
        key = read(store, run_dir, wait)
        seen.extend(stat.S_IMODE(path.stat().st_mode) for path in run_dir.iterdir())
        return key

    monkeypatch.setattr(store_module, "_read_key", spy)
    port = free_port()
    found = together(2, lambda rank: open_run_store(several_hosts(rank, 2, port), tmp_path, 20))
    assert [type(each) for each in found.values()] == [SignedStore] * 2
    assert seen == [0o600]


def test_the_key_of_a_run_that_was_killed_is_removed_by_the_next_one(tmp_path: Path) -> None:
    old, new = (tmp_path / f".run-key-{number}" for number in "01")
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    port = free_port()
    together(2, lambda rank: open_run_store(several_hosts(rank, 2, port), tmp_path, 20))
    assert list(tmp_path.iterdir()) == [new]


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    name = f".run-key-{'0' * 32}"
    (tmp_path / name).write_text("k" * 64)
    (tmp_path / name).chmod(0o644)
    hosted = serve("127.0.0.1", 0, 10)
    hosted.set("run-key", name)
    with pytest.raises(StoreError, match="the key of the run is open to other users"):
        open_run_store(several_hosts(1, 2, hosted.port), tmp_path, 5)


@pytest.mark.parametrize("name", ["../../etc/passwd", ".run-key-", "x" * 5000])
def test_only_the_name_of_a_key_file_is_taken_from_the_store(name: str, tmp_path: Path) -> None:
    hosted = serve("127.0.0.1", 0, 10)
    hosted.set("run-key", name)
    with pytest.raises(StoreError, match="another process has written to the store of the run"):
        open_run_store(several_hosts(1, 2, hosted.port), tmp_path, 5)


def test_a_rank_with_another_key_does_not_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosted = serve("127.0.0.1", 0, 10)
    SignedStore(hosted, KEY).set("here/0", "")
    monkeypatch.setenv(KEY_VARIABLE, "0" * 40)
    with pytest.raises(StoreError, match="'here/0': a value in the store(?s:.*)give all ranks the same RPP_RUN_KEY"):
        open_run_store(several_hosts(1, 2, hosted.port), tmp_path, 5)


def test_a_short_key_is_refused_and_no_child_inherits_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosted = serve("127.0.0.1", 0, 10)
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    with pytest.raises(ConfigError, match="RPP_RUN_KEY: the key of the run is too short"):
        open_run_store(several_hosts(1, 2, hosted.port), tmp_path, 2)
    assert KEY_VARIABLE not in os.environ


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    port = free_port()
    found = together(2, lambda rank: open_run_store(several_hosts(rank, 4, port), tmp_path, 3))
    assert isinstance(found[0], DeadlineError)
    assert "ranks 2, 3 of 4 did not come" in str(found[0])
    assert list(tmp_path.iterdir()) == []


def test_the_store_of_torchruns_agent_is_used_and_signed(tmp_path: Path) -> None:
    agent = serve("127.0.0.1", 0, 10)
    found = together(2, lambda rank: open_run_store(world(rank, 2, agent.port, has_agent_store=True), tmp_path, 20))
    assert [type(each) for each in found.values()] == [SignedStore] * 2


def test_ranks_that_torchrun_restarts_meet_in_the_store_of_the_attempts_before(tmp_path: Path) -> None:
    agent = serve("127.0.0.1", 0, 10)
    for attempt in range(2):
        found = together(2, lambda rank, attempt=attempt: join_agent(rank, agent.port, attempt, tmp_path))
        assert [type(each) for each in found.values()] == [SignedStore] * 2


def join_agent(rank: int, port: int, attempt: int, folder: Path) -> Store:
    """Rank 0 comes last, so that the other one finds what the attempt before has left."""
    time.sleep(0.5 * (rank == 0))
    return open_run_store(world(rank, 2, port, has_agent_store=True, attempt=attempt), folder, 5)


def test_nobody_to_meet_is_an_error_at_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(DeadlineError, match="join the run"):
        open_run_store(world(1, 2, free_port()), tmp_path, 2)
