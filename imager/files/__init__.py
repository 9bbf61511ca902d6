"""The files inside of an image's filesystems, read without root and without mounting."""
