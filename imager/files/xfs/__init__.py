"""Reads XFS, version 4 and 5.

Source: the XFS Algorithms & Data Structures document (xfs-documentation) and Linux
fs/xfs/libxfs/xfs_format.h, xfs_da_format.h, xfs_log_format.h. All integers big-endian.
"""
