"""pip's settings (``pip config list``, from stdin) as arguments of ``uv pip install``, one a line."""

import shlex
import sys

OPTIONS = {"index-url": "--default-index", "extra-index-url": "--index", "find-links": "--find-links", "constraint": "--constraints"}
# As pip does it: the best version of all indexes, and the machine's own certificates.
found = ["--index-strategy", "unsafe-best-match", "--system-certs"]
for line in sys.stdin:
    name, _, value = line.strip().partition("=")
    option = OPTIONS.get(name.rpartition(".")[2])
    for one in " ".join(shlex.split(value)).split() if option else ():
        if one not in found:
            found += [option, one]
print("\n".join(found))
