"""Bootable rescue media that restores an image (not built yet)."""
