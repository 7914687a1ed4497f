"""Where a text names a subject: hashes against loops over token ids, scope against loops over cosines, and ids that come piece by piece."""

import copy
import itertools

import pytest
import torch
from test_editor import edits_of, make_editor, random_values, small_model, some_requests
from test_hooked_linear import captured
from test_nearest_hook import D_IN, covariance_of, in_scope, inputs, keep_apart, loop_cosines, make_layer, random
from torch import nn
from torch.nn import functional as F

from comeba_ext import EditRequest, load_edits
from comeba_ext.errors import ComebaError
from comeba_ext.layers.sequence_context import IDS, KEPT, SequenceContext
from comeba_ext.ops import mentions as ops
from comeba_ext.ops import nearest_hook, subject_hook
from comeba_ext.text.names import named_in, names_of

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
    assert curie.names == [tokens(form) for form in ("Marie Curie", " Marie Curie", "marie curie", " marie curie")]
    assert norway.names == [tokens("Norway"), tokens(" Norway")]
    assert norway.ends == list(dict.fromkeys(tokens(form)[-1] for form in ("Norway", " Norway")))
    assert end.names == [] and end.ends == tokens("Norway lives in")[-1:]
    text = tokens("The so-called (Eiffel Tower")
    assert text[text.index(tokens("(")[-1]) + 1 :] in tower.names
    assert all(len(own) >= min(map(len, tower.names[:4])) for own in tower.names)
    for own in (curie, tower):
        assert set(own.ends) == {ids[-1] for ids in own.names} and len(set(own.ends)) == len(own.ends)
    assert names_of(tokenizer, []) == [] and names_of(tokenizer, requests[2:3]) == [end]


# -- a layer ----------------------------------------------------------------------------------------------------------

NAMES = {0: [[3, 4], [9]], 1: [[4], [2, 3, 4]], 2: [[7]]}


def called(layer, names):
    """Tell a layer's score what its shards are called."""
    name_table = sorted((ops.name_hash(own), shard) for shard, all_ in names.items() for own in all_)
    end_table = sorted({(ops.name_hash(own[-1:]), shard) for shard, all_ in names.items() for own in all_})
    tables = [torch.tensor(part) for table in (name_table, end_table) for part in zip(*table, strict=True)]
    layer.score.assign(layer.score.shards[: layer.score.known], tables)
    layer.context = SequenceContext(nn.Module())


def named_layer():
    """Anchors that ask for much, and for little where their shard is named."""
    layer = make_layer(7, alpha=0.3)
    keep_apart(layer, every=True)
    layer.score.thresholds[:7] = torch.tensor([0.6, 0.5, 0.7, 0.45, 0.4, 0.6, 0.5])
    layer.score.named_thresholds[:7] = torch.tensor([0.4, 0.35, 0.5, 0.3, 0.2, 0.4, 0.35])
    called(layer, NAMES)
    return layer


