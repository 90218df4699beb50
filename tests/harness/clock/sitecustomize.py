"""Adds to `time.time` what stands in the file GUP_TEST_CLOCK, at every call; monotonic time stays."""

import mmap
import os
import struct
import time

if "GUP_TEST_CLOCK" in os.environ:
    _fd = os.open(os.environ["GUP_TEST_CLOCK"], os.O_RDONLY | os.O_CLOEXEC)
    _page = mmap.mmap(_fd, 8, prot=mmap.PROT_READ)
    os.close(_fd)
    _real = time.time
    time.time = lambda: _real() + struct.unpack("=d", _page[:8])[0]  # type: ignore[assignment]
