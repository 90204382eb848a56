"""What holds for every test."""

import os

# Before torch is loaded: threads that spin while they wait for each other make everything slow where programs share the CPUs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
