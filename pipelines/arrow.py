"""Bytes as a file that Arrow reads."""

import pyarrow as pa


def owned(data: bytes) -> pa.BufferReader:
    """A copy that Arrow owns. Its threads still hold what they have read when a call returns; to let go of an object of Python's
    they need the interpreter, and abort the process where that is about to end."""
    held = pa.BufferOutputStream()
    held.write(data)
    return pa.BufferReader(held.getvalue())
