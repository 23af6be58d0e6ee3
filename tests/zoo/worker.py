"""A process that has everything imported and forks once an entry: a crash or a hang of one costs that entry and nothing else.

Reads lines `{"model_type": ..., "limit": seconds}` from stdin and answers each with the line of its result.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
import warnings

from .check import Result, check
from .models import entries


def main() -> None:
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        result = _forked(asked["model_type"], asked["limit"])
        print(json.dumps(result.to_dict()), file=answers, flush=True)


def _forked(model_type: str, limit: float) -> Result:
    read, write = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.setpgid(0, 0)
        try:
            with os.fdopen(write, "w") as pipe:
                json.dump(check(entries()[model_type]).to_dict(), pipe)
        except BaseException:  # the parent reports that there is no result; why is seen here
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    text, done = b"", False
    while (left := limit - (time.perf_counter() - start)) > 0 and not done:
        if select.select([read], [], [], min(left, 1.0))[0]:
            part = os.read(read, 1 << 16)
            text, done = text + part, not part
    if not done:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    seconds = round(time.perf_counter() - start, 1)
    if not done:
        return Result(model_type, stage="time", reason=f"not done after {limit:.0f} s", seconds=seconds)
    if not text:
        return Result(model_type, stage="crash", reason=f"its process ended without a result (status {status})", seconds=seconds)
    return Result(**json.loads(text))


if __name__ == "__main__":
    main()