def expected_output(layer, x, ids):
    """Token by token: the subject named there, if near; else the nearest of those whose names end in the token."""
    known, tokens = layer.score.known_keys(), x.double().flatten(0, 1)
    cosines = torch.from_numpy(loop_cosines(tokens, random(known, D_IN, seed=3), covariance_of(D_IN)))
    output, edits, kinds = layer.base_layer(x).double().flatten(0, 1), edits_of(layer).double(), []
    shards, scores = layer.score.shards[:known].tolist(), []
    asked = lambda which: [max(0.0, own - 0.3) for own in which[:known].tolist()]  # noqa: E731
    for n, token in enumerate(tokens):
        row, t = ids[n // x.shape[1]].tolist(), n % x.shape[1]
        ends = [(len(own), shard) for shard, names in NAMES.items() for own in names if row[max(0, t + 1 - len(own)) : t + 1] == own]
        there = max(ends)[1] if ends else None
        pairs = []
        for c, far, close, s in zip(
            cosines[n].tolist(), asked(layer.score.thresholds), asked(layer.score.named_thresholds), shards, strict=True
        ):
            looked_at = s == there or c + nearest_hook.ABOVE - far >= 0.3
            if looked_at and any(own[-1] == row[t] for own in NAMES[s]):
                pairs.append((s == there and c - close >= 0.3, c - (close if s == there else far), s))
        first, score, shard = max(pairs, default=(False, 0.0, -1))
        scores.append(max(score, 0.0))
        kinds.append("none" if score < 0.3 else "named" if first else "near")
        if score >= 0.3:
            output[n] += edits[1 + shards.index(shard)] @ token
    return output.reshape(*x.shape[:-1], -1), torch.tensor(scores).reshape(x.shape[:-1]), kinds


@pytest.mark.parametrize("every_token", [False, True])  # as on an accelerator
@torch.no_grad()
def test_a_named_subject_is_met_from_farther(every_token, monkeypatch):
    layer = named_layer()
    x, ids = inputs(layer, batch=3, seq=200, noise=0.6), integers(2, 10, 3, 200, seed=4)
    layer.context.here.hashes = ops.suffix_hashes(ids)
    expected, scores, kinds = expected_output(layer, x, ids)
    assert min(kinds.count(kind) for kind in ("named", "near", "none")) > 3
    if every_token:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(layer.scores(x).double(), scores.double())
    monkeypatch.undo()
    if every_token:
        monkeypatch.setattr(subject_hook, "_chosen", by_every)
    torch.testing.assert_close(layer(x), expected)
    wide = x.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(layer(wide).sum(), wide)
    changed = (expected != layer.base_layer(x)).any(-1)
    assert torch.equal(((gradient - layer.weight.sum(0)).abs() > 1e-9).any(-1), changed) and changed.sum() == 600 - kinds.count("none")
    layer.context.here.hashes = ops.suffix_hashes(ids[:, 1:])  # of another text
    assert torch.equal(layer.scores(x), nearest_hook.nearest_scores(x, *_compared(layer)))
    layer.context.here.hashes = None  # nobody knows the text: what is near to any key
    assert torch.equal(layer.scores(x), nearest_hook.nearest_scores(x, *_compared(layer)))
    assert torch.equal((layer(x) != layer.base_layer(x)).any(-1), layer.scores(x) >= layer.alpha)


def by_every(x, *how):
    """In place of the choice of tokens: all of them."""
    score, shard = subject_hook._every(x, *how, (9, 9))
    which = (torch.ones_like(shard, dtype=torch.bool)).nonzero(as_tuple=True)
    return which, score.flatten(), shard.flatten()


def _compared(layer):
    return layer.score.projection, layer.score.anchors, layer.score.excess(layer.alpha)


@pytest.mark.parametrize(("together", "d_in", "every_token"), [(1, 24, False), (7, 300, False), (1000, 300, False), (1, 300, True)])
@torch.no_grad()
def test_many_subjects_by_brute_force(together, d_in, every_token, monkeypatch):
    """Every pair of a token and a key by a dense table, in float64; names of one to three tokens, many of which share their end."""
    monkeypatch.setattr(subject_hook, "_TOGETHER", together)
    layer = make_layer(400, alpha=0.2, d_in=d_in)
    shards = torch.arange(400) * 150 // 400
    layer.score.assign(shards)
    names = {n: [integers(0, 12, 1 + n % 3, seed=n).tolist(), integers(0, 12, 3, seed=500 + n).tolist()] for n in range(150)}
    layer.score.thresholds[:400], layer.score.named_thresholds[:400] = torch.rand(2, 400, generator=torch.Generator().manual_seed(1))
    owner = {}
    for n, own in names.items():
        for name in own:
            owner.setdefault(tuple(name), n)
    called(layer, {n: [list(name) for name, who in owner.items() if who == n] for n in set(owner.values())})
    ids = integers(0, 14, 2, 200, seed=8)
    layer.context.here.hashes = ops.suffix_hashes(ids)
    ends = torch.zeros(15, 150, dtype=torch.bool)
    for name, n in owner.items():
        ends[name[-1], n] = True
    there = torch.full((2, 200), -1)
    for b, t in itertools.product(range(2), range(200)):
        for size in (1, 2, 3):
            there[b, t] = owner.get(tuple(ids[b, t + 1 - size : t + 1].tolist()) if t + 1 >= size else (), there[b, t].item())
    own = shards == there[..., None]
    draw = torch.Generator().manual_seed(9)  # inputs that are like a key whose name ends there, more or less
    likely = torch.multinomial((ends[ids][..., shards] + 9 * own + 1e-9).flatten(0, 1), 1, generator=draw)[:, 0].view(2, 200)
    noise = F.normalize(random(2, 200, len(layer.score.projection), seed=7), dim=-1) * torch.rand(2, 200, 1, generator=draw) * 3
    x = (layer.score.anchors[likely] + noise) @ torch.linalg.pinv(layer.score.projection).T
    cosines = layer.score.directions(x) @ layer.score.anchors[:400].T
    asked = torch.where(own, layer.score.named_thresholds[:400], layer.score.thresholds[:400]).sub(0.2).clamp(min=0)
    score = cosines - asked
    few = min(d_in, nearest_hook.COARSE)
    unit, keys = (F.normalize(part[..., :few], dim=-1) for part in (x @ layer.score.projection.T, layer.score.anchors[:400]))
    too_far = ~own & (unit @ keys.T + nearest_hook.ABOVE - asked < 0.2)
    assert d_in == 24 or (too_far & (score >= 0.2)).sum() > 0
    score = score.masked_fill(~ends[ids][..., shards] | too_far, -1)
    named = score.masked_fill(~own, -1).amax(-1)
    expected = torch.where(named >= 0.2, named, score.amax(-1)).clamp(min=0)
    if every_token:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(layer.scores(x), expected)
    assert (named >= 0.2).sum() > 20 and ((named < 0.2) & (expected >= 0.2)).sum() > 20 and (expected == 0).sum() > 20


@pytest.mark.parametrize("grad", [False, True])
def test_compiled(grad):
    torch._dynamo.reset()
    layer = named_layer().float()
    layer.base_layer.requires_grad_(grad)
    x, ids = inputs(layer, batch=3, seq=40, noise=0.6), integers(2, 10, 3, 40, seed=4)
    layer.context.here.hashes = ops.suffix_hashes(ids)
    expected = layer(x)
    arguments = (layer.base_layer(x).detach(), x, layer.hashes(x), layer.score.projection, layer.score.anchors)
    score, parts = layer.score, layer.shards
    how = (
        (score.thresholds, score.named_thresholds),
        None,
        layer.alpha,
        score._subjects(),
        score.most,
        (parts.rows, parts.left, parts.right),
    )
    with torch.set_grad_enabled(grad):
        run = lambda output, *given: subject_hook.subject_hook(output + 0 * layer.weight.sum(), *given, *how)  # noqa: E731
        found = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(found, expected)
    flat = (*arguments[1:], *how[0], None, layer.alpha, *how[3], *how[4], *how[5])
    torch.library.opcheck(torch.ops.comeba.subject_hook_, (arguments[0].clone(), *flat))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_cuda_graph_replays_without_synchronising(dtype):
    layer = named_layer().to("cuda", dtype)
    x, ids = inputs(layer.cpu().double(), batch=1, seq=64, noise=0.2), integers(2, 10, 1, 64, seed=4)
    hashes = ops.suffix_hashes(ids)
    layer.context.here.hashes = hashes
    expected = (layer(x) != layer.base_layer(x)).any(-1)
    layer, x = layer.to("cuda", dtype), x.to("cuda", dtype)
    layer.context.here.hashes = hashes.cuda()
    graph, replayed = captured(layer, x)
    graph.replay()
    found = (replayed != layer.base_layer(x)).any(-1).cpu()
    assert expected.any() and (found != expected).sum() <= (0 if dtype == torch.float32 else 3)  # rounding may decide a few


# -- a model ----------------------------------------------------------------------------------------------------------


def named_editor(tiny_model, tokenizer, family="gpt2"):
    """Whatever is named is in scope, and nothing else is."""
    editor = make_editor(small_model(tiny_model, family), tokenizer, scope="nearest", alpha_floor=1e-6, unnamed_floor=1.5)
    requests = some_requests(6)
    editor.edit(requests, target_values=random_values(6))
    return editor, requests


def ends_of(tokenizer, requests, row):
    """Tokens of a row at which a subject's name ends."""
    names = [name for own in names_of(tokenizer, requests) for name in own.names]
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
def test_embeddings_name_what_was_embedded(tiny_model, tokenizer, caplog):
    """Models with a vision part give their decoder embeddings. Of those from elsewhere nobody knows the text."""
    editor, requests = named_editor(tiny_model, tokenizer)
    row = torch.tensor([tokenizer(f"People say that {requests[0].subject}")["input_ids"]])
    copied, model = copy.deepcopy(editor.model), editor.model
    expected = model(row).logits
    embedded = model.get_input_embeddings()(row)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, expected)
    assert "embeddings" not in caplog.text
    with editor.disabled():
        plain = model(inputs_embeds=embedded).logits
    assert torch.equal(model(inputs_embeds=embedded).logits, plain) and not torch.allclose(plain, expected)
    model.get_input_embeddings()(row[:, 1:])  # of another text
    assert torch.equal(model(inputs_embeds=embedded).logits, plain)
    assert caplog.text.count("embeddings whose token ids are not known") == 1
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


