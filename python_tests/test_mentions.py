"""Where a text names a subject: hashes against loops over token ids, scope against loops over cosines, and ids that come piece by piece."""

import copy

import pytest
import torch
from test_editor import edits_of, make_editor, random_values, small_model, some_requests
from test_nearest_hook import D_IN, WIDE, covariance_of, in_scope, inputs, keep_apart, loop_cosines, make_layer, random
from torch import nn
from torch.nn import functional as F

from comeba_ext import EditRequest, load_edits
from comeba_ext.errors import ComebaError
from comeba_ext.layers.sequence_context import IDS, KEPT, SequenceContext
from comeba_ext.ops import mentions as ops
from comeba_ext.text.names import names_of

# -- hashes ---------------------------------------------------------------------------------------------------------


def by_hand(ids):
    """As a sum of Python's whole numbers, of which the last 64 bits count, in two's complement."""
    value = sum((token + 1) * 0x9E3779B97F4A7C15**j for j, token in enumerate(reversed(ids[-16:]))) % 2**64
    return value - 2**64 if value >= 2**63 else value


def integers(low, high, *shape, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("before", [0, 3, 15, 40])
def test_hashes_of_the_last_tokens(before):
    ids = integers(0, 2**31 - 1, 3, 9 + before)
    found = ops.suffix_hashes(ids[:, before:], ids[:, :before] if before else None)
    assert found.shape == (3, 9, ops.LONGEST) and found.dtype == torch.int64
    for b in range(3):
        for t in range(9):
            for n in range(1, min(before + t + 1, ops.LONGEST) + 1):
                end = before + t + 1
                assert found[b, t, n - 1].item() == by_hand(ids[b, end - n : end].tolist()) == ops.name_hash(ids[b, end - n : end].tolist())
    long = list(range(40))
    assert ops.name_hash(long) == ops.name_hash(long[-16:]) != ops.name_hash(long[-15:])


@pytest.mark.parametrize("seed", range(4))
def test_the_longest_name_that_ends_at_a_token(seed):
    names = [integers(0, 3, 1 + n % 5, seed=100 * seed + n).tolist() for n in range(25)]
    names = [list(own) for own in dict.fromkeys(map(tuple, names))]
    ids = integers(-1, 3, 2, 60, seed=seed)  # −1: not known
    table = sorted((ops.name_hash(own), n) for n, own in enumerate(names))
    hashes, shards = (torch.tensor(part) for part in zip(*table, strict=True))
    found = ops.mentions(ops.suffix_hashes(ids), hashes, shards)
    lengths = set()
    for b in range(2):
        for t in range(60):
            ends = [n for n, own in enumerate(names) if ids[b, max(0, t + 1 - len(own)) : t + 1].tolist() == own]
            expected = max(ends, key=lambda n: len(names[n]), default=-1)
            assert found[b, t].item() == expected
            lengths.add(len(names[expected]) if expected >= 0 else 0)
    assert len(lengths) > 3


# -- what a subject is called -----------------------------------------------------------------------------------------


def test_names(tokenizer):
    tokens = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    requests = [
        EditRequest("The home of {} is", "Marie Curie", "x"),
        EditRequest("{} lives in", "Norway", "x"),
        EditRequest("{} lives in", "Norway", "x", fact_token="last"),
        EditRequest("The so-called ({}) is", "Eiffel Tower", "x"),
    ]
    curie, norway, end, tower = names_of(tokenizer, requests)
    assert curie == [tokens(form) for form in ("Marie Curie", " Marie Curie", "marie curie", " marie curie")]
    assert norway == [tokens("Norway"), tokens(" Norway")] and end == []
    (first, last) = (lambda ids: (ids.index(tokens("(")[-1]), len(ids)))(tokens("The so-called (Eiffel Tower"))
    assert tokens("The so-called (Eiffel Tower")[first + 1 : last] in tower
    assert all(len(own) >= min(map(len, tower[:4])) for own in tower)
    assert names_of(tokenizer, []) == [] and names_of(tokenizer, requests[2:3]) == [[]]


# -- a layer ----------------------------------------------------------------------------------------------------------

NAMES = {0: [[3, 4], [9]], 1: [[4], [2, 3, 4]], 2: [[7]]}


def named_layer(d_in=D_IN, dtype=torch.float64):
    """Anchors that ask for much, and for little where their shard is named."""
    layer = make_layer(7, alpha=0.3, d_in=d_in, dtype=dtype)
    keep_apart(layer, every=True)
    layer.score.thresholds[:7] = torch.tensor([0.95, 0.6, 0.95, 0.9, 0.5, 0.8, 0.99])
    layer.score.named_thresholds[:7] = torch.tensor([0.4, 0.35, 0.6, 0.3, 0.3, 0.4, 0.5])
    table = sorted((ops.name_hash(own), shard) for shard, names in NAMES.items() for own in names)
    layer.score.assign(layer.score.shards[:7], *(torch.tensor(part) for part in zip(*table, strict=True)))
    layer.context = SequenceContext(nn.Module())
    return layer


def expected_output(layer, x, ids):
    known = layer.score.known_keys()
    cosines = torch.from_numpy(loop_cosines(x.double().flatten(0, 1), random(known, layer.in_features, seed=3), covariance_of(D_IN)))
    output, edits, kinds = layer.base_layer(x).double().flatten(0, 1), edits_of(layer).double(), []
    shards = layer.score.shards[:known].tolist()
    for n, token in enumerate(x.double().flatten(0, 1)):
        row, t = ids[n // x.shape[1]].tolist(), n % x.shape[1]
        ends = [(len(own), shard) for shard, names in NAMES.items() for own in names if row[max(0, t + 1 - len(own)) : t + 1] == own]
        asked = lambda which: [max(0.0, own - 0.3) for own in which[:known].tolist()]  # noqa: E731
        own = [(c - e, s) for c, e, s in zip(cosines[n].tolist(), asked(layer.score.named_thresholds), shards, strict=True)]
        best = max([pair for pair in own if ends and pair[1] == max(ends)[1]], default=(-1, -1))
        kinds.append("named")
        if best[0] < 0.3:
            best = max((c - e, s) for c, e, s in zip(cosines[n].tolist(), asked(layer.score.thresholds), shards, strict=True))
            kinds[-1] = "near"
        if best[0] >= 0.3:
            output[n] += edits[1 + shards.index(best[1])] @ token
        else:
            kinds[-1] = "none"
    return output.reshape(*x.shape[:-1], -1), kinds


@pytest.mark.parametrize("every_token", [False, True])  # as on an accelerator
@torch.no_grad()
def test_a_named_subject_is_met_from_farther(every_token, monkeypatch):
    layer = named_layer()
    x, ids = inputs(layer, batch=3, seq=30, noise=0.8), integers(0, 10, 3, 30, seed=4)
    layer.context.here.hashes = ops.suffix_hashes(ids)
    expected, kinds = expected_output(layer, x, ids)
    assert min(kinds.count(kind) for kind in ("named", "near", "none")) > 4
    if every_token:
        from comeba_ext.ops import nearest_hook

        monkeypatch.setattr(nearest_hook, "_first_look", lambda *args: None)
        score = layer.score
        named = layer.mentions(x.shape, score.names, score.of_name), (score.named_thresholds - layer.alpha).clamp(min=0)
        shards = (score.shards, layer.shards.rows, layer.shards.left, layer.shards.right)
        arguments = (score.projection, score.anchors, score.excess(layer.alpha), None, layer.alpha)
        found = nearest_hook.nearest_hook_ref(layer.base_layer(x), x, None, *arguments, shards, named)
    else:
        found = layer(x)
    torch.testing.assert_close(found, expected)
    inside = torch.tensor([kind != "none" for kind in kinds]).reshape(3, 30)
    assert torch.equal(layer.scores(x) >= layer.alpha, inside)
    layer.context.here.hashes = None  # nobody knows the text: only what is near
    assert torch.equal((layer(x) != layer.base_layer(x)).any(-1), layer.scores(x) >= layer.alpha)
    assert (layer.scores(x) >= layer.alpha).sum() < inside.sum()
    layer.context.here.hashes = ops.suffix_hashes(ids[:, 1:])  # of another text
    assert (layer.scores(x) >= layer.alpha).sum() < inside.sum()


@torch.no_grad()
def test_a_coarse_look_keeps_what_is_named():
    """More inputs than the projection has rows: few are looked at twice."""
    layer = make_layer(9, alpha=0.3, d_in=WIDE, dtype=torch.float32)
    keep_apart(layer, every=True)
    layer.score.thresholds[:9] = 0.9
    layer.score.named_thresholds[:9] = 0.3
    table = sorted((ops.name_hash([5 + shard]), shard) for shard in range(3))
    layer.score.assign(layer.score.shards[:9], *(torch.tensor(part) for part in zip(*table, strict=True)))
    layer.context = SequenceContext(nn.Module())
    x = inputs(layer, batch=2, seq=30, noise=1.5)
    ids = torch.full((2, 30), 1)
    for n in range(0, 60, 2):  # every other token is one key's, and named rightly every fourth
        ids.view(-1)[n] = 5 + ((n % 9) % 3 + (n % 4 > 0)) % 3
    layer.context.here.hashes = ops.suffix_hashes(ids)
    unit = layer.score.directions(x)
    cosines = unit @ layer.score.anchors[:9].T
    shard = torch.where(ids >= 5, ids - 5, -1)
    own = cosines.masked_fill(layer.score.shards[:9] != shard[..., None], -1).amax(-1)
    scope = (layer(x) != layer.base_layer(x)).any(-1)
    sure = (own - 0.3).abs() > 1e-4
    assert torch.equal(scope[sure], (own >= 0.3)[sure]) and 10 < scope.sum() < 50 and cosines.amax() < 0.9


# -- a model ----------------------------------------------------------------------------------------------------------


def named_editor(tiny_model, tokenizer, family="gpt2"):
    """Whatever is named is in scope, and nothing else is."""
    editor = make_editor(small_model(tiny_model, family), tokenizer, scope="nearest", alpha_floor=1e-6, unnamed_floor=1.5)
    requests = some_requests(6)
    editor.edit(requests, target_values=random_values(6))
    return editor, requests


def ends_of(tokenizer, requests, row):
    """Tokens of a row at which a subject's name ends."""
    names = [own for names in names_of(tokenizer, requests) for own in names]
    return torch.tensor([any(row[max(0, t + 1 - len(own)) : t + 1] == own for own in names) for t in range(len(row))])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_ids_reach_the_layers_however_a_text_is_run(tiny_model, tokenizer, family):
    editor, requests = named_editor(tiny_model, tokenizer, family)
    texts = [f"People say that {requests[0].subject} and {requests[3].subject}", f"{requests[2].subject}, they say"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    expected = [ends_of(tokenizer, requests, row) for row in rows]
    assert all(0 < scope.sum() < len(scope) for scope in expected)
    first = lambda **run: in_scope(editor, tokenizer, **run)  # noqa: E731
    for row, ends in zip(rows, expected, strict=True):
        assert torch.equal(first(input_ids=torch.tensor([row]))[0][0, 0], ends)
        parts, cache = [], None
        for start, end in [(0, 3), (3, 5), *((n, n + 1) for n in range(5, len(row)))]:
            part, result = first(input_ids=torch.tensor([row[start:end]]), past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            parts.append(part[0, 0])
        assert torch.equal(torch.cat(parts), ends)
        assert cache.comeba_statistics[IDS][0, -len(row) :].tolist() == row and cache.comeba_statistics[IDS].shape == (1, KEPT)
    # Left-padded, expanded to beams, one of them dropped, and some tokens taken back.
    length = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    cut = length - 4
    _, result = first(input_ids=ids[:, :cut], attention_mask=mask[:, :cut], position_ids=place[:, :cut], use_cache=True)
    cache = result.past_key_values
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    wrong = torch.full((2, 2), 7)
    longer = torch.cat([mask[:, :cut], torch.ones(2, 2, dtype=torch.long)], 1)
    _, result = first(input_ids=wrong, attention_mask=longer, past_key_values=cache, use_cache=True)
    cache.crop(-2)
    part, _ = first(input_ids=ids[:, cut:], attention_mask=mask, position_ids=place[:, cut:], past_key_values=cache, use_cache=True)
    for n, ends in enumerate(expected):
        assert torch.equal(part[0, n], ends[-4:])
    assert any(ends[-4:].any() for ends in expected)


@torch.no_grad()
def test_embeddings_name_what_was_embedded(tiny_model, tokenizer):
    """Models with a vision part give their decoder embeddings. Of those from elsewhere nobody knows the text."""
    editor, requests = named_editor(tiny_model, tokenizer)
    row = torch.tensor([tokenizer(f"People say that {requests[0].subject}")["input_ids"]])
    copied, model = copy.deepcopy(editor.model), editor.model
    expected = model(row).logits
    embedded = model.get_input_embeddings()(row)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, expected)
    with editor.disabled():
        plain = model(inputs_embeds=embedded).logits
    assert torch.equal(model(inputs_embeds=embedded).logits, plain) and not torch.allclose(plain, expected)
    model.get_input_embeddings()(row[:, 1:])  # of another text
    assert torch.equal(model(inputs_embeds=embedded).logits, plain)
    assert torch.equal(copied(row).logits, expected)  # a copy reads its own ids


@torch.no_grad()
def test_a_saved_folder_knows_the_names(tiny_model, tokenizer, tmp_path):
    editor, requests = named_editor(tiny_model, tokenizer)
    editor.save_pretrained(tmp_path)
    row = torch.tensor([tokenizer(f"People say that {requests[0].subject} sings")["input_ids"]])
    expected = editor.model(row).logits
    model = small_model(tiny_model)
    assert not torch.equal(model(row).logits, expected)
    load_edits(model, tmp_path)
    assert torch.equal(model(row).logits, expected)
    again = type(editor).from_pretrained(small_model(tiny_model), tokenizer, tmp_path)
    again.retract([entry.request.request_id for entry in again.ledger.live() if entry.request.subject == requests[0].subject])
    assert not in_scope(again, tokenizer, input_ids=row)[0].any()


def test_gradient_checkpointing_is_refused(tiny_model, tokenizer):
    """Its second run of a block knows no text."""
    editor, requests = named_editor(tiny_model, tokenizer)
    model = editor.model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    row = torch.tensor([tokenizer(requests[0].text)["input_ids"]])
    loss = F.cross_entropy(model(row).logits[0], row[0])
    with pytest.raises(ComebaError, match="gradient checkpointing"):
        loss.backward()
