"""Runs a Python program that nobody can be trusted with, apart from everything else on the machine.

What it gets: Linux namespaces of its own for processes, network (none, not even loopback), mounts and System V IPC; a root that
holds the Python installation and the system's libraries, read-only, and an empty /tmp of 64 MB, its working folder; an empty
environment; limits on CPU time, address space, processes, files and their sizes; no privileges and no way to gain any. Started
by root, it runs under a user id of its own; started by another user, under that user's in a user namespace. It ends with all
that it started when its parent does. So it cannot reach the network, the files of this machine (but for what was installed,
readable), other processes, or a lasting place to write.

What it does not get: a kernel of its own. A program that exploits the kernel is not held, nor does anything limit the memory of
several processes together (32 at most, each with its own limit). Use a virtual machine against an adversary.

Where the kernel refuses any part of this, nothing runs and `SandboxError` says which: containers often lack `unshare` (Docker:
`--security-opt seccomp=unconfined` or CAP_SYS_ADMIN), and some systems forbid user namespaces to ordinary users (`sysctl
kernel.apparmor_restrict_unprivileged_userns=0`, `user.max_user_namespaces` above 0). Needs Linux 5.12.

This file is also the program that builds the sandbox, with nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROCESSES, OPEN_FILES, FILE_BYTES, TMP_MB = 32, 64, 1_000_000, 64
WALL_S = 60.0  # where nothing stops it sooner

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
SYS_MOUNT_SETATTR = 442  # the same on every architecture
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38

SYSTEM = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/etc/localtime",
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

# Only a program that runs to its end gets its token written: one that exits or dies before has not passed.
RUNNER = """
import os, runpy
token = os.read(3, 64)
os.close(3)
runpy.run_path("/tmp/program.py", run_name="__main__")
os.write(4, token)
"""


class SandboxError(Exception):
    """The sandbox could not be built; says what refused."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    completed: bool  # it ran to its last line: no exception, no exit
    status: int  # exit status, negative for a signal
    stdout: str  # at most 1 MB
    stderr: str  # its last 2 000 characters

    @property
    def reason(self) -> str:
        """In words; empty where it completed."""
        if self.completed:
            return ""
        if self.status == -signal.SIGXCPU:
            return "ran out of CPU time"
        if self.status < 0:
            return f"was ended by {signal.Signals(-self.status).name}"
        lines = self.stderr.strip().splitlines()
        return lines[-1][:200] if self.status and lines else "exited before its end"


def run(program: str, *, stdin: str = "", cpu_s: int = 2, memory_mb: int = 512) -> Outcome:
    """Run a Python program.

    Args:
        program: its source.
        stdin: what it reads.
        cpu_s: CPU time of each of its processes.
        memory_mb: address space of each of its processes.

    Raises:
        SandboxError: the kernel refuses the sandbox.
        TimeoutError: it took more than 60 s of wall time. It may have slept, or had to wait for a busy machine.
    """
    request = {"program": program, "stdin": stdin, "cpu_s": cpu_s, "memory_mb": memory_mb}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin"},
    )
    try:
        output, _ = process.communicate(json.dumps(request).encode(), timeout=WALL_S)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"the program took more than {WALL_S:g} s") from None
    finally:
        process.kill()
        process.communicate()
    try:
        answer: dict[str, Any] = json.loads(output)
    except ValueError:
        raise SandboxError(f"the sandbox ended with status {process.returncode}") from None
    if "refused" in answer:
        raise SandboxError(f"the kernel refuses the sandbox: {answer['refused']}")
    return Outcome(**answer)


_libc = ctypes.CDLL(None, use_errno=True)


def _call(what: str, result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _call(f"mount {source} on {target}", _libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]))


def _lock(path: str, attributes: int, flags: int = AT_RECURSIVE) -> None:
    """Make a mount read-only or the like, with all mounts within it unless `flags` is 0."""
    # struct mount_attr: set, clear, propagation, user namespace.
    request = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    arguments = (SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, ctypes.byref(request), 32)
    _call(f"mount_setattr {path}", _libc.syscall(*map(_long, arguments)))


def _long(argument: Any) -> Any:
    return ctypes.c_long(argument) if isinstance(argument, int) else argument


def _installation() -> list[str]:
    """Folders that Python needs to run: of its libraries, and of every link from its name to the program itself."""
    folders = [sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.realpath(sys.base_prefix)]
    link = Path(sys.executable)
    for _ in range(16):
        folders.append(str(link.parent.parent))
        if not link.is_symlink():
            break
        link = link.parent / os.readlink(link)
    found: list[str] = []
    for folder in sorted({os.path.normpath(folder) for folder in folders}):
        inside = any(folder == other or folder.startswith(other + "/") for other in (*SYSTEM, *found))
        if folder != "/" and not inside:
            found.append(folder)
    return found


