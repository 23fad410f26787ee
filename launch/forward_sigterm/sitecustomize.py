"""Python runs this at its start: process 1 restarts under forward_sigterm.sh, see launch/tuner.py."""

import os

if os.getpid() == 1 and "FORWARDING_SIGTERM" not in os.environ:
    os.environ["FORWARDING_SIGTERM"] = "1"
    with open("/proc/self/cmdline") as file:
        words = file.read().split("\0")[:-1]
    script = os.path.join(os.path.dirname(__file__), "forward_sigterm.sh")
    os.execvp("bash", ["bash", script, *words])  # noqa: S606, S607
