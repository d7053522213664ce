"""What remix.py stands on: fast products of mixed layers, low-rank bases, and how a module is wrapped."""
