"""Points at which a fault-injection test may let a process die. Standard library only.

The supervisor is a program of its own that cannot import `app`: it runs this file by its path, in such tests only.
"""

import os
import signal


def fault_point(name: str) -> None:
    """Die here, as by kill -9, if a test asks for it: DEEPE_FAULT_POINT=NAME, or NAME=FILE to die only once.

    DEEPE_FAULT_SIGNAL names another signal: STOP freezes.
    """
    wanted, _, once = os.environ.get("DEEPE_FAULT_POINT", "").partition("=")
    if name != wanted:
        return
    if once:
        try:
            os.close(os.open(once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    os.kill(os.getpid(), signal.Signals[f"SIG{os.environ.get('DEEPE_FAULT_SIGNAL', 'KILL')}"])
