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

SCRIPTS = {
    "digits": HEAD + b"p.add_argument('--x', default=round(5, -10**9))" + TAIL,
    "powers": HEAD + b"p.add_argument('--x', default=9**9**9)\np.add_argument('--y', default=2.0**-10**9)" + TAIL,
    "shifts": HEAD + b"p.add_argument('--x', default=1<<(1<<40))" + TAIL,
    "repeats": HEAD + b"p.add_argument('--x', default='a'*10**10)\np.add_argument('--y', default=[0]*10**9)" + TAIL,
    "formats": HEAD
    + b"p.add_argument('--x', default='%99999999999d' % 1)\np.add_argument('--y', default=f'{1:{10**9}}')"
    + TAIL,
    "number": HEAD + b"p.add_argument('--x', default=" + b"9" * 4000 + b")" + TAIL,
    "doubling": HEAD + b"x = 'ab'\n" + b"x = x + x\n" * 200 + b"p.add_argument('--x', default=x)" + TAIL,
    "shared lists": HEAD + b"x = [1]\n" + b"x = [x, x]\n" * 200 + b"p.add_argument('--x', default=x)" + TAIL,
    "deep list": HEAD + b"x = [1]\n" + b"x = [x]\n" * 300 + b"p.add_argument('--x', default=x)" + TAIL,
    "no numbers": HEAD + b"n = float('nan')\np.add_argument('--x', choices=[n, 1.0], default=[float('inf')])" + TAIL,
    "no words": HEAD + b"p.add_argument('--x', action=[], nargs={}, dest=[1], help=[], metavar={}, type=[])" + TAIL,
    "half characters": HEAD
    + b"p.add_argument('--x\\ud800', help='\\udfff', choices=['\\ud800'], default='\\ud800')"
    + TAIL,
    "controls": HEAD + b"p.add_argument('--x\\x1b[2J', help='\\x1b]0;owned\\x07', default='\\x00')" + TAIL,
    "calls": HEAD
    + b"def f0(): p.add_argument('--x')\n"
    + b"".join(b"def f%d(): f%d(); f%d()\n" % (n + 1, n, n) for n in range(40))
    + b"f40()"
    + TAIL,
    "chain": HEAD
    + b"".join(b"def f%d(): f%d()\n" % (n, n + 1) for n in range(3000))
    + b"def f3000(): p.parse_args()\nf0()",
    "branches": HEAD + b"import os\n" + b"".join(b"a%d = 1\nif os.x: b%d = 2\n" % (n, n) for n in range(2000)) + TAIL,
    "options": HEAD
    + b"g = p.add_mutually_exclusive_group()\n"
    + b"".join(b"g.add_argument('--x%d')\n" % n for n in range(3000))
    + TAIL,
    "classes": b"".join(b"class C%d(C%d): pass\n" % (n + 1, n) for n in range(2000)) + HEAD + TAIL,
    "itself": HEAD + b"def f(): return f()\nclass C:\n    def __init__(self): C()\nf()\nC()" + TAIL,
    "parents": HEAD + b"p = argparse.ArgumentParser(parents=[p, p, p])\n" * 30 + TAIL,
    "slow": SLOW,
    "wordy": WORDY,
    "wide": WIDE,
    "parentheses": b"(" * 5_000 + b")" * 5_000,
    "signs": b"x = " + b"-" * 100_000 + b"1",
    "sum": b"x = " + b"+".join([b"1"] * 50_000),
    "blocks": b"".join(b" " * depth + b"if x:\n" for depth in range(500)) + b" " * 500 + b"pass",
    "attributes": b"x" + b".y" * 100_000,
    "subscripts": b"x" + b"[0]" * 100_000,
    "lambdas": b"lambda: " * 20_000 + b"1",
    "elifs": b"if x: pass\n" + b"elif x: pass\n" * 20_000,
    "f-strings": b"x = " + b"f'{" * 100 + b"1" + b"}'" * 100,
    "bytes": bytes(range(256)) * 100,
    "encoding": b"# coding: punycode\n" + b"a" * 50_000,
    "unknown encoding": b"# coding: no-such-codec\nx = 1",
    "zeros": b"\0" * 100_000,
}
"""Every kind of script that held up a reader, or was meant to."""
