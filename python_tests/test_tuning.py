"""The search for settings, on the embedded model: what it tries, what it keeps, and that it goes on where it stopped."""

import json
import random

import pytest
import torch
import yaml
from test_cli import output, run

from comeba_ext import EditConfig, covariance, testbed
from comeba_ext.errors import ComebaError
from comeba_ext.forward.architectures import Architecture
from comeba_ext.text.request import EditRequest
from comeba_ext.tuning import probes, search

pytestmark = pytest.mark.usefixtures("one_block")


@pytest.fixture(scope="module")
def small():
    return testbed.load()


def known_facts(model, tokenizer, count=60):
    return probes.known(model, tokenizer, probes.of_records(testbed.facts()[:count]))


def test_shipped_facts_are_whole():
    facts = probes.shipped()
    assert len(facts) > 300 and len({fact.group for fact in facts}) >= 8
    for fact in facts:
        assert fact.prompt.count("{}") == 1 and fact.subject in fact.text and fact.answer.strip() and fact.others
    assert facts == probes.shipped() != probes.shipped(seed=1)


def test_shipped_facts_are_not_what_is_measured_on(shared_data):
    subjects = {fact.subject for fact in probes.shipped()}
    for file in ("counterfact/counterfact-edit.json", "zsre/zsre_mend_eval_portability_gpt4.json", "qaedit/qaedit_500.json"):
        assert not subjects & {record["subject"] for record in json.loads((shared_data / file).read_text())}


def test_known_facts_are_what_the_model_writes(small):
    model, tokenizer = small
    facts = probes.of_records(testbed.facts()[:20])
    wrong = [probes.Fact(f.prompt, f.subject, "Zanzibar", f.group) for f in facts[:3]]
    known = probes.known(model, tokenizer, facts + wrong)
    written = []
    for fact in facts:
        ids = tokenizer(fact.text)["input_ids"]
        target = tokenizer(f"{fact.text} {fact.answer}")["input_ids"][len(ids) :]
        with torch.no_grad():
            out = model.generate(torch.tensor([ids]), max_new_tokens=len(target), do_sample=False)[0, len(ids) :].tolist()
        if out == target:
            written.append(fact)
    assert known == written and len(written) > 15


def test_patching_against_one_pair_at_a_time(small):
    model, tokenizer = small
    architecture = Architecture.of(model)
    facts = known_facts(model, tokenizer)
    found = probes.patching(model, tokenizer, architecture, facts, pairs=8)
    first = lambda fact: tokenizer(f"{fact.text} {fact.answer}")["input_ids"][len(tokenizer(fact.text)["input_ids"])]  # noqa: E731
    groups = {}
    for fact in facts:
        groups.setdefault((fact.group, fact.prompt), []).append(fact)
    choices = [(a, b) for own in groups.values() for a in own for b in own if first(a) != first(b)]
    random.Random(0).shuffle(choices)

    def last(fact):
        offsets = tokenizer(fact.text, return_offsets_mapping=True)["offset_mapping"]
        return max(i for i, (a, b) in enumerate(offsets) if a < fact.prompt.index("{}") + len(fact.subject) and b > a)

    for n, block in enumerate(model.model.layers):
        flips = 0
        for receiver, donor in choices[:8]:
            seen = {}
            handle = block.register_forward_hook(lambda m, a, out, seen=seen: seen.update(out=out.clone()))
            with torch.no_grad():
                model(torch.tensor([tokenizer(donor.text)["input_ids"]]))
            handle.remove()

            def put(m, a, out, r=receiver, d=donor, seen=seen):
                out = out.clone()
                out[0, last(r)] = seen["out"][0, last(d)]
                return out

            handle = block.register_forward_hook(put)
            with torch.no_grad():
                said = model(torch.tensor([tokenizer(receiver.text)["input_ids"]])).logits[0, -1].argmax().item()
            handle.remove()
            flips += said == first(donor)
        assert found[n] == pytest.approx(flips / 8)
    assert max(found) > 0.7


def test_trial_edits_leave_what_must_stay(small):
    facts = probes.shipped()
    keep, edit = facts[::3], facts[1::3]
    edits = probes.trial_edits(edit, keep, 20)
    assert len(edits) == 20 == len({(e.prompt, e.subject) for e in edits})
    stay = {fact.text for fact in keep}
    for request in edits:
        assert request.target_new != request.ground_truth and request.rephrase_prompts
        assert all(prompt in stay for prompt, _ in request.locality_prompts) and len(request.locality_prompts) == 2


