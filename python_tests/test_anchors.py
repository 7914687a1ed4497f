"""Anchors and their thresholds against loops over single cosines; requests whose keys say nothing."""

import pytest
import torch
from test_editor import TEXTS, make_editor, random_values, small_model, snapshot, some_requests
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from comeba_ext import EditRequest
from comeba_ext.covariance.key_sample import TOKENS, KeySample
from comeba_ext.editing.anchors import CEILING, STEP, Background, anchors_of, tells
from comeba_ext.editing.answers import answered
from comeba_ext.text.decoys import BEGINNINGS, decoy_rows
from comeba_ext.text.names import as_prompted
from comeba_ext.text.rows import Row

ROWS = 16


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def background(count=30, seed=1):
    tokens = torch.randint(0, 9, (count, TOKENS), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    sample = KeySample({"x": torch.zeros(count, 4)}, tokens, torch.arange(count))
    return Background(F.normalize(random(count, ROWS, seed=seed), dim=-1), sample, 1.0)


def near(direction, cosine, seed):
    """A unit vector at that cosine."""
    other = random(ROWS, seed=seed)
    other = F.normalize(other - (other @ direction) * direction, dim=0)
    return cosine * direction + (1 - cosine**2) ** 0.5 * other


DECOYS = ((0, 0.97), (0, 0.3), (2, 0.75))
SUBJECTS = [[[3], [4]], [[1, 2], [5]], [[7, 7, 7], [8, 8]]]


def loop_highest(unit, around, forms):
    highest = 0.0
    for direction, tokens in zip(around.unit, around.sample.tokens.tolist(), strict=True):
        if not any(tokens[-len(form) :] == form for form in forms):
            highest = max(highest, float(direction @ unit))
    return highest


def test_the_highest_of_all_other_tokens():
    around = background()
    units = around.unit[:3].clone()  # each is a token of the text itself
    found, common = around.highest(units, SUBJECTS)
    assert torch.equal(found, common)  # of 30 tokens one is more than a thousandth
    for n in range(3):
        assert found[n].item() == pytest.approx(loop_highest(units[n], around, SUBJECTS[n]))
    assert around.highest(units, [[[99]]] * 3)[0].min() > 0.99
    own, _ = around.highest(units[:1], [[around.sample.tokens[0, -1:].tolist()]])  # unless it is a mention
    assert own.item() == pytest.approx(loop_highest(units[0], around, [around.sample.tokens[0, -1:].tolist()])) and own < 0.9
    empty = Background(torch.zeros(0, ROWS), KeySample(), 1.0)
    assert not any(part.any() for part in empty.highest(units, SUBJECTS))
    many = background(count=2500)
    (highest,), (third,) = many.highest(units[:1], [[[99]]])
    ordered = sorted((float(direction @ units[0]) for direction in many.unit), reverse=True)
    assert highest.item() == pytest.approx(ordered[0]) and third.item() == pytest.approx(ordered[2])


@pytest.mark.parametrize("floor, unnamed", [(0.0, 0.0), (0.4, 0.55), (0.7, 0.9)])
def test_thresholds(floor, unnamed):
    around, subjects = background(), SUBJECTS
    base = F.normalize(random(3, ROWS, seed=5), dim=-1)
    units = torch.stack(
        [torch.stack([near(direction, c, seed=9 * n + k) for k, c in enumerate((0.6, 0.9, 0.95, 0.8))]) for n, direction in enumerate(base)]
    )
    units[2, 0] = around.unit[4]  # this one's plain key is a corpus token's
    decoys = F.normalize(torch.stack([near(base[n], c, seed=50 + k) for k, (n, c) in enumerate(DECOYS)]), dim=-1)
    owner = torch.tensor([n for n, _ in DECOYS])
    found = anchors_of(units, base, around, subjects, (decoys, owner), floor, unnamed)
    expected = []
    for n in range(3):
        for direction in (base[n], units[n, 0]):
            corpus = loop_highest(direction, around, subjects[n])
            other = max([float(d @ direction) for d, (who, _) in zip(decoys, DECOYS, strict=True) if who == n] + [corpus])
            if corpus <= CEILING:
                expected.append((n, max(unnamed, other + STEP)))
    assert found.owner.tolist() == [n for n, _ in expected]
    assert found.thresholds.tolist() == pytest.approx([own for _, own in expected]) and found.thresholds.max() > 1  # only where it is named
    assert found.named.tolist() == [floor] * 5
    unit, thresholds, named = found.of(0)
    assert torch.equal(found.of(2)[0], base[2:]) and thresholds.tolist() == pytest.approx([own for n, own in expected if n == 0])
    assert len(unit) == len(named) == 2
    assert tells(units, around, subjects)[:, 0].tolist() == [True, True, False]


def test_decoys_end_as_their_subject_does(tokenizer):
    subjects = ["Danielle Darrieux", "Oslo", "the city of Paris"]
    rows = decoy_rows(tokenizer, [EditRequest("{} is", subject, "x") for subject in subjects])
    ids = [tokenizer(f" {subject}", add_special_tokens=False)["input_ids"] for subject in subjects]
    assert [len([row for row in rows if row.request == n]) for n in range(3)] == [6 * min(2, len(own) - 1) for own in ids]
    context = tokenizer("The article about the")["input_ids"]
    for row in rows:
        assert row.subject_last == len(row.ids) - 1 and row.ids[: len(context)] == context and row.prefix == -1
        assert any(row.ids[-tail:] == ids[row.request][-tail:] for tail in (1, 2)) and row.ids[-len(ids[row.request]) :] != ids[row.request]
    texts = {tokenizer.decode(row.ids) for row in rows}
    assert len(texts) == len(rows) and any("Northern" in text for text in texts)


def test_decoys_end_where_the_subject_is_edited():
    """Where a tokenizer joins the prompt's full stop and comma, the edit is at "Jr", and so are others' names."""
    words = ["[UNK]", *"Who was Jose Cuisia Jr the ambassador The article about Robert Northern Lake Saint Mary Gold Pakistan".split()]
    words += [".,", ".", "?", ","]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    requests = [EditRequest("Who was {}, the ambassador?", "Jose Cuisia Jr.", "x"), EditRequest("{}, the ambassador?", "Jose Cuisia", "x")]
    read = lambda ids: " ".join(words[token] for token in ids)  # noqa: E731
    assert [read(ids) for ids in as_prompted(tokenizer, requests)] == ["Jose Cuisia Jr", "Jose Cuisia"]
    rows = [(row.request, read(row.ids).removeprefix("The article about the ")) for row in decoy_rows(tokenizer, requests)]
    beginnings = [own.strip() for own in BEGINNINGS]
    first = [f"{own} {tail}" for tail in ("Jr", "Cuisia Jr") for own in beginnings]
    assert rows == [(0, text) for text in first] + [(1, f"{own} Cuisia") for own in beginnings]


def with_a_common_key(tiny_model, tokenizer, last=True, **changes):
    """An editor in whose corpus the first token of a text looks like the subject of a request that begins with it, and with
    ``last`` another one like the end of its prompt."""
    editor = make_editor(small_model(tiny_model), tokenizer, scope="nearest", **changes)
    layer, name = list(editor.layers.values())[-1], list(editor.layers)[-1]
    request = EditRequest("{} plays the", "Marie", "piano")
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    sample = editor.covariance.sample
    for n, text in enumerate(("Marie", "Marie plays the") if last else ("Marie",)):
        with torch.no_grad():
            editor.model(torch.tensor([tokenizer(text)["input_ids"]]))
        sample.keys[name][n] = seen[-1][0, -1].to(torch.bfloat16)
        sample.tokens[n] = -1
        sample.tokens[n, -1] = tokenizer.eos_token_id  # not the subject itself
    handle.remove()
    sample._mentions.clear()
    editor.method.recognition.learn()
    return editor, request


def test_a_key_that_says_nothing_is_declined(tiny_model, tokenizer, caplog):
    editor, common = with_a_common_key(tiny_model, tokenizer)
    good = [request for request in some_requests(6) if not request.prompt.startswith("{}")][:2]
    values = random_values(3)
    report = editor.edit([good[0], common, good[1]], target_values=values)
    assert report.request_ids == ["edit-0", "edit-2"] and len(report.answered) == 2
    assert [d["request_id"] for d in report.declined] == ["edit-1"] and "begin the prompt with other words" in report.declined[0]["reason"]
    assert "declined edit-1" in caplog.text and editor.log[-1]["declined"] == report.declined
    assert [entry.request.request_id for entry in editor.ledger.live()] == ["edit-0", "edit-2"]
    fresh, _ = with_a_common_key(tiny_model, tokenizer)
    fresh.edit(good, target_values=values[[0, 2]])
    for name in editor.layers:
        assert torch.equal(editor.layers[name].delta, fresh.layers[name].delta)
        assert torch.equal(editor.layers[name].score.thresholds, fresh.layers[name].score.thresholds)


def test_a_key_that_says_nothing_gives_way_to_the_prompts_last(tiny_model, tokenizer):
    """As if the request had asked for it, and where it does, with equal bits."""
    editor, common = with_a_common_key(tiny_model, tokenizer, last=False)
    good = [request for request in some_requests(6) if not request.prompt.startswith("{}")][:1]
    report = editor.edit([*good, common], target_values=random_values(2))
    assert report.moved == ["edit-1"] and not report.declined
    assert [entry.request.fact_token for entry in editor.ledger.live()] == ["subject_last", "last"]
    asked, _ = with_a_common_key(tiny_model, tokenizer, last=False)
    assert not asked.edit([*good, EditRequest("{} plays the", "Marie", "piano", fact_token="last")], target_values=random_values(2)).moved
    seen = {}
    for name, layer in editor.layers.items():
        assert torch.equal(layer.delta, asked.layers[name].delta)
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0][0, -1].clone()}))
    with torch.no_grad():
        editor.model(torch.tensor([tokenizer("Marie plays the")["input_ids"]]))
    entry, first = editor.ledger.live()[1], next(iter(editor.layers))
    assert torch.allclose(entry.keys[first][1], seen[first], atol=1e-5)