@pytest.mark.parametrize("eager_first", [False, True])
@torch.no_grad()
def test_a_compiled_model_reads_ids_too(tiny_model, tokenizer, eager_first):
    """In one graph, with and without a cache that the ids travel with."""
    editor, requests = named_editor(tiny_model, tokenizer, "llama")
    model, row = editor.model, torch.tensor([tokenizer(f"People say that {requests[0].subject} sings")["input_ids"]])
    expected = model(row).logits
    with editor.disabled():
        assert not torch.allclose(model(row).logits, expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(row, use_cache=False).logits, expected)
    cache, found = None, []
    for start, end in ((0, 7), (7, 8), (8, row.shape[1])):
        run = model if eager_first and not start else compiled
        result = run(row[:, start:end], past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        found.append(result.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected)
    assert ends_of(tokenizer, requests, row[0].tolist())[7:].any()  # a name that goes across
    dynamic, static = (
        model.generate(row, max_new_tokens=6, do_sample=False, cache_implementation=kind, pad_token_id=0) for kind in ("dynamic", "static")
    )
    assert torch.equal(dynamic, static)


@torch.no_grad()
def test_ids_of_half_the_width(tiny_model, tokenizer):
    """Models take int32 ids as well."""
    editor, requests = named_editor(tiny_model, tokenizer, "llama")
    ids = torch.tensor([tokenizer(f"People say that {requests[0].subject} sings")["input_ids"]])
    wanted = editor.model(ids).logits
    assert torch.equal(editor.model(ids.int()).logits, wanted)
    with editor.disabled():
        assert not torch.equal(editor.model(ids.int()).logits, wanted)


def test_subjects_that_a_text_names_in_letters():
    subjects = {"New York", "New York City", "Ann", "C++", "Turkey", "St. John's", "the Eiffel Tower", "iron"}
    wanted = {
        "He left New York City for Ann.": {"New York City", "Ann"},
        "New York City is in New York": {"New York City", "New York"},
        "the new york city marathon": {"New York City"},
        "Annette ate a turkey": set(),
        "She writes C++, in St. John's": {"C++", "St. John's"},
        "C++11": set(),
        "The Eiffel Tower is of it. Iron": {"the Eiffel Tower"},
        "": set(),
    }
    assert {text: named_in(text, subjects) for text in wanted} == wanted
