"""The shipped embedded model is worth editing: recall, causal patching, key geometry and single edits, on its weights."""

import itertools

import pytest

from comeba_ext import testbed
from comeba_ext.testbed.diagnose import LIMITS, diagnose, single_edits


@pytest.fixture(scope="module")
def loaded():
    return testbed.load()


@pytest.fixture(scope="module")
def diagnosis(loaded):
    return diagnose(*loaded)


@pytest.mark.parametrize("name", [n for n in LIMITS if not n.startswith("single_edit")])
def test_diagnosis_meets_its_limit(diagnosis, loaded, name):
    sign, limit = LIMITS[name]
    values = diagnosis[name]
    if isinstance(values, list):  # one a block; the edited ones count
        values = [values[block] for block in loaded[0].config.comeba_ext["layers"]]
        assert len(values) >= 3
    else:
        values = [values]
    for value in values:
        assert value >= limit if sign == ">=" else value <= limit


def test_facts_are_not_looked_up_at_the_end_of_the_prompt(diagnosis):
    assert max(diagnosis["patch_final_token"]) <= 0.05


def test_single_edits_rolled_back(loaded):
    # The full hundred: python -m comeba_ext.testbed.diagnose --edits 100.
    result = single_edits(*loaded, count=10, first=300)
    for name, value in result.items():
        # Ten facts of two prompts each: the limit is checked up to one wrong prompt, which is 1/20.
        assert value >= LIMITS[name][1] - 1 / 20


def test_it_is_small_and_complete():
    files = list(testbed.FOLDER.iterdir())
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {f.name for f in files}
    assert sum(f.stat().st_size for f in files) <= 16e6


def test_facts_are_consistent():
    facts = testbed.facts()
    known = {(f["subject"], f["object"]) for f in testbed.raw_facts()}
    assert len(facts) == len({r.subject for r in facts}) > 1500
    reserved = {r.subject for r in facts[int(len(facts) * 0.8) :]}
    for request in facts:
        assert (request.subject, request.ground_truth) in known
        assert request.target_new != request.ground_truth
        assert all(request.subject in p for p in request.rephrase_prompts)
        assert len(request.rephrase_prompts) == 2 and len(request.locality_prompts) == 2
    for request in facts[: int(len(facts) * 0.8)]:
        for prompt, _ in request.locality_prompts:
            assert any(subject in prompt for subject in reserved)


def test_facts_and_texts_are_deterministic():
    assert testbed.facts() == testbed.facts()
    first, again = (list(itertools.islice(testbed.texts(), 20)) for _ in range(2))
    assert first == again and len(set(first)) == 20
