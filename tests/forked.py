"""Start a run again and again, each time in a forked child, so that the imports are paid for once.

    python -m tests.forked JOBS.json RESULTS.json

JOBS is a list of {"config": values, "launches": [...]}; a launch is {"fault": "point:n"}, {"kill_after": 1.4} in
iterations of its own, or {}. A job goes on with `resume` wherever a checkpoint is there, until a launch ends by itself.
RESULTS is a list, for each job, of the exit codes (-9 = killed).
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
    folder = Path(values["output_dir"])
    before = started(folder)
    pid = os.fork()
    if pid == 0:
        child(values, fault)
    status = None
    if kill_after is not None:
        status = killed(pid, folder, before, kill_after)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1] if status is None else status)


def killed(pid, folder, before, iterations):
    """Kill a run so many of its iterations after it began; its wait status if it ended before."""
    whole, share = divmod(iterations, 1)
    rows, deadline = None, None
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        if rows is None and started(folder) != before:
            rows = lines(folder)
        if rows is not None and deadline is None and lines(folder) >= rows + whole:
            deadline = time.monotonic() + share * SECONDS[0]
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            return None
        time.sleep(0.002)


def started(folder):
    """Changes when a run begins: it writes its config anew."""
    path = folder / "config.yaml"
    return path.stat().st_ino if path.exists() else None


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


SECONDS = []
"""What an iteration of the first job took, with its share of evaluations and checkpoints."""


def main():
    jobs = json.loads(Path(sys.argv[1]).read_text())
    results = []
    for job in jobs:
        codes, left = [], list(job["launches"])
        while True:
            what = left.pop(0) if left else {}
            codes.append(launch(job["config"], what.get("fault", ""), what.get("kill_after")))
            if codes[-1] != -signal.SIGKILL:
                break
        results.append(codes)
        if not SECONDS and codes == [0]:
            folder = Path(job["config"]["output_dir"])
            took = (folder / "summary.json").stat().st_mtime - (folder / "config.yaml").stat().st_mtime
            SECONDS.append(took / job["config"]["iterations"])
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
