"""The ways in which a metric is scored: suffix of its name to a heading and what it says, in one line."""

from __future__ import annotations

WRITTEN = {  # what is believed first: see comeba_ext.evaluation.written
    "_written": ("written", "what the model writes behind the prompt alone, up to its natural end, is the answer or opens with it"),
    "_judged": ("judged", "a judge finds that what it writes says the answer (not asked for locality; without a verdict: left out)"),
    "_similarity": ("similarity", "ROUGE-L (F1, words) of what it writes and the answer, for answers as long as a paragraph"),
    "_contained": ("contained", "the answer stands in what it writes (which a wrong answer can hold as well)"),
}
HALLUCINATION = "the new answer stands in what is written to other facts' prompts, and did not before the edits"
FORCED = {  # EasyEdit's, and two that ask for more: they know the answer or its length while they score
    "": ("teacher-forced", "share of the answer's tokens that are the model's first choice, given those before"),
    "_exact": ("exact", "all of them are"),
    "_generation": ("greedy generation", "as many tokens as the answer has, written greedily, are the answer's"),
}
WAYS = WRITTEN | FORCED
