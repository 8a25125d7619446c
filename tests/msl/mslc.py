#!/usr/bin/env python3
"""Checks .metal files strictly, and builds them for the CPU, with clang on Linux. See README.md."""
import sys

from mslc.driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
