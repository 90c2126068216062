"""Start a run again and again, each time in a forked child, so that the imports are paid for once.

    python -m tests.forked JOBS.json RESULTS.json

JOBS is a list of {"config": values, "launches": [...]}; a launch is {"fault": "point:n"}, {"kill_after": share} of the
time that the first job took, or {}. A job goes on with `resume` wherever a checkpoint is there, until a launch ends by
itself. RESULTS is a list, for each job, of the exit codes (-9 = killed).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import diffusers
import transformers

from flowrl.checkpoint import entries
from flowrl.config import make_config
from flowrl.faults import VARIABLE
from flowrl.train import Trainer

# Names that are imported lazily: touched here, before the first fork.
WARM = (diffusers.StableDiffusion3Pipeline, diffusers.SD3Transformer2DModel, diffusers.AutoencoderKL,
        transformers.CLIPTextModelWithProjection, transformers.CLIPTokenizer)  # fmt: skip


def child(values, fault):
    os.environ[VARIABLE] = fault
    code = 1
    try:
        resume = bool(entries(Path(values["output_dir"]) / "checkpoints"))
        Trainer(make_config(values), resume=resume).run()
        code = 0
    except SystemExit as leave:
        code = leave.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launch(values, fault="", kill_after=None):
    pid = os.fork()
    if pid == 0:
        child(values, fault)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    jobs = json.loads(Path(sys.argv[1]).read_text())
    results, seconds = [], None
    for job in jobs:
        codes, left = [], list(job["launches"])
        while True:
            what = left.pop(0) if left else {}
            share = what.get("kill_after")
            start = time.monotonic()
            codes.append(launch(job["config"], what.get("fault", ""), None if share is None else share * seconds))
            seconds = seconds or time.monotonic() - start
            if codes[-1] != -signal.SIGKILL:
                break
        results.append(codes)
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
