"""What holds for every test."""

import os

# Before torch is loaded. The tests' models are so small that a second thread costs more than it does; where a test asks for two,
# they must not spin while they wait, or everything gets slow where programs share the CPUs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
