"""Read a set through loader workers, as training does, and print how it ends.

python loader_probe.py SHARDS SIZE WORKERS PREFETCH OPEN_FILES SIGNAL
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import psutil

from gigabatch.data.decode.fields import Fields
from gigabatch.data.decode.images import ImageSettings
from gigabatch.data.failures import as_failure
from gigabatch.data.order.assignment import EvalPlans
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.stream import open_stream


def main(shards: str, size: int, workers: int, prefetch: int, open_files: int, number: int) -> None:
    index = open_index(Path(shards))
    stream = open_stream(
        [index], EvalPlans(len(index), 1, 1, 0), fields=Fields(ImageSettings(size=size)),
        tokenizer=None, seed=1, workers=workers, prefetch=prefetch,
    )  # fmt: skip
    if open_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    batches = []  # keeping them keeps their shared memory and open files
    began = time.monotonic()
    try:
        for batch in stream:
            batches.append(batch)
            if number and len(batches) == 1:
                (child,) = psutil.Process().children()
                child.send_signal(number)
    except Exception as error:
        failure = as_failure(error)
        print(f"{type(failure).__name__}: {failure}")
        print(f"after {time.monotonic() - began:.0f} s")
        sys.stdout.flush()
        os._exit(2)  # torch's handler would raise again while Python shuts down
    print(f"read {len(batches)}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
