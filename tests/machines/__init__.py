"""Machines for tests, the demo and the benchmark: real disks, and the QEMU that boots them."""