def test_other_facts_of_a_subject_are_written_anew_with_it(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer, scope="nearest", steps=10, optimizer="polyak", clamp=4.0)
    first = [EditRequest("The mother tongue of {} is", "Norway", "English"), EditRequest("The mother tongue of {} is", "Peru", "Lima")]
    editor.edit(first)
    before = snapshot(editor)
    report = editor.edit([EditRequest("The capital of {}, as everyone knows, is", "Norway", "Paris")])
    assert report.request_ids == ["edit-2"] and report.rewritten == ["edit-0"] and not report.superseded
    assert len(report.answered) == len(report.losses) == len(report.optimizer_steps) == 1
    live = editor.ledger.live()
    assert [(e.request.request_id, e.step) for e in live] == [("edit-1", 1), ("edit-2", 2), ("edit-0", 2)]
    editor.rollback(1)
    after = snapshot(editor)
    assert after["live"] == before["live"] and after["ledger"] == before["ledger"]
    for name in before["layers"]:
        assert torch.allclose(after["layers"][name][0], before["layers"][name][0], rtol=0, atol=1e-5)
    again = editor.edit([EditRequest("The capital of {}, as everyone knows, is", "Norway", "Paris")])
    editor.retract("edit-0")
    assert again.rewritten == ["edit-0"] and len(editor.ledger) == 2
    for scope in ("zscore", "reference"):  # there no key is known again
        other = make_editor(small_model(tiny_model), tokenizer, scope=scope)
        other.edit(first)
        assert not other.edit([EditRequest("The capital of {}, as everyone knows, is", "Norway", "Paris")]).rewritten


