"""Records to train on: those of a file that are left when what is measured on is taken out, with every record about one of its subjects.

python bench/apart.py zsre.json zsre_rest.json --first 600 --without zsre.json:600 --without counterfact-edit.json:500
comeba train SERAC MODEL --train counterfact_rest.json --train zsre_rest.json --config named.yaml --out reader
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from comeba_ext.data import read_requests


def counted(text: str):
    """``FILE`` or ``FILE:COUNT``, its first records."""
    file, _, count = text.rpartition(":")
    return (file, int(count)) if file and count.isdigit() else (text, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, help="JSON file of records")
    parser.add_argument("out", type=Path, help="JSON file of those that are left")
    parser.add_argument("--first", type=int, default=0, help="the first record to take, from 0")
    parser.add_argument("--count", type=int, help="how many records to look at")
    parser.add_argument("--without", action="append", default=[], metavar="FILE[:COUNT]", help="records that are measured on; repeatable")
    args = parser.parse_args()
    measured = {request.subject for own in args.without for request in read_requests(*counted(own)).requests}
    found = read_requests(args.records).requests[args.first :][: args.count]
    left = [request.to_record() for request in found if request.subject not in measured]
    args.out.write_text(json.dumps(left, indent=1) + "\n", encoding="utf-8")
    print(f"{len(left)} of {len(found)} records -> {args.out}; {len(measured)} subjects are measured on")


if __name__ == "__main__":
    main()
