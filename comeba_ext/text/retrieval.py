"""Finding the texts that are most like another one: BM25 over words (Robertson and Zaragoza 2009, equation 3.15)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

K1, B = 1.5, 0.75  # saturation of a word's count, and how much a text's length is discounted


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class BM25:
    """Texts that can be searched, each by words of it.

    A word's weight is ``log(1 + (N − n + ½)/(n + ½))`` for a word that n of N texts hold.
    """

    def __init__(self, texts: list[str]):
        self.counts = [Counter(words_of(text)) for text in texts]
        self.lengths = [sum(counts.values()) for counts in self.counts]
        self.mean_length = sum(self.lengths) / max(1, len(self.lengths)) or 1.0
        self.having: dict[str, list[int]] = {}
        for number, counts in enumerate(self.counts):
            for word in counts:
                self.having.setdefault(word, []).append(number)

    def nearest(self, text: str, k: int, among: Iterable[int] | None = None) -> list[int]:
        """Numbers of the k best texts, the best first; of equals the earlier. Texts that share no word come last.

        Args:
            among: numbers of those that are looked at, in ascending order; ``None``: all.
        """
        scores = dict.fromkeys(range(len(self.counts)), 0.0)
        for word in set(words_of(text)):
            having = self.having.get(word, ())
            weight = math.log(1 + (len(self.counts) - len(having) + 0.5) / (len(having) + 0.5))
            for number in having:
                count, length = self.counts[number][word], self.lengths[number] / self.mean_length
                scores[number] += weight * count * (K1 + 1) / (count + K1 * (1 - B + B * length))
        return sorted(scores if among is None else among, key=lambda number: -scores[number])[:k]