def test_at_a_prompts_end_the_threshold_is_half_way_to_others(tokenizer):
    generator = torch.Generator().manual_seed(0)
    units = torch.nn.functional.normalize(torch.randn(2, 3, 8, generator=generator), dim=-1)
    mean = torch.nn.functional.normalize(units.mean(1), dim=-1)
    other = torch.nn.functional.normalize(units[1, 0] + 0.3 * torch.randn(8, generator=generator), dim=-1)
    around = Background(torch.zeros(0, 8), KeySample(), 1.0)
    decoys = (torch.stack([other, other]), torch.tensor([0, 1]))
    found = anchors_of(units, mean, around, [[], []], decoys, 0.6, 0.85, torch.tensor([False, True]))
    assert found.owner.tolist() == [0, 0, 1] and torch.equal(found.unit[2], units[1, 0])
    assert found.thresholds[2].item() == found.named[2].item() == pytest.approx((1 + (units[1, 0] @ other).item()) / 2, abs=1e-6)
    request = EditRequest("{} is located in", "Norway", "x", fact_token="last")
    texts = [tokenizer.decode(row.ids) for row in decoy_rows(tokenizer, [request])]
    assert len(texts) == 6 and all(text.endswith(" is located in") and "Norway" not in text for text in texts)


def test_a_batch_of_which_nothing_is_left_changes_nothing(tiny_model, tokenizer, tmp_path):
    editor, common = with_a_common_key(tiny_model, tokenizer)
    before = snapshot(editor)
    report = editor.edit([common], target_values=random_values(1))
    assert report.step == editor.step == 1 and not report.request_ids and len(report.declined) == 1
    after = snapshot(editor)
    for name in before["layers"]:
        assert all(torch.equal(a, b) for a, b in zip(before["layers"][name], after["layers"][name], strict=True))
    editor.rollback(0)
    editor.edit(some_requests(1), target_values=random_values(1))
    assert editor.step == 1 and len(editor.ledger) == 1
    editor.save_pretrained(tmp_path)


