"""Other projects' model formats, one file each: read and write."""
