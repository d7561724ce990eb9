"""Environments, rollouts, evaluation: what turns a policy into steps."""

import ctypes
import sys


def _load_opengl() -> None:
    """Put the system's OpenGL into the process, where there is one, before anything imports EnvPool.

    MuJoCo's renderer looks for it among the symbols that are loaded when EnvPool is, and ends the process without.
    """
    for name in ("libEGL.so.1", "libGL.so.1", "libOSMesa.so.8"):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return


envpool_was_first = "envpool" in sys.modules  # then it is too late: see `actors.envpool_env._check_rendering`
if sys.platform == "linux":
    _load_opengl()
