"""Child processes that the kernel kills if they try to reach another machine.

The filters (seccomp) see system calls, hence also those of native libraries. Linux only.
"""

import ctypes
import os
import platform
import signal
import socket
from typing import Any

#: Exit code, as `subprocess` reports it, of a process that a filter killed.
KILLED = -signal.SIGSYS
#: Numbers of the system calls socket, connect and sendto.
_CALLS = {"x86_64": (41, 42, 44), "aarch64": (198, 203, 206)}

AVAILABLE = platform.system() == "Linux" and platform.machine() in _CALLS

_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF instructions
_KILL, _ALLOW = 0x80000000, 0x7FFF0000
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER_MODE = 22, 38, 2
_CALL, _FIRST_ARGUMENT, _FIFTH_ARGUMENT = 0, 16, 48  # offsets in struct seccomp_data


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("value", ctypes.c_uint),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.POINTER(_Instruction)))


def deny_connections() -> None:
    """Kill this process when it connects, or sends to an address; it may listen and answer."""
    _, connect, sendto = _CALLS[platform.machine()]
    _install(
        (_LOAD, 0, 0, _CALL),
        (_IF_EQUAL, 4, 0, connect),  # to _KILL
        (_IF_EQUAL, 0, 2, sendto),  # another call: to _ALLOW
        (_LOAD, 0, 0, _FIFTH_ARGUMENT),  # the address
        (_IF_EQUAL, 0, 1, 0),  # none: an answer on a connection
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _KILL),
    )


def deny_sockets() -> None:
    """Kill this process when it creates an IPv4 or IPv6 socket."""
    create, _, _ = _CALLS[platform.machine()]
    _install(
        (_LOAD, 0, 0, _CALL),
        (_IF_EQUAL, 0, 3, create),  # another call: to _ALLOW
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_IF_EQUAL, 2, 0, socket.AF_INET),
        (_IF_EQUAL, 1, 0, socket.AF_INET6),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _KILL),
    )


def _install(*instructions: tuple[int, int, int, int]) -> None:
    """Install a seccomp filter on this process and its children; for `preexec_fn`."""
    code = (_Instruction * len(instructions))(*(_Instruction(*each) for each in instructions))
    program = _Program(len(instructions), code)
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _FILTER_MODE, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