def _build_root() -> None:
    """Give this process a root with only what a Python program needs, read-only but for /tmp."""
    root = "/sys"  # a folder that there always is, to build it over: nothing within is needed
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=4m,mode=755")
    for path in (*SYSTEM, *_installation(), *DEVICES):
        target = root + path
        if os.path.islink(path) and path in SYSTEM[:6]:
            os.symlink(os.readlink(path), target)
            continue
        if not os.path.exists(path):
            continue
        os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
        if not os.path.isdir(path):
            Path(target).touch()
        _mount(path, target, None, MS_BIND | MS_REC)
        _lock(target, ATTR_RDONLY | ATTR_NOSUID | (0 if path in DEVICES else ATTR_NODEV))
    for folder in ("tmp", "proc"):
        os.mkdir(f"{root}/{folder}")
    _mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={TMP_MB}m,mode=1777")
    with suppress(OSError):  # refused inside some containers; Python does without
        _mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    _lock(root, ATTR_RDONLY, 0)
    os.chdir(root)
    number = SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"pivot_root: unknown on {os.uname().machine}")
    _call("pivot_root", _libc.syscall(ctypes.c_long(number), b".", b"."))
    _call("umount2", _libc.umount2(b".", MNT_DETACH))
    os.chdir("/tmp")


def _enter_namespaces() -> None:
    flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _call("unshare", _libc.unshare(flags))
        return
    _call("unshare (user namespace)", _libc.unshare(flags | CLONE_NEWUSER))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path(f"/proc/self/{name}").write_text(text, encoding="ascii")


def _give_up_privileges(number: int) -> None:
    """Root becomes a user that owns nothing, by itself so that its limit of processes is its own too."""
    if os.geteuid() == 0:
        os.setgroups([])
        try:
            os.setresgid(number, number, number)
            os.setresuid(number, number, number)
        except OSError:  # a container without so many users
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
    _call("prctl", _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _start(request: dict[str, Any], files: list[int], number: int) -> None:
    """Become the program; does not return. `files` are the descriptors it has, from 0 on."""
    for limit, most in (
        (resource.RLIMIT_CPU, request["cpu_s"]),
        (resource.RLIMIT_AS, request["memory_mb"] * 1_000_000),
        (resource.RLIMIT_NPROC, PROCESSES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # A second more, so that the signal says which limit it was.
        resource.setrlimit(limit, (most, most + 1 if limit == resource.RLIMIT_CPU and hard != most else most))
    _give_up_privileges(number)
    moved = [os.dup(file) for file in files]
    while min(moved) < len(files):
        moved = [os.dup(file) for file in moved]
    for position, file in enumerate(moved):
        os.dup2(file, position)
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, "-I", "-B", "-c", RUNNER], environment)


def _inside(request: dict[str, Any], number: int) -> dict[str, Any]:
    """As the first process of the new namespaces: run the program, and say how it ended."""
    _build_root()
    Path("/tmp/program.py").write_text(request["program"], encoding="utf-8", errors="replace")
    stdin, stdout, stderr, given, written = (os.memfd_create(name) for name in ("in", "out", "err", "token", "written"))
    token = secrets.token_bytes(32)
    for file, content in ((stdin, request["stdin"].encode("utf-8", "replace")), (given, token)):
        os.truncate(file, 0)
        os.pwrite(file, content, 0)
    child = os.fork()
    if child == 0:
        try:
            _start(request, [stdin, stdout, stderr, given, written], number)
        except BaseException as error:
            os.pwrite(written, f"refused: {error}".encode(), 0)
            os._exit(1)
    while (ended := os.wait())[0] != child:
        pass
    answer = os.pread(written, 1000, 0)
    if answer.startswith(b"refused: "):
        raise OSError(answer[9:].decode())
    status = os.waitstatus_to_exitcode(ended[1])
    return {
        "completed": answer == token and status == 0,
        "status": status,
        "stdout": os.pread(stdout, FILE_BYTES, 0).decode("utf-8", "replace"),
        "stderr": os.pread(stderr, FILE_BYTES, 0).decode("utf-8", "replace")[-2000:],
    }


def _die_with_parent(parent: int | None) -> None:
    _call("prctl", _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def main(parent: int) -> None:
    """Read the request from stdin, write the outcome to stdout."""
    _die_with_parent(parent)
    request = json.loads(sys.stdin.buffer.read())
    number = 2_000_000_000 + os.getpid()
    try:
        _enter_namespaces()
    except OSError as error:
        print(json.dumps({"refused": str(error)}))
        return
    first = os.fork()
    if first == 0:
        _die_with_parent(None)
        try:
            answer = _inside(request, number)
        except OSError as error:
            answer = {"refused": str(error)}
        os.write(1, json.dumps(answer).encode())
        os._exit(0)
    os.waitpid(first, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
