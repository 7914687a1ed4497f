"""The paper's score: the response to all edits, relative to the other tokens of the sequence."""

from __future__ import annotations

from comeba_ext.scores.response import ResponseScore


class ZScore(ResponseScore):
    """``z_t = (n_t − mean)/std`` over the tokens of a sequence, with ``n_t = ‖delta·x_t‖`` (arXiv 2403.05330, equation 9).

    In cached decoding the statistics of earlier tokens are carried with the cache (:func:`ops.hooked_linear.zscore`).
    """

    name = "zscore"
    start = 2.2  # section 4.1
    whole_sequence = True
