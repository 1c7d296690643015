"""A stand-in for the commands of a fleet: `python stand_in.py ACTION FOLDER [--record FILE] [--do WHAT]`.

ACTION "train" leaves a run in FOLDER, "write" a page and a report. Each call appends a line to FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["train", "write"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--label", default="")
    parser.add_argument("--do", default="")
    parser.add_argument("--setting", default="")
    arguments = parser.parse_args()
    calls = 0
    if arguments.record:
        with open(arguments.record, "a+", encoding="utf8") as file:
            file.write(f"{arguments.label}\n")
            file.seek(0)
            calls = file.read().splitlines().count(arguments.label)
    print(f"stand-in {arguments.action} {arguments.folder}", flush=True)
    if arguments.do == "kill-worker" and calls == 1:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    if arguments.do == "crash-once" and calls == 1:
        raise ConnectionError("the file server did not answer")
    if arguments.do == "crash":
        raise ValueError("0 images were found")
    if arguments.do == "fill-disk":
        with open("/dev/full", "w", encoding="utf8") as file:
            file.write("weights" * 10000)
    if arguments.do == "out-of-memory":
        raise MemoryError("tried to allocate 20.00 GiB")
    if arguments.do.startswith("sleep-once") and calls == 1:
        time.sleep(float(arguments.do.partition("=")[2]))
    if arguments.action == "train":
        print("Step 5: 21.50 dB against the teacher on held-out views.", flush=True)
        checkpoints = arguments.folder / "nerfstudio_models"
        checkpoints.mkdir(parents=True, exist_ok=True)
        (checkpoints / "step-000000005.ckpt").write_bytes(b"weights")
        (arguments.folder / "config.yml").write_text(f"setting: {arguments.setting}\n")
    else:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        (arguments.folder / "index.html").write_text(f"<p>{arguments.setting}</p>")
        report = {"mean": {"student": {"psnr": 24.5, "ssim": 0.9}, "teacher": {"psnr": 26.25}}}
        (arguments.folder / "report.json").write_text(json.dumps(report))
    sys.exit(0)


if __name__ == "__main__":
    main()