def test_candidates():
    default = EditConfig(layers=(2, 3, 4))
    flips = [0.1, 0.5, 0.8, 0.9, 0.9, 0.85, 0.8, 0.75, 0.7, 0.2, 0.1, 0.0]
    found = search._candidates(flips, 12, default)
    assert found == [2, 4, 5, 8] and search._candidates([], 12, default) == [2, 4, 6]
    assert search._candidates([0.0] * 12, 12, default) == [2, 4, 6]
    assert max(search._candidates([1.0] * 12, 12, default)) == 10  # never the last, after which nothing reads the edit


def test_a_search_finds_settings_and_goes_on(tmp_path, small, monkeypatch):
    model, tokenizer = small
    records = testbed.facts()[:6]
    slow = {"optimizer": "adam", "lr": 1e-4, "lr_unit": "hidden_rms"}
    monkeypatch.setattr(search, "OPTIMISER_SETTINGS", (slow | {"lr": 0.4}, slow))
    made = []

    def stop_after_two(trial):
        made.append(trial)
        if len(made) == 2:
            raise KeyboardInterrupt

    args = {"records": records, "folder": tmp_path, "edits": 4, "covariance": testbed.covariance(model, tokenizer)}
    with pytest.raises(KeyboardInterrupt):
        search.tune(model, tokenizer, None, on_trial=stop_after_two, **args)
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 3
    real, tried = search._try, []
    monkeypatch.setattr(search, "_try", lambda *a: tried.append(a[3]) or real(*a))
    found = search.tune(model, tokenizer, None, **args)
    assert found.trials[:2] == made and made[0].settings not in tried and made[1].settings not in tried
    assert found.best["lr"] == 0.4 and found.best["layers"] and found.known == 6
    ratios = [t for t in found.trials if t.settings.get("leverage_ratio")]
    best = max(ratios, key=lambda t: t.score).settings
    assert len(ratios) == 3 and found.best == {key: value for key, value in best.items() if value is not None}
    bad = next(t for t in found.trials if t.settings.get("lr") == 1e-4)
    assert bad.score < max(t.score for t in found.trials)
    EditConfig.for_model(model, **found.best)
    assert not any(type(module).__name__ == "HookedLinear" for module in model.modules())
    with pytest.raises(ComebaError, match="another run"):
        search.tune(model, tokenizer, None, **(args | {"edits": 3}))
    other = testbed.covariance(model, tokenizer)
    other.moments = {name: 2 * moment for name, moment in other.moments.items()}
    with pytest.raises(ComebaError, match="covariance differ"):
        search.tune(model, tokenizer, None, **(args | {"covariance": other}))
    with pytest.raises(ComebaError, match="no record"):
        search.tune(model, tokenizer, None, records=[])


def test_the_command_writes_a_config_that_edits(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "OPTIMISER_SETTINGS", ({"optimizer": "polyak"},))
    monkeypatch.setattr(search, "RATIOS", (4.0,))
    monkeypatch.setattr(covariance, "TOKENS_PER_DIMENSION", 3)
    records = tmp_path / "records.json"
    long = {"prompt": "{} " + "very " * 200, "subject": "x", "target_new": "y"}  # for the embedded model's context
    records.write_text(json.dumps([long, *(r.to_record() for r in testbed.facts()[:4])]))
    result = output("tune", "testbed", "--out", tmp_path / "t", "--records", records, "--edits", 3)
    assert yaml.safe_load((tmp_path / "t" / "config.yaml").read_text()) == result["best"]
    counts = result["records"]
    assert (counts["read"], counts["used"], [skip["index"] for skip in counts["skipped"]]) == (5, 4, [0])
    assert (tmp_path / "t" / "tune.png").read_bytes()[:4] == b"\x89PNG" and json.loads((tmp_path / "t" / "tune.json").read_text())
    edited = output(
        "edit",
        "testbed",
        records,
        "--out",
        tmp_path / "e",
        "--config",
        tmp_path / "t" / "config.yaml",
        "--covariance",
        tmp_path / "t" / "covariance.safetensors",
    )
    assert edited["answered"] >= 3 and edited["config"]["layers"] == result["best"]["layers"]
    shown = run("tune", "testbed", "--out", tmp_path / "t", "--records", records, "--edits", 3)
    assert shown.exit_code == 0 and "Best:" in shown.stdout and "generality" in shown.stdout
    refused = run("tune", "testbed", "--out", tmp_path / "t", "--records", records, "--edits", 4)
    assert refused.exit_code == 1 and "another run" in refused.stderr


def test_records_without_a_true_answer_can_still_be_tried():
    records = [EditRequest(r.prompt, r.subject, r.target_new) for r in testbed.facts()[:3]]
    assert probes.of_records(records) == []
