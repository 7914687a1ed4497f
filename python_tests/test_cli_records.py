"""Which records of a file are made, beside the edits that a folder holds."""

import dataclasses

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from comeba_ext.cli.records import clashes, to_make
from comeba_ext.memory.ledger import Entry, Ledger
from comeba_ext.text.request import EditRequest

FACTS = [("{} is in", "Oslo"), ("{} is by", "Oslo"), ("{} is in", "Lima")]


class Kept:
    """What :func:`to_make` looks at, as an editor of a method without a model would have it."""

    def __init__(self):
        self.ledger, self.log, self.step = Ledger(), [], 0

    def edit(self, batch, refused=()):
        self.step += 1
        for request in batch:
            if request.target_new not in refused:
                for entry in self.ledger.of_fact(request.fact):
                    self.ledger.remove(entry, self.step)
                self.ledger.add(Entry(dataclasses.replace(request, request_id=f"{self.step}-{request.asked}"), self.step))
        declined = [{"prompt": r.text, "subject": r.subject, "target_new": r.target_new} for r in batch if r.target_new in refused]
        self.log.append({"event": "edit", "step": self.step, "declined": declined})

    def retract(self, entry):
        self.step += 1
        self.ledger.remove(entry, self.step)

    def live(self):
        return {entry.request.fact: entry.request.target_new for entry in self.ledger.live()}

    def run(self, file, refused=(), stop=None):
        made = to_make(file, self).requests[:stop]
        for request in made:
            self.edit([request], refused)
        return made


asked = st.builds(lambda fact, target: EditRequest(*fact, target), st.sampled_from(FACTS), st.sampled_from(["A", "B", "C"]))


@given(before=st.lists(asked, max_size=4), file=st.lists(asked, min_size=1, max_size=8), taken=st.integers(0, 3), kills=st.integers(0, 4))
@settings(max_examples=400, deadline=None)
def test_a_file_that_is_run_again_ends_as_it_says_and_then_makes_nothing(before, file, taken, kills):
    whole, kept = Kept(), Kept()
    for own in (whole, kept):
        own.run(before)
        for entry in own.ledger.live()[:taken]:
            own.retract(entry)
    last = whole.live() | {request.fact: request.target_new for request in file}
    whole.run(file)
    for _ in range(kills):
        kept.run(file, stop=1)  # killed behind every edit
    kept.run(file)
    assert whole.live() == kept.live() == last
    for own in (whole, kept):
        assert own.run(file) == []  # no circles


@given(file=st.lists(asked, min_size=1, max_size=8), stop=st.integers(0, 8))
@settings(max_examples=300, deadline=None)
def test_what_a_killed_run_goes_on_with_is_what_it_had_before_it(file, stop):
    """Where no fact returns to what it was, the edits are those of an undisturbed run, one by one."""
    changes = {}
    for request in file:
        own = changes.setdefault(request.fact, [])
        if own[-1:] != [request.target_new]:
            own.append(request.target_new)
    assume(all(len(set(own)) == len(own) for own in changes.values()))
    whole, killed = Kept(), Kept()
    expected = whole.run(file, refused="C")
    assert killed.run(file, refused="C", stop=stop) + killed.run(file, refused="C") == expected


def test_back_to_what_was_is_an_edit():
    a, b = (EditRequest(*FACTS[0], target) for target in "AB")
    kept = Kept()
    for request in (a, b, a, b):
        assert kept.run([request]) == [request]
    assert kept.run([a, b]) == [] and kept.run([b]) == []
    kept.retract(kept.ledger.live()[0])
    assert kept.run([b]) == [b]


def test_what_was_declined_is_tried_again_where_it_is_asked_for():
    a, c = (EditRequest(*FACTS[0], target) for target in "AC")
    kept = Kept()
    assert kept.run([a, c, c], refused="C") == [a, c]
    assert kept.run([a, c, c], refused="C") == [] and to_make([c], kept, again=True).requests == [c]
    kept.log.append({"event": "rollback", "step": 0})
    assert to_make([c], kept).requests == [c]


def test_records_that_clash_are_named():
    a, b, other = (EditRequest(*fact, target) for fact, target in ((FACTS[0], "A"), (FACTS[0], "B"), (FACTS[1], "A")))
    found = clashes([(0, a), (2, other), (3, b), (5, b)])
    assert found.contradicting == [{"prompt": a.text, "records": [0, 3, 5], "targets": ["A", "B"]}]
    assert found.duplicates == [{"prompt": a.text, "records": [3, 5], "target": "B"}]
    assert found.counts == {"overtaken": 1, "repeated": 1} and clashes([(0, a), (2, other)]).counts == {}
