"""The hash of a file, which is read in blocks."""

import hashlib

import pytest

from lora_rlhf.preferences.files import sha256_of

BLOCK = 2**20


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 7])
def test_the_hash_is_that_of_all_bytes_at_once(tmp_path, size):
    content = bytes(i * 31 % 251 for i in range(1009)) * (size // 1009 + 1)
    path = tmp_path / "file"
    path.write_bytes(content[:size])
    assert sha256_of(path) == hashlib.sha256(content[:size]).hexdigest()
