"""What the process holds is given back: memory, and threads that wait."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

MAPPED = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from cenote.tensors import process

def resident():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssFile"))
    return int(line.split()[1]) << 10

file = sys.argv[1]
save_file({"a": torch.arange(1 << 22, dtype=torch.float32), "b": torch.ones(1 << 20)}, file)
loaded = load_file(file)
total = float(loaded["a"].double().sum())
before = resident()
process.leave_unused_memory()
left = before - resident()
assert float(loaded["a"].double().sum()) == total, "what is read again is there"
loaded["b"][7] = 5.0
process.leave_unused_memory()
assert loaded["b"][:9].tolist() == [1, 1, 1, 1, 1, 1, 1, 5, 1], "what was written stays"
print(left)
"""


LIBRARIES = """
import re, torch
from pathlib import Path
from cenote.tensors import process

def resident():
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    own = [x for x in parts if "libtorch_cpu.so" in x.split("\\n")[0]]
    return sum(int(re.search(r"^Rss: +(\\d+)", x, re.MULTILINE)[1]) for x in own)

torch.set_num_threads(3)
x = torch.arange(12.0).view(3, 4)
wanted = (x @ x.T).softmax(1)
before = resident()
process.leave_unused_memory()
print(before, resident())
assert torch.equal((x @ x.T).softmax(1), wanted)
assert torch.get_num_threads() == 3, "what the library has noted stays"
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="mappings are read from /proc")
def test_what_only_importing_has_run_of_libraries_leaves_memory() -> None:
    done = subprocess.run([sys.executable, "-c", LIBRARIES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after < before / 2


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="mappings are read from /proc")
def test_weights_in_a_mapped_file_leave_memory_and_come_back(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MAPPED, str(tmp_path / "x.safetensors")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 15 << 20, "16 MiB were mapped and read"


THREADS = """
import os, threading, torch
from cenote.tensors.process import release_threads

def count():
    return len(os.listdir("/proc/self/task"))

def work():
    return (x + x).sum()

torch.set_num_threads(3)
x = torch.arange(1 << 20, dtype=torch.float32)
release_threads()
alone, wanted = count(), work()
busy = count()
other, go, end = threading.Event(), threading.Event(), threading.Event()

def elsewhere():
    torch.set_num_threads(3)
    work()
    other.set()
    go.wait()
    release_threads()
    end.set()
    threading.Event().wait()

threading.Thread(target=elsewhere, daemon=True).start()
other.wait()
both = count()
release_threads()
left = count()
go.set()
end.wait()
assert torch.equal(work(), wanted)
print(busy - alone, both - busy, left - both, count() - left)
os._exit(0)
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="this torch has no OpenMP")
def test_each_thread_gives_back_its_own_threads_and_makes_new_ones() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    begun, elsewhere, given_back, then = map(int, done.stdout.split())
    assert begun == 2
    assert elsewhere == 3, "a thread, and two of its own"
    assert given_back == -2
    assert then == 0, "two given back elsewhere, two begun here"
