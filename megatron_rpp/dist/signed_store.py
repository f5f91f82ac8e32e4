"""A torch store whose values carry a signature. A rank trusts only what a rank of its own run wrote.

torch's TCP store answers anybody who connects. They can list, read and replace every value.
"""

from __future__ import annotations

import hmac
import secrets
from datetime import timedelta

from torch.distributed import Store

from megatron_rpp.errors import StoreError

KEY_VARIABLE = "RPP_RUN_KEY"  # a secret that the user gives to all ranks, where run.dir cannot carry one
_SIGNATURE_BYTES, _NONCE_BYTES = 32, 16


class SignedStore(Store):
    """Each value carries the HMAC-SHA256 of its name and content. Reading a value without it raises StoreError.

    Anyone who can write to the store can put an old value back under its name. Names are not signed.
    """

    # torch's C++ code keeps only the C++ half of a store alive, and fails without the Python half. A run makes few stores.
    _alive: list[SignedStore] = []  # noqa: RUF012

    def __init__(self, store: Store, key: bytes) -> None:
        super().__init__()
        self._store, self._key = store, key
        self._alive.append(self)

    def clone(self) -> SignedStore:
        """The same store on a connection of its own."""
        return SignedStore(self._store.clone(), self._key)

    def set(self, key: str, value: str | bytes) -> None:
        self._store.set(key, self._seal(key, value))

    def get(self, key: str) -> bytes:
        return self._open(key, self._store.get(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """In one request."""
        return [self._open(key, value) for key, value in zip(keys, self._store.multi_get(keys), strict=True)]

    def add(self, key: str, value: int) -> int:
        """The total is kept as signed text. A number that the server adds up would carry no signature.

        Adding 0 reads the total and writes nothing: ranks that wait ask often, and each write makes other writers start over.
        """
        while True:
            before = self._sealed(key)
            total = value + (int(self._open(key, before)) if before else 0)
            if before and value == 0:
                return total
            after = self._seal(key, str(total))
            if self._store.compare_set(key, before, after) == after:
                return total

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        before, expected = self._sealed(key), _as_bytes(expected_value)
        if before and self._open(key, before) != expected:
            return self._open(key, before)
        if not before and expected:
            return expected  # what torch's stores answer for a name without a value
        return self._open(key, self._store.compare_set(key, before, self._seal(key, desired_value)))

    def check(self, keys: list[str]) -> bool:
        return self._store.check(keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        if timeout is None:
            self._store.wait(keys)
        else:
            self._store.wait(keys, timeout)

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(key)

    def num_keys(self) -> int:
        return self._store.num_keys()

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)

    def has_extended_api(self) -> bool:
        """No: torch then does with the methods above what append and multi_set would do."""
        return False

    def _sealed(self, key: str) -> bytes:
        return self._store.get(key) if self._store.check([key]) else b""

    def _seal(self, name: str, value: str | bytes) -> bytes:
        """Never the same bytes twice, so that a writer can tell whether the store took its own value."""
        content = secrets.token_bytes(_NONCE_BYTES) + _as_bytes(value)
        return self._sign(name, content) + content

    def _open(self, name: str, sealed: bytes) -> bytes:
        signature, content = sealed[:_SIGNATURE_BYTES], sealed[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._sign(name, content)):
            raise StoreError(
                "a value in the store of the run is not signed with the run's key",
                where=f"store, {name!r}",
                expected="a value that a rank of this run wrote",
                got=f"{len(sealed)} bytes that another process wrote, or a rank with another key",
                fix=f"give all ranks the same {KEY_VARIABLE} or none; choose another MASTER_PORT if another job uses this one",
            )
        return content[_NONCE_BYTES:]

    def _sign(self, name: str, content: bytes) -> bytes:
        encoded = name.encode()
        return hmac.digest(self._key, len(encoded).to_bytes(8) + encoded + content, "sha256")


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
