"""Ranks without a launcher: each in a process of its own, forked from the test, with rank 0 in the test's own process or not."""
