"""Scripts that are written to hold up whoever reads them."""

HEAD = b"import argparse\np = argparse.ArgumentParser()\n"
TAIL = b"\np.parse_args()\n"

SLOW = (
    HEAD
    + b"x = ["
    + b"1," * 900
    + b"]\ndef f0():\n    x == x\n    x == x\n    x == x\n"
    + b"".join(b"def f%d():\n" % (n + 1) + b"    f%d()\n" % n * 3 for n in range(10))
    + b"f10()\n"
    + TAIL
)
"""Ten thousands of comparisons of long lists: within all that the evaluation bounds, and yet minutes of work."""

WIDE = b"a;" * 250_000
"""Half a megabyte of source whose tree takes hundreds of megabytes."""

WORDY = HEAD + b"".join(b"p.add_argument('--x%d', help='%s')\n" % (n, b"word " * 100) for n in range(500)) + TAIL
"""Options with more to say than anybody reads."""
