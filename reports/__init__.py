"""What runs have written, as a web page or a table."""
