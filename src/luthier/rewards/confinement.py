"""What keeps a process from other processes, the network and files, by Linux's own means; standard library only.

Seccomp (seccomp(2)) refuses system calls, Landlock (landlock(7)) writing outside of one folder. Both need no privileges
and work in containers, where namespaces mostly do not. `sandboxed.py` is the process; it must not import Luthier.
"""

import ctypes
import errno
import os
import platform
import struct

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_* of <linux/audit.h>
_AT = {"x86_64": 0, "aarch64": 1}
REFUSED = {  # system call -> its number in each architecture, where it has it
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "setsid": (112, 157), "setpgid": (109, 154),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "socket": (41, 198), "io_uring_setup": (425, 425), "bpf": (321, 280), "perf_event_open": (298, 241),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "setrlimit": (160, 164),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip
OF_ITSELF = {"kill": (62, 129), "tgkill": (234, 131)}  # signals, to its own process only
CLONE, CLONE3, PRLIMIT64 = (56, 220), (435, 435), (302, 261)
CLONE_THREAD = 0x10000

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF
ALLOW, KILL = 0x7FFF0000, 0x80000000
NUMBER, ARCH = 0, 4  # offsets into struct seccomp_data; arguments follow at 16


def _refuse(code: int = errno.EPERM) -> int:
    return 0x00050000 | code


def _argument(i: int, high: bool = False) -> int:
    return 16 + 8 * i + 4 * high


def program(machine: str, process: int) -> list[tuple[int, int, int, int]]:
    """Instructions (code, jump if true, jump if false, operand): no new process, no network, no hand on another one."""
    at = _AT[machine]
    made = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, ARCHITECTURES[machine]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if machine == "x86_64":  # the x32 numbers are other names of the same calls
        made += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, _refuse())]
    for number in (numbers[at] for numbers in REFUSED.values()):
        if number is not None:
            made += [(EQUAL, 0, 1, number), (RETURN, 0, 0, _refuse())]
    # The C library tries `clone` where there is no `clone3`, whose flags a filter cannot read.
    made += [(EQUAL, 0, 1, CLONE3[at]), (RETURN, 0, 0, _refuse(errno.ENOSYS))]
    for number, offset, test, wanted in (
        (CLONE[at], _argument(0), ANY_BIT, CLONE_THREAD),  # threads only
        *((numbers[at], _argument(0), EQUAL, process) for numbers in OF_ITSELF.values()),
        (PRLIMIT64[at], _argument(2), EQUAL, 0),  # reads limits, sets none
    ):
        made += [(EQUAL, 0, 4, number), (LOAD, 0, 0, offset), (test, 1, 0, wanted), (RETURN, 0, 0, _refuse())]
        made += [(RETURN, 0, 0, ALLOW)]
    return [*made, (RETURN, 0, 0, ALLOW)]


def refuse_calls() -> None:
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no table of system calls of {machine}")
    code = b"".join(struct.pack("=HBBI", *line) for line in program(machine, os.getpid()))
    kept = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(kept))
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    _checked(libc.prctl(22, 2, ctypes.c_char_p(header), 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


WRITING = 0x1FF2  # WRITE_FILE, REMOVE_*, MAKE_* of <linux/landlock.h>
REFER, TRUNCATE, WRITE_FILE = 1 << 13, 1 << 14, 1 << 1


def write_only_in(folder: str) -> None:
    """Files are changed, made and removed beneath this folder only, and nothing but /dev/null is written elsewhere."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(444, None, 0, 1)
    _checked(version)
    handled = WRITING | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    rules = _checked(libc.syscall(444, ctypes.c_char_p(struct.pack("=Q", handled)), 8, 0))
    for path, allowed in ((folder, handled), ("/dev/null", handled & (WRITE_FILE | TRUNCATE))):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _checked(libc.syscall(445, rules, 1, ctypes.c_char_p(struct.pack("=Qi", allowed, place)), 0))
        os.close(place)
    _checked(libc.prctl(38, 1, 0, 0, 0))
    _checked(libc.syscall(446, rules, 0))
    os.close(rules)


def drop_capabilities() -> None:
    """What the superuser may do beyond others, limits raised by hand included."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.c_char_p(struct.pack("=Ii", 0x20080522, 0))
    _checked(libc.capset(header, ctypes.c_char_p(bytes(24))))


def end_with_parent() -> None:
    """Die when the one that started this process does."""
    _checked(ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0))  # PR_SET_PDEATHSIG, SIGKILL


def confine(folder: str) -> None:
    """All of it; OSError where the system lacks a part."""
    end_with_parent()
    drop_capabilities()
    write_only_in(folder)
    refuse_calls()


def _checked(outcome: int) -> int:
    if outcome < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return outcome
