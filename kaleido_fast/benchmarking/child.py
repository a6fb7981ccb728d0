"""The process of one contestant: answers what `kaleido_fast.benchmarking.apart` asks, over a pipe."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer until the other end of the pipe is closed, or its process is gone."""
    with contextlib.suppress(ValueError):  # outside of the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    _die_with(int(sys.argv[1]))
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull) as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what a library prints must not stand between two answers

    import torch

    from kaleido_fast.benchmarking.contest import one_line
    from kaleido_fast.benchmarking.host import Host

    host = Host()
    _answer(answers, (True, "ready"))
    while True:
        try:
            what, args = pickle.load(requests)
        except EOFError:
            return
        try:
            if what == "check":  # states come in files: hundreds of megabytes do not belong into a pipe
                args = (torch.load(args[0]), [torch.load(path) for path in args[1]])
            answer = getattr(host, what)(*args)
            if what != "time":
                del args
                return_memory()
            _answer(answers, (True, answer))
        except Exception as problem:  # of another project's library
            _answer(answers, (False, one_line(problem)))


def return_memory() -> None:
    """Give freed memory back to the system, where the C library can: many processes hold a network each."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _answer(answers: object, answer: tuple[bool, object]) -> None:
    pickle.dump(answer, answers)  # type: ignore[arg-type]
    answers.flush()  # type: ignore[attr-defined]


def _die_with(parent: int) -> None:
    """End this process with its parent, however that ends, where the system can: a stopped one cannot notice."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    main()
