"""What several tests share: the command line, disks and file trees made for tests, faulty files."""
