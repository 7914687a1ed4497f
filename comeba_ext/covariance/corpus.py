"""A corpus as *units*: batches of token ids of like length, the same whatever runs them.

Every ``POOL_TOKENS`` tokens, whole texts at a time, are cut into pieces and grouped into dense batches. A unit is what a
process is dealt, what a checkpoint counts, and the most that one forward pass computes. Units depend on the texts alone, not
on the number of processes, devices or the size of batches.

Rows are padded rather than packed: grouping over a pool this large leaves 1 % of padding (0.9 % on Wikipedia articles, 0.9 %
on the embedded model's texts; 23 % and 32 % when pools are as small as a batch; ``bench/bench_covariance.py`` prints it),
less than block-diagonal attention masks for packed rows would cost, and every family's own mask and positions serve.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator

from comeba_ext.errors import CovarianceError
from comeba_ext.text.encoding import dense_batches

POOL_TOKENS = 131072
UNIT_TOKENS = 4096  # padded
LAUNCH = 64  # of which starting a unit is worth


@dataclasses.dataclass
class Unfinished:
    """Which part of a corpus the sums of an unfinished collection hold.

    Attributes:
        first_text: texts that an earlier, finished collection consumed; the units begin after them.
        first_token: tokens that one summed.
        units: numbers of the units in the sums.
        read: number of units read, whoever summed them, and ``digest`` of their token ids: to know the texts again.
        corpus: digest of the first ``first_text`` texts (:class:`Digest`); empty where nobody noted it.
    """

    first_text: int = 0
    first_token: int = 0
    units: set[int] = dataclasses.field(default_factory=set)
    read: int = 0
    digest: str = ""
    corpus: str = ""


class Digest:
    """SHA-256 of texts, one after the other, and their ``count``."""

    def __init__(self) -> None:
        self._hash, self.count = hashlib.sha256(), 0

    def add(self, text: str) -> None:
        self.count += 1
        self._hash.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())

    def __str__(self) -> str:
        return self._hash.hexdigest()


def corpus_digest(texts: Iterable[str], count: int) -> str:
    """Digest of the first ``count`` texts; of all, if there are fewer."""
    digest = Digest()
    for text in itertools.islice(texts, count):
        digest.add(text)
    return str(digest)


class Units:
    """The units of a corpus in order: ``(number, rows of token ids)``.

    Attributes:
        read: units read so far, and ``digest`` of their token ids.
        texts: texts read so far, and ``corpus`` of them.

    Iterating raises :class:`CovarianceError` where the texts turn out to be others than those summed before.
    """

    def __init__(self, tokenizer, texts: Iterable[str], where: Unfinished, wanted: int, limit: int):
        self.tokenizer, self.source, self.where, self.wanted, self.limit = tokenizer, texts, where, wanted, limit
        self.read, self.texts, self._hash = 0, where.first_text, hashlib.sha256()
        self.corpus = Digest()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[tuple[int, list[list[int]]]]:
        for rows in self._pools():
            lengths = [len(row) for row in rows]
            # Units must depend on the texts only.
            for group in dense_batches(lengths, UNIT_TOKENS, LAUNCH):
                number, unit = self.read, [rows[n] for n in group]
                for row in unit:
                    self._hash.update(array("q", row).tobytes())
                self.read += 1
                if self.read == self.where.read and self.digest != self.where.digest:
                    raise self._other_texts()
                yield number, unit
        if self.read < self.where.read:
            raise self._other_texts()

    def _pools(self) -> Iterator[list[list[int]]]:
        """Rows of about ``POOL_TOKENS`` tokens; the last text is cut to the token, whatever the size of batches."""
        rows: list[list[int]] = []
        left, pooled = self.wanted - self.where.first_token, 0
        for number, text in enumerate(self.source, 1):
            self.corpus.add(text)
            if number <= self.where.first_text:
                if number == self.where.first_text and self.where.corpus not in ("", str(self.corpus)):
                    raise self._other_texts()
                continue
            ids = self.tokenizer(text, verbose=False)["input_ids"][:left]
            rows += [ids[i : i + self.limit] for i in range(0, len(ids), self.limit)]
            self.texts, left, pooled = number, left - len(ids), pooled + len(ids)
            if pooled >= POOL_TOKENS or not left:
                yield rows
                rows, pooled = [], 0
            if not left:
                return
        if self.where.corpus and self.corpus.count < self.where.first_text:  # fewer than it was begun with
            raise self._other_texts()
        if rows:
            yield rows

    def _other_texts(self) -> CovarianceError:
        return CovarianceError("the texts are not those that the covariance was begun with; give the same again, or choose another file")
