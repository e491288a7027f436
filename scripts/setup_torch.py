"""Install the pinned torch: the CPU build where the package index offers one, else say how large the download is.

A CPU build has a local version (2.13.0+cpu) that pip prefers over the plain one wherever it is on offer. Where it is
not, the plain build brings CUDA packages of several gigabytes; the size is printed before anything is fetched.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

PIP = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]


def main() -> None:
    """Look, tell, install."""
    text = Path("constraints.txt").read_text(encoding="utf-8")
    match = re.search(r"^torch==(\S+)$", text, flags=re.MULTILINE)
    if match is None:
        sys.exit("constraints.txt has no line torch==VERSION")
    wanted = f"torch=={match.group(1)}"
    look = subprocess.run(
        [*PIP, "--dry-run", "--no-deps", "--report", "-", wanted], capture_output=True, text=True, check=False
    )
    if look.returncode != 0:
        sys.exit(f"pip can't find {wanted} for this Python:\n{look.stderr.strip()}")
    found = json.loads(look.stdout)["install"]
    version = found[0]["metadata"]["version"] if found else "installed already"
    if found and "+cpu" not in version and sys.platform == "linux":
        print(
            f"torch {version}: no CPU build on offer from your package index. The plain build with its CUDA packages "
            "is a download of about 3 GB. To take the CPU build (about 200 MB), point PIP_EXTRA_INDEX_URL or "
            "PIP_FIND_LINKS at a place that has it and run make again.",
            flush=True,
        )
    else:
        print(f"torch {version}", flush=True)
    subprocess.run([*PIP, "--constraint", "constraints.txt", wanted], check=True)


if __name__ == "__main__":
    main()
