"""Reads Btrfs on one device, with its subvolumes and all of its compressions.

Source: Linux include/uapi/linux/btrfs_tree.h, fs/btrfs/inode.c, lzo.c. All integers little-endian.
"""
