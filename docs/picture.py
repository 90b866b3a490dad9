"""Take the README's picture: the custom-scalars page of a run, in headless Chromium.

python docs/picture.py runs docs/dashboard.png
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time

from tensorboard import program


def main(log_dir: str, picture: str) -> None:
    """Serve the runs and take one screenshot."""
    board = program.TensorBoard()
    board.configure(argv=["tensorboard", "--logdir", log_dir, "--port", "0", "--load_fast", "false"])
    url = board.launch()
    time.sleep(8)  # the reader loads the runs in the background
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no chromium on PATH")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        flags += ["--disable-background-networking", f"--user-data-dir={profile}"]
        flags += ["--window-size=1500,1660", "--virtual-time-budget=30000", f"--screenshot={picture}"]
        subprocess.run([chromium, *flags, f"{url}#custom_scalars"], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
