"""Slurm's compressed lists."""

from __future__ import annotations

import pytest

from megatron_rpp.dist.hostlist import expand_hosts, expand_tasks_per_node
from megatron_rpp.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("x5", ["x5"]),
        ("node[01-03,07],x5", ["node01", "node02", "node03", "node07", "x5"]),
        ("a,b,c", ["a", "b", "c"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("gpu[3]-ib", ["gpu3-ib"]),
        ("dgx-[1,3].cluster.example,login", ["dgx-1.cluster.example", "dgx-3.cluster.example", "login"]),
    ],
)
def test_hosts_expand_in_order_and_keep_their_zeros(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == tuple(hosts)


UNREADABLE = ["", ",", "a,,b", "a,", "n[1-", "n]1", "n[[1]]", "n[3-1]", "n[a-b]", "n[]", "n[1-99999999]", "n[1-300]m[1-300]"]


@pytest.mark.parametrize("text", UNREADABLE)
def test_a_list_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the list of nodes"):
        expand_hosts(text)


@pytest.mark.parametrize(("text", "counts"), [("4", (4,)), ("4(x2),3", (4, 4, 3)), ("1,2(x1)", (1, 2))])
def test_tasks_per_node_expand(text: str, counts: tuple[int, ...]) -> None:
    assert expand_tasks_per_node(text) == counts


@pytest.mark.parametrize("text", ["", "4(x", "4x2", "-1", "4,"])
def test_tasks_per_node_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="number of tasks"):
        expand_tasks_per_node(text)
