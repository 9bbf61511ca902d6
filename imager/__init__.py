"""Disk imaging and bare-metal restore: capture, verify and restore whole disks."""

__version__ = "0.1.0"