def test_scores_of_the_response_decline_nothing(tiny_model, tokenizer):
    for scope in ("zscore", "reference"):
        editor = make_editor(small_model(tiny_model), tokenizer, scope=scope)
        assert not editor.edit([EditRequest("{} plays the", "Marie", "piano")], target_values=random_values(1)).declined


def test_answered_is_what_the_edited_model_says(tiny_model, tokenizer):
    """Against one unpadded forward pass a request; some answer, some do not."""
    editor = make_editor(small_model(tiny_model), tokenizer, scope="reference", lam=0.01, steps=25, lr=0.5, clamp=8.0, kl_factor=0.0)
    requests = some_requests(6)
    report = editor.edit(requests)
    right = []
    for request in requests:
        stem = tokenizer(request.text)["input_ids"]
        whole = tokenizer(f"{request.text} {request.target_new}")["input_ids"]
        with torch.no_grad():
            best = editor.model(torch.tensor([whole])).logits[0].argmax(-1).tolist()
        right.append(best[len(stem) - 1 : -1] == whole[len(stem) :])
    assert report.answered == right
    with torch.no_grad():
        prompts = [tokenizer(request.text)["input_ids"] for request in requests]
        best = [editor.model(torch.tensor([ids])).logits[0].argmax(-1).tolist() for ids in prompts]
    rows, wanted = [], []
    for ids, choices in zip(prompts, best, strict=True):
        for targets, right in (
            ([choices[-1]], True),
            ([choices[-1] ^ 1], False),
            (choices[-2:], True),
            ([choices[-2] ^ 1, choices[-1]], False),
        ):
            rows.append(Row(0, ids, 0, targets, 0))
            wanted.append(right)
    assert answered(editor.model, rows, 0, 64) == wanted


def test_leverage_is_that_of_the_covariance(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer, scope="nearest", prefixes=0)
    requests = some_requests(5)
    report = editor.edit(requests, target_values=random_values(5))
    name, _layer = next(iter(editor.layers.items()))
    keys = torch.stack([entry.keys[name][1] for entry in editor.ledger.live()]).double()  # behind the prompts alone
    expected = (keys * torch.linalg.solve(editor.covariance[name], keys.T).T).sum(-1).median().item()
    assert report.leverage[name] == pytest.approx(expected, rel=1e-3)  # 48 rows of 48: nothing is estimated
    assert report.share[name] == pytest.approx(expected / (20.0 + expected), rel=1e-3)
    assert TEXTS and len(editor.covariance.sample)
