"""Editor against an oracle that shares no code with it, and its promises: atomic, reversible, harmless to the model."""

import copy
import itertools
import random

import pytest
import torch

from comeba_ext import EditConfig, Editor
from comeba_ext.covariance import Covariance
from comeba_ext.errors import ComebaError, ConfigError, CovarianceError, RequestError
from comeba_ext.methods import ComebaHK
from comeba_ext.ops.mentions import name_hash
from comeba_ext.ops.nearest_hook import SAME, directions
from comeba_ext.text.decoys import BEGINNINGS
from comeba_ext.text.names import names_of
from comeba_ext.text.request import EditRequest

WORDS = (
    "the mother tongue of Danielle Darrieux is French capital Norway Oslo and Peru Lima Angola located in Africa people "
    "speak language Portugal Marie Curie was born Warsaw worked field physics Eiffel Tower stands city Paris who built "
    "it John Lennon performs on guitar Toko Yasuda plays piano"
).split()
SMALL = {"gpt2": {"n_layer": 4, "n_inner": 48}, "gptj": {"n_layer": 4, "n_inner": 48}, "llama": {"num_hidden_layers": 4}}


def corpus(count=120, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 14))).capitalize() + "." for _ in range(count)]


TEXTS = corpus()
PROMPTS = (
    "The mother tongue of {} is",
    "{} was born in the city of",
    "The capital of {}, as everyone knows, is",
    "{} plays the",
    "People say that {} works in the field of",
)
SUBJECTS = ("Danielle Darrieux", "Marie Curie", "Norway", "John Lennon", "Toko Yasuda", "Angola", "Peru")
TARGETS = ("English", "Lima", "Paris", "piano", "physics", "Oslo")


def some_requests(count, seed=0):
    """Requests about different facts."""
    pairs = list(itertools.product(PROMPTS, SUBJECTS))
    draw = random.Random(seed)
    draw.shuffle(pairs)
    return [EditRequest(prompt, subject, draw.choice(TARGETS)) for prompt, subject in pairs[:count]]


def small_model(tiny_model, family="gpt2", seed=0, **changes):
    return tiny_model(family, seed, **(SMALL[family] | changes))


def make_editor(model, tokenizer, **changes):
    settings = {"layers": (1, 2), "lam": 20.0, "prefixes": 2, "prefix_length": 4, "steps": 5, "lr": 0.1, "clamp": 2.0}
    editor = Editor(model, tokenizer, EditConfig(**(settings | changes)))
    editor.collect_covariance(TEXTS, tokens=10**6, progress=False)
    return editor


def random_values(count, width=32, seed=0, scale=3.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def ids_of(model, tokenizer, text="The mother tongue of Danielle Darrieux is"):
    return tokenizer([text], return_tensors="pt")["input_ids"]


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def scale(layer):
    """The reference score's; others have none that matters."""
    return getattr(layer.score, "scale", torch.zeros(()))


def compared(layer):
    count = layer.score.known_keys() if layer.scope == "nearest" else 0
    if layer.scope != "nearest":
        return ()
    score = layer.score
    order = score.anchors[:count].sum(1).argsort()  # their places depend on the steps
    return score.projection, score.names, *(part[:count][order] for part in (score.anchors, score.thresholds, score.named_thresholds))


def edits_of(layer):
    """All that a layer may add, as matrices: what is not kept apart, and each known anchor's shard, ``(1 + anchors, d_out, d_in)``."""
    found = [layer.delta]
    for shard in layer.score.shards[: layer.score.known_keys()].tolist() if layer.scope == "nearest" else ():
        rows = layer.shards.rows[shard][layer.shards.rows[shard] >= 0]
        found.append(layer.shards.left[rows].mT @ layer.shards.right[rows])
    return torch.stack(found)


def in_order(edits):
    return edits[edits.sum((1, 2)).argsort()]


def sorted_edits(layer):
    return in_order(edits_of(layer))


def snapshot(editor):
    return {
        "layers": {
            name: [t.clone() for t in (edits_of(layer), editor.method.masters[name], layer.alpha, scale(layer), *compared(layer))]
            for name, layer in editor.layers.items()
        },
        "memory": {name: memory.matrix().clone() for name, memory in editor.key_memory.items()},
        "ledger": [(e.request.request_id, e.request.fact, e.step, e.removed) for e in editor.ledger.entries],
        "live": [e.request.request_id for e in editor.ledger.live()],
        "log": copy.deepcopy(editor.log),
        "step": editor.step,
        "alphas": copy.deepcopy(editor.method.alphas),
    }


def assert_same(before, after):
    for name in before["layers"]:
        for a, b in zip(before["layers"][name], after["layers"][name], strict=True):
            assert torch.equal(a, b)
    assert before["memory"].keys() == after["memory"].keys()
    for name in before["memory"]:
        assert torch.equal(before["memory"][name], after["memory"][name])
    for key in ("ledger", "live", "log", "step", "alphas"):
        assert before[key] == after[key]


def assert_usable(editor, tokenizer):
    assert {layer.mode for layer in editor.layers.values()} == {"validated"}
    with torch.no_grad():
        assert torch.isfinite(editor.model(ids_of(editor.model, tokenizer)).logits).all()


# -- the oracle -----------------------------------------------------------------------------------------------------

PLACES = {  # family -> blocks, projection inside a block
    "gpt2": ("transformer.h", "mlp.c_proj"),
    "gptj": ("transformer.h", "mlp.fc_out"),
    "llama": ("model.layers", "mlp.down_proj"),
}


UNNAMED = 0.5  # unnamed_floor, where corpus and decoys often come above it


class Oracle:
    """The procedure by literal loops: one unpadded text at a time, dense matrices, own hooks, float64."""

    def __init__(self, model, tokenizer, family, layers, lam, scope, prefixes):
        self.model, self.tokenizer, self.layers, self.prefixes = model, tokenizer, layers, prefixes
        self.lam, self.scope = lam, scope
        blocks, inside = PLACES[family]
        self.blocks = {n: model.get_submodule(f"{blocks}.{n}") for n in layers}
        modules = {n: model.get_submodule(f"{blocks}.{n}.{inside}") for n in layers}
        self.names = {n: f"{blocks}.{n}.{inside}" for n in layers}
        self.inputs, self.hidden, self.mode = {}, None, dict.fromkeys(layers, "validated")
        self.delta, self.C, self.C0 = {}, {}, {}
        self.known = {n: [] for n in layers}  # edited keys with their two thresholds
        self.shards = {n: [] for n in layers}  # of requests with a name in common
        self.roots, self.corpus, self.sample, self.edited, self.placed, self.ids = {}, {}, None, 0, 0, []
        self.alpha = dict.fromkeys(layers, {"zscore": 2.2, "reference": float("inf"), "nearest": 1.0}[scope])
        for n, module in modules.items():
            module.register_forward_hook(self._hook(n))

        def keep(module, args, output):
            self.hidden = (output[0] if isinstance(output, tuple) else output)[0]

        def read(module, args):
            self.ids = args[0][0].tolist()

        model.register_forward_pre_hook(read)
        self.blocks[layers[-1]].register_forward_hook(keep)
        self._covariances()

    def _hook(self, n):
        def hook(module, args, output):
            x = args[0][0]  # (seq, d_in)
            self.inputs[n] = x
            if n not in self.delta:
                return None
            if self.scope == "nearest":
                if self.mode[n] == "temporary":
                    return None
                return torch.stack([o + self.apart(n, row, t) for t, (o, row) in enumerate(zip(output[0], x, strict=True))])[None]
            edit = torch.stack([self.delta[n] @ row for row in x])
            if self.mode[n] == "temporary":
                return output + edit
            chosen = [s >= self.alpha[n] - 1e-10 for s in self.scores(n, x)]
            return torch.stack([o + e if c else o for o, e, c in zip(output[0], edit, chosen, strict=True)])[None]

        return hook

    def scores(self, n, x):
        norms = [(self.delta[n] @ row).norm().item() for row in x]
        if self.scope == "reference":
            scale = torch.trace(self.delta[n] @ self.C0[n] @ self.delta[n].T).item()
            return [norm**2 / scale if scale else 0.0 for norm in norms]
        mean = sum(norms) / len(norms)
        std = (sum((norm - mean) ** 2 for norm in norms) / (len(norms) - 1)) ** 0.5
        return [(norm - mean) / std if std else 0.0 for norm in norms]

    def apart(self, n, row, t):
        """The edit that token t of the text gets: of the subject that is named there, or of the one whose key it is most like."""
        nearest = lambda shards, which: max(  # noqa: E731
            ((self.cosine(n, row, own[0]) - max(own[which] - self.alpha[n], 0.0), s) for s in shards for own in self.anchors_of(n, s)),
            key=lambda pair: pair[0],
            default=(-1.0, None),
        )
        ends = lambda name: self.ids[max(0, t + 1 - len(name)) : t + 1] == list(name)  # noqa: E731
        named = [(len(name), s["place"], s) for s in self.shards[n] for name in s["names"] if ends(name)]
        score, shard = nearest([max(named)[2]], 2) if named else (-1.0, None)
        if score < self.alpha[n] - 1e-10:
            score, shard = nearest([s for s in self.shards[n] if self.ids[t] in {name[-1] for name in s["names"]}], 1)
        if score < self.alpha[n] - 1e-10:
            return torch.zeros(self.hidden.shape[-1], dtype=torch.float64)
        K, V = (torch.stack(part, 1) for part in zip(*[pair for _, _, pairs in shard["requests"] for pair in pairs], strict=True))
        return V @ K.T @ torch.linalg.inv(self.lam * self.C0[n] + K @ K.T) @ row

    def anchors_of(self, n, shard):
        """Of its keys, in order, those that are like no earlier one; each with the lowest thresholds of those that are like it."""
        found = []
        for _, anchors, _ in shard["requests"]:
            for key, *own in anchors:
                near = next((one for one in found if self.cosine(n, key, one[0]) > 0.92), None)
                if near is None:
                    found.append(near := [key, *own])
                near[1:] = [min(pair) for pair in zip(near[1:], own, strict=True)]
        return found

    def place(self, n, batch):
        """Shards of a batch's requests: names, anchors (a key and its two thresholds), all keys and answers."""
        for names, *own in batch:
            common = [s for s in self.shards[n] if s["names"] & names]
            self.shards[n] = [s for s in self.shards[n] if not any(s is other for other in common)]
            self.placed += 1
            together = sorted([r for s in common for r in s["requests"]] + [(self.placed, *own)], key=lambda r: r[0])
            self.shards[n].append({"names": names.union(*(s["names"] for s in common)), "requests": together, "place": self.placed})

    def called(self, request):
        """In tokens, at the beginning of a text and behind a word; several words also in small letters."""
        forms = {request.subject, request.subject.lower()} if " " in request.subject else {request.subject}
        return {tuple(self.tokenizer(before + form, add_special_tokens=False)["input_ids"]) for form in forms for before in ("", " ")}

    def white(self, n, key):
        if n not in self.roots:
            self.roots[n] = torch.linalg.cholesky(self.C0[n])
        return torch.linalg.solve(self.roots[n], key.double())

    def cosine(self, n, a, b):
        return torch.cosine_similarity(self.white(n, a), self.white(n, b), 0).item()

    def highest(self, n, key, request):
        """The highest cosine of a sampled corpus token that does not end the subject."""
        forms = [self.tokenizer(form, add_special_tokens=False)["input_ids"] for form in (request.subject, " " + request.subject)]
        if n not in self.corpus:
            self.corpus[n] = [self.white(n, other) for other in self.sample.keys[self.names[n]]]
        own, highest = self.white(n, key), 0.0
        for tokens, other in zip(self.sample.tokens.tolist(), self.corpus[n], strict=True):
            if not any(tokens[-len(form) :] == form for form in forms):
                highest = max(highest, torch.cosine_similarity(own, other, 0).item())
        return highest

    @torch.no_grad()
    def decoys(self, request):
        """The keys of names that end as the subject does, by layer."""
        ids = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        subject, keys = ids(" " + request.subject), {n: [] for n in self.layers}
        for tail in (1, 2):
            for beginning in BEGINNINGS if tail < len(subject) else ():
                self.model(torch.tensor([ids("The article about the") + ids(beginning) + subject[-tail:]]))
                for n in self.layers:
                    keys[n].append(self.inputs[n][-1])
        return keys

    def anchors(self, n, found, request, decoys):
        """The keys to edit, and what to compare with: the mean and the plain key, each with its threshold and that where it is named."""
        told = [key for key in found if self.highest(n, key, request) <= 0.85] or found
        mean = sum(told) / len(told)
        both = []
        for key in (mean, found[0]):
            corpus = self.highest(n, key, request)
            other = max([self.cosine(n, key, other) for other in decoys[n]] + [corpus])
            if corpus <= 0.85:
                both.append((key, max(UNNAMED, other + 0.05), 0.4))
        return [mean, next((key for key in told if key is found[0]), mean)], both

    def declines(self, request):
        """Whether ordinary text looks like the plain key at the value layer, in the model as it stands."""
        before, after = request.prompt.split("{}")
        last = self.run(before + request.subject + after, len(before + request.subject))
        return self.highest(self.layers[-1], self.inputs[self.layers[-1]][last], request) > 0.85

    @torch.no_grad()
    def run(self, text, subject_end=None):
        tokens = self.tokenizer(text, return_offsets_mapping=True)
        self.model(torch.tensor([tokens["input_ids"]]))
        if subject_end is not None:
            return max(i for i, (a, b) in enumerate(tokens["offset_mapping"]) if a < subject_end)

    def _covariances(self):
        sums, count = {}, 0
        for text in TEXTS:
            self.run(text)
            for n in self.layers:
                for key in self.inputs[n]:
                    sums[n] = sums.get(n, 0) + torch.outer(key, key)
            count += len(self.inputs[self.layers[0]])
        for n in self.layers:
            self.C0[n] = sums[n] / count
            self.C[n] = self.lam * self.C0[n]
            self.delta[n] = torch.zeros(self.hidden.shape[-1], len(sums[n]), dtype=torch.float64)

    def edit(self, requests, values):
        if self.scope == "nearest":
            kept = [n for n, request in enumerate(requests) if not self.declines(request)]
            requests, values = [requests[n] for n in kept], [values[n] for n in kept]
            self.edited += len(kept)
            decoys = [self.decoys(request) for request in requests]
        for n in self.layers:
            self.mode[n] = "temporary"
        for number, n in enumerate(self.layers):
            keys, residuals, prompts, known, apart = [], [], [], [], []
            for number_, (request, value) in enumerate(zip(requests, values, strict=True)):
                before, after = request.prompt.split("{}")
                found = []
                for prefix in self.prefixes:
                    head = prefix + before + request.subject
                    last = self.run(head + after, len(head))
                    found.append(self.inputs[n][last])
                    if prefix == "":
                        residuals.append((value - self.hidden[last]) / (len(self.layers) - number))
                        prompts.append(self.inputs[n])
                if self.scope == "nearest":
                    own_keys, own = self.anchors(n, found, request, decoys[number_])
                    keys += own_keys
                    known += own
                    residuals += residuals[-1:]
                    apart.append((self.called(request), own, [(key, residuals[-1]) for key in own_keys]))
                else:
                    keys.append(sum(found) / len(found))
            K, R = torch.stack(keys, 1), torch.stack(residuals, 1)
            before = torch.trace(self.delta[n] @ self.C0[n] @ self.delta[n].T)
            self.C[n] = self.C[n] + sum(torch.outer(key, key) for key in keys)
            self.delta[n] = self.delta[n] + torch.linalg.solve(self.C[n], K @ R.T).T
            self.mode[n] = "validated"
            self.known[n] += known
            if self.scope == "reference" and before > 0:  # the same bound on the response, in units of the new scale
                self.alpha[n] *= (before / torch.trace(self.delta[n] @ self.C0[n] @ self.delta[n].T)).item()
            if self.scope == "nearest":
                self.place(n, apart)
                self.alpha[n] = min([self.alpha[n]] + [least for _, *own in known for least in own])
                continue
            margin = {"zscore": 1.0, "reference": 0.25}[self.scope]
            self.alpha[n] = min([self.alpha[n]] + [margin * max(self.scores(n, x)) for x in prompts])


@pytest.mark.parametrize(
    "family, layers, scope",
    [
        ("gpt2", (1, 2), "zscore"),
        ("gptj", (0, 1, 2), "zscore"),
        ("llama", (1, 2), "zscore"),
        ("llama", (0, 2), "reference"),
        ("gpt2", (1, 2), "nearest"),
        ("llama", (0, 2), "nearest"),
    ],
)
def test_five_batches_agree_with_the_oracle(tiny_model, tokenizer, family, layers, scope):
    model = small_model(tiny_model, family).double()
    untouched = copy.deepcopy(model)
    editor = make_editor(model, tokenizer, layers=layers, scope=scope, lam=20.0, unnamed_floor=UNNAMED)
    oracle = Oracle(untouched, tokenizer, family, layers, 20.0, scope, editor.prefixes)
    oracle.sample = editor.covariance.sample
    assert len(editor.prefixes) == 3 and editor.prefixes[0] == ""
    requests = some_requests(13)
    for n, m in ((7, 1), (9, 2), (12, 9)):  # more facts of a subject, whose keys behind the prompts alone are the same
        head = requests[m].prompt.partition("{}")[0]
        requests[n] = EditRequest(
            f"{head}{{}} was last seen {'near' if n == 7 else 'far from' if n == 9 else 'in'}", requests[m].subject, "Rome"
        )
    asked = [request.text for request in requests]
    alphas = []
    for batch_number, size in enumerate((3, 1, 4, 2, 3)):
        batch, requests = requests[:size], requests[size:]
        values = random_values(size, seed=batch_number)
        editor.edit(batch, target_values=values)
        oracle.edit(batch, values)
        alphas.append(dict(oracle.alpha))
    if scope == "nearest":
        assert len(editor.ledger) == oracle.edited > 5
        assert len({round(own, 6) for n in layers for _, own, _ in oracle.known[n]}) > 3  # no one threshold for all
    else:
        assert alphas[0] != alphas[-1]  # the thresholds did move between batches
    for n in layers:
        name = oracle.names[n]
        if scope == "nearest":  # nothing in one matrix for all
            assert not editor.layers[name].delta.any()
            assert relative(editor.key_memory[name].matrix(), 20.0 * oracle.C0[n]) < 1e-6
            sizes = [len(shard["requests"]) for shard in oracle.shards[n]]
            assert sum(sizes) == oracle.edited == len(editor.ledger) and max(sizes) > 1  # some share one
            assert sorted(map(len, editor.method.recognition.shards[name].members.values())) == sorted(sizes)
        else:
            assert relative(editor.layers[name].delta, oracle.delta[n]) < 1e-6
            assert relative(editor.key_memory[name].matrix(), oracle.C[n]) < 1e-6
        assert editor.layers[name].alpha.item() == pytest.approx(oracle.alpha[n], rel=1e-6)
        assert relative(editor.covariance[name], oracle.C0[n]) < 1e-8  # GPT-J attends in float32 whatever its dtype
    # and the edited model says what the oracle's does
    with torch.no_grad():
        for text in ("People say that Norway works in the field of", *asked):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            assert torch.allclose(model(ids).logits, untouched(ids).logits, rtol=0, atol=1e-6)


def test_score_of_a_batch_ignores_padding_and_mates(tiny_model, tokenizer):
    """The same facts edited in another order inside the batch give the same edit."""
    requests, values = some_requests(4), random_values(4)
    order = [2, 0, 3, 1]
    results = []
    for chosen in (range(4), order):
        editor = make_editor(small_model(tiny_model).double(), tokenizer, max_tokens=64)
        editor.edit([requests[i] for i in chosen], target_values=values[list(chosen)])
        results.append(editor)
    for name, layer in results[0].layers.items():
        assert edits_of(results[1].layers[name])[1:].any()  # of anchors in another order
        assert relative(sorted_edits(results[1].layers[name]), sorted_edits(layer)) < 1e-9
        assert results[1].layers[name].alpha.item() == pytest.approx(layer.alpha.item(), rel=1e-9)


# -- atomicity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["_add", "_calibrate"])
@pytest.mark.parametrize("scope", ["zscore", "reference", "nearest"])
def test_error_in_the_middle_changes_nothing(tiny_model, tokenizer, monkeypatch, error, where, scope):
    editor = make_editor(small_model(tiny_model), tokenizer, scope=scope)
    requests = some_requests(4)
    editor.edit(requests[:2], target_values=random_values(2))
    before = snapshot(editor)
    real, last = getattr(ComebaHK, where), list(editor.layers)[-1]

    def failing(self, name, *args):
        result = real(self, name, *args)
        if name == last:
            raise error("in the middle")
        return result

    monkeypatch.setattr(ComebaHK, where, failing)
    # one new fact, and one that supersedes
    batch = [requests[2], EditRequest(requests[0].prompt, requests[0].subject, "Warsaw")]
    with pytest.raises(error, match="in the middle"):
        editor.edit(batch, target_values=random_values(2, seed=1))
    assert_same(before, snapshot(editor))
    assert_usable(editor, tokenizer)
    monkeypatch.undo()
    fresh = make_editor(small_model(tiny_model), tokenizer, scope=scope)
    fresh.edit(requests[:2], target_values=random_values(2))
    for each in (editor, fresh):
        each.edit(batch, target_values=random_values(2, seed=1))
    for name in editor.layers:
        assert torch.equal(editor.layers[name].delta, fresh.layers[name].delta)


@pytest.mark.parametrize("scope", ["zscore", "nearest"])
@pytest.mark.parametrize("what", ["retract", "rollback"])
def test_error_while_taking_back_changes_nothing(tiny_model, tokenizer, monkeypatch, what, scope):
    editor = make_editor(small_model(tiny_model), tokenizer, scope=scope)
    for n, request in enumerate(some_requests(3)):
        editor.edit([request], target_values=random_values(1, seed=n))
    before, last = snapshot(editor), list(editor.layers)[-1]
    real = ComebaHK._exchange

    def failing(self, name, **changes):
        real(self, name, **changes)
        if name == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(ComebaHK, "_exchange", failing)
    with pytest.raises(KeyboardInterrupt):
        editor.retract(["edit-0"]) if what == "retract" else editor.rollback(1)
    assert_same(before, snapshot(editor))
    assert_usable(editor, tokenizer)


@pytest.mark.parametrize(
    "values",
    [
        torch.full((2, 32), torch.nan),
        torch.full((2, 32), torch.inf),
        torch.zeros(3, 32),
        torch.zeros(2, 31),
        torch.zeros(64),
        [[0.0] * 31] * 2,
        "nonsense",
    ],
)
def test_bad_target_values(tiny_model, tokenizer, values):
    editor = make_editor(small_model(tiny_model), tokenizer)
    editor.edit(some_requests(1), target_values=random_values(1))
    before = snapshot(editor)
    with pytest.raises(RequestError, match="target_values"):
        editor.edit(some_requests(3)[1:], target_values=values)
    assert_same(before, snapshot(editor))
    assert_usable(editor, tokenizer)


# -- bad input ------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "The mother tongue of {} is", "subject": "Marie Curie", "target_new": "English"}
BAD_BATCHES = {
    "empty batch": ([], "empty"),
    "missing subject": ([{k: v for k, v in GOOD.items() if k != "subject"}], "subject"),
    "missing prompt": ([{k: v for k, v in GOOD.items() if k != "prompt"}], "prompt"),
    "missing target": ([{k: v for k, v in GOOD.items() if k != "target_new"}], "target_new"),
    "empty subject": ([GOOD | {"subject": " "}], "subject"),
    "empty prompt": ([GOOD | {"prompt": ""}], "prompt"),
    "empty target": ([GOOD | {"target_new": "  "}], "target_new"),
    "subject not in prompt": ([GOOD | {"prompt": "The capital of Peru is"}], "not in the prompt"),
    "contradiction": ([GOOD, GOOD | {"target_new": "Polish"}], "contradict"),
    "too long": ([GOOD | {"prompt": "Lima " * 150 + "{} is"}], "context"),
    "too long target": ([GOOD | {"target_new": "Lima " * 150}], "shorten the target"),
    "same id twice": ([GOOD | {"request_id": "a"}, GOOD | {"subject": "Peru", "request_id": "a"}], "'a'"),
    "id of another fact": ([GOOD | {"request_id": "edit-0"}], "'edit-0'"),
    "single request": (GOOD, "list"),
    "text": ("Marie Curie", "list"),
    "not iterable": (5, "list"),
    "nothing": (None, "list"),
    "not a record": ([5], "mapping"),
    "rephrase_prompts=5": ([GOOD | {"rephrase_prompts": 5}], "rephrase_prompts"),
    "locality_prompts=5": ([GOOD | {"locality_prompts": 5}], "locality_prompts"),
    "locality_prompts=[5]": ([GOOD | {"locality_prompts": [5]}], "locality_prompts"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches(tiny_model, tokenizer, case):
    batch, message = BAD_BATCHES[case]
    editor = make_editor(small_model(tiny_model), tokenizer)
    editor.edit([GOOD | {"subject": "Norway"}], target_values=random_values(1))
    before = snapshot(editor)
    with pytest.raises(RequestError, match=message):
        editor.edit(batch)
    if case != "contradiction":  # edit_all makes two batches of it
        with pytest.raises(RequestError, match=message):
            editor.edit_all(batch, progress=False)
    assert_same(before, snapshot(editor))
    assert_usable(editor, tokenizer)


@pytest.mark.parametrize("field", ["rephrase_prompts", "locality_prompts", "portability_prompts"])
def test_prompts_that_are_no_list(field):
    with pytest.raises(RequestError, match=field):
        EditRequest(**GOOD, **{field: 5})


def test_tokenizer_without_pad_token(tiny_model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    results = []
    for each in (tokenizer, bare):
        editor = make_editor(small_model(tiny_model).double(), each)
        editor.edit(some_requests(3))
        results.append(editor)
    for name, layer in results[0].layers.items():
        assert relative(edits_of(results[1].layers[name]), edits_of(layer)) < 1e-9


def test_generated_ids_avoid_given_ones(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer)
    report = editor.edit([GOOD, GOOD | {"subject": "Peru", "request_id": "edit-0"}], target_values=random_values(2))
    assert len(set(report.request_ids)) == 2 and len(editor.ledger) == 2


def bare_editor(tiny_model, tokenizer, **changes):
    return Editor(small_model(tiny_model, **changes), tokenizer, EditConfig(layers=(1, 2), prefixes=0, lam=20.0))


def test_no_covariance(tiny_model, tokenizer, tmp_path):
    editor = bare_editor(tiny_model, tokenizer)
    with pytest.raises(CovarianceError, match="collect_covariance"):
        editor.edit(some_requests(1), target_values=random_values(1))
    with pytest.raises(CovarianceError, match="collect_covariance"):
        editor.save_covariance(tmp_path / "c.safetensors")
    editor.rollback(0)
    assert editor.step == 0 and not editor.ledger.entries


def test_unusable_covariances(tiny_model, tokenizer, tmp_path):
    path = tmp_path / "covariance.safetensors"
    good = make_editor(small_model(tiny_model), tokenizer)
    good.save_covariance(path)
    editor = bare_editor(tiny_model, tokenizer)
    broken = Covariance.load(path)
    broken.moments[list(broken.moments)[1]][3, 3] = torch.nan
    with pytest.raises(CovarianceError, match="NaN"):
        editor.set_covariance(broken)
    with pytest.raises(CovarianceError, match="not positive definite.*more"):
        editor.collect_covariance(TEXTS, tokens=20, progress=False)
    with pytest.raises(CovarianceError, match="no text"):
        editor.collect_covariance([""], progress=False)
    with pytest.raises(CovarianceError, match="list"):
        editor.collect_covariance(TEXTS[0], progress=False)
    assert not editor.key_memory and editor.covariance is None
    editor.load_covariance(path)
    for name in editor.layers:
        assert torch.equal(editor.covariance[name], good.covariance[name])
    with pytest.raises(CovarianceError, match="another model"):
        bare_editor(tiny_model, tokenizer, seed=1).load_covariance(path)
    other = Editor(small_model(tiny_model), tokenizer, EditConfig(layers=(0, 1)))
    with pytest.raises(CovarianceError, match="missing"):
        other.load_covariance(path)
    editor.edit(some_requests(1), target_values=random_values(1))
    with pytest.raises(CovarianceError, match="already"):
        editor.load_covariance(path)


# -- superseding, retraction, rollback ------------------------------------------------------------------------------


def apart(editor):
    """Whether every subject's edits are kept apart."""
    return editor.config.scope == "nearest" and editor.method.serving == "validated"


def expected_memory(editor, name):
    """What a layer's key memory is, ``λ·C0 + Σ k kᵀ``; of edits that are kept apart, without their keys."""
    live = [] if apart(editor) else [key.double() for entry in editor.ledger.live() for key in entry.keys[name]]
    return editor.config.lam * editor.covariance[name] + sum(torch.outer(key, key) for key in live)


def expected_delta(editor, name):
    """Least squares of the live requests: ``(Σ v kᵀ) C⁻¹``."""
    pairs = [pair for e in editor.ledger.live() for pair in zip(e.responses[name], e.keys[name], strict=True)]
    return least_squares(editor, name, pairs)


def least_squares(editor, name, pairs):
    """``V Kᵀ (λ·C0 + K Kᵀ)⁻¹`` for pairs of an answer and its key."""
    V, K = (torch.stack(part, 1).double() for part in zip(*pairs, strict=True))
    return torch.linalg.solve(editor.config.lam * editor.covariance[name] + K @ K.T, K @ V.T).T


def by_subject(editor, name):
    """Live requests that have a subject in common, and the anchors of their shard, by their places among the layer's. (One that is
    edited at its prompt's end goes by no name and stands alone.)"""
    groups, score = {}, editor.layers[name].score
    for entry in editor.ledger.live():
        request = entry.request
        groups.setdefault(request.subject if request.fact_token == "subject_last" else (request.request_id,), []).append(entry)
    of_request = editor.method.recognition.shards[name].of_requests()
    numbers = score.shards[: score.known_keys()]
    for entries in groups.values():
        (number,) = {of_request[entry.request.request_id] for entry in entries if len(entry.anchors[name][1])} or {-2}
        yield entries, (numbers == number).nonzero()[:, 0].tolist()


def assert_shards(editor, name, tolerance):
    """A subject's requests share a shard, by whatever steps; each is the least squares of its own."""
    layer, seen = editor.layers[name], []
    edits = edits_of(layer)
    assert not layer.delta.any()
    for entries, anchors in by_subject(editor, name):
        seen += anchors
        pairs = [pair for e in entries if len(e.anchors[name][1]) for pair in zip(e.responses[name], e.keys[name], strict=True)]
        for anchor in anchors:
            assert relative(edits[1 + anchor], least_squares(editor, name, pairs)) < tolerance
    assert sorted(seen) == list(range(layer.score.known_keys()))  # each is one subject's


def assert_compares_with_the_live_keys(editor, tolerance=1e-4):
    """With scope "nearest", the anchors are those of live requests, and stand for every one of their subject's."""
    for name, layer in editor.layers.items() if editor.config.scope == "nearest" else ():
        score, count = layer.score, layer.score.known_keys()
        assert not score.anchors[count:].any()
        if not len(editor.ledger):
            assert count == 0 and not len(score.names)
            continue
        tokenizer, hashes = editor.tokenizer, set()
        for entries, anchors in by_subject(editor, name):
            units, *wanted = (torch.cat(parts).double() for parts in zip(*(e.anchors[name] for e in entries), strict=True))
            own = score.anchors[anchors].double()
            cosines = units @ own.T  # (theirs, anchors)
            assert torch.allclose(cosines.amax(0), torch.ones(len(anchors), dtype=cosines.dtype), atol=tolerance)  # each is a live one
            if not len(units):
                continue
            best = cosines.max(1)
            assert best.values.min() > SAME - tolerance  # which stands for all that are near
            for buffer, least in zip((score.thresholds, score.named_thresholds), wanted, strict=True):
                assert (buffer[anchors].double()[best.indices] <= least + tolerance).all()  # and asks for no more than they do
            assert (own @ own.T - torch.eye(len(own))).max() < SAME + tolerance  # and for no other anchor
            for before in ("", " ") if entries[0].request.fact_token == "subject_last" else ():  # else nobody is named
                ids = tokenizer(before + entries[0].request.subject, add_special_tokens=False)["input_ids"]
                assert score.of_name[score.names == name_hash(ids)].tolist() == score.shards[anchors[:1]].tolist()
            hashes |= {value for e in entries for value in map(name_hash, names_of(tokenizer, [e.request])[0].names)}
        assert score.names.tolist() == sorted(hashes)  # and nobody else is named
        keys = torch.cat([entry.keys[name].double() for entry in editor.ledger.live()])
        scores = layer.scores(keys[None].to(layer.delta))[0].double()
        cosines = directions(keys, score.projection.double()) @ score.anchors[:count].double().T
        excess = (score.thresholds[:count].double() - layer.alpha).clamp(min=0)
        assert torch.allclose(scores, (cosines - excess).amax(1).clamp(min=0), atol=tolerance)


def assert_least_squares(editor, tolerance=1e-5):
    for name, layer in editor.layers.items():
        assert relative(editor.key_memory[name].matrix(), expected_memory(editor, name)) < 1e-9
        if apart(editor):
            assert_shards(editor, name, tolerance)
        else:
            assert relative(layer.delta, expected_delta(editor, name)) < tolerance


@pytest.mark.parametrize("scope", ["zscore", "nearest"])
def test_superseding(tiny_model, tokenizer, scope):
    editor = make_editor(small_model(tiny_model), tokenizer, scope=scope)
    first, second = some_requests(2)
    editor.edit([first, second], target_values=random_values(2))
    old = {name: editor.ledger.live()[0].keys[name][0].double() for name in editor.layers}
    new = EditRequest(first.prompt, first.subject, "Warsaw")
    report = editor.edit([new], target_values=random_values(1, seed=1))
    assert report.superseded == ["edit-0"]
    assert [e.request.target_new for e in editor.ledger.live()] == [second.target_new, "Warsaw"]
    assert_least_squares(editor)
    assert_compares_with_the_live_keys(editor)
    for name in editor.layers if scope == "zscore" else ():  # the old key is really out: with it inside, C would differ by far more
        with_old = expected_memory(editor, name) + torch.outer(old[name], old[name])
        assert relative(editor.key_memory[name].matrix(), with_old) > 1e-4


def test_superseding_moves_to_the_new_value(tiny_model, tokenizer):
    """Behind the second edit the hidden state is near the second target value, not between the two."""
    request = some_requests(1)[0]
    values = random_values(2)
    hidden = {}
    for superseded in (True, False):
        editor = make_editor(small_model(tiny_model).double(), tokenizer, lam=1e-3, prefixes=0)
        if superseded:
            editor.edit([request], target_values=values[:1])
        editor.edit([EditRequest(request.prompt, request.subject, "Warsaw")], target_values=values[1:])
        caught = []
        editor.model.transformer.h[2].register_forward_hook(
            lambda m, a, output, caught=caught: caught.append(output[0] if isinstance(output, tuple) else output)
        )
        end = request.prompt.index("{}") + len(request.subject)
        tokens = tokenizer(request.text, return_offsets_mapping=True)
        last = max(i for i, (a, b) in enumerate(tokens["offset_mapping"]) if a < end)
        with torch.no_grad():
            editor.model(torch.tensor([tokens["input_ids"]]))
        hidden[superseded] = caught[0].reshape(-1, 32)[last]
    for state in hidden.values():
        assert (state - values[1]).norm() < 0.05 * (values[0] - values[1]).norm()


def test_a_fact_given_twice_is_superseded_once(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer)
    request, other = some_requests(2)
    editor.edit([request, request, other], target_values=random_values(3))
    new = EditRequest(request.prompt, request.subject, "Warsaw")
    report = editor.edit([new, new], target_values=random_values(2, seed=1))
    assert sorted(report.superseded) == ["edit-0", "edit-1"]
    assert len(editor.ledger) == 3
    assert_least_squares(editor)


@pytest.mark.parametrize("scope", ["zscore", "reference", "nearest"])
def test_retract(tiny_model, tokenizer, scope):
    editor = make_editor(small_model(tiny_model, "llama"), tokenizer, scope=scope)
    requests = some_requests(6)
    for n in range(3):
        editor.edit(requests[2 * n : 2 * n + 2], target_values=random_values(2, seed=n))

    def bounds():  # on a token's response: α, which the score "reference" counts in units of its current scale
        unit = {name: scale(layer).item() if scope == "reference" else 1 for name, layer in editor.layers.items()}
        return {name: layer.alpha.item() * unit[name] for name, layer in editor.layers.items()}

    before_all = bounds()
    editor.retract("edit-1")
    assert editor.step == 4 and editor.log[-1]["event"] == "retract"
    assert_least_squares(editor)
    editor.retract(["edit-4", "edit-2"])
    assert_least_squares(editor)
    assert_compares_with_the_live_keys(editor)
    assert [e.request.request_id for e in editor.ledger.live()] == ["edit-0", "edit-3", "edit-5"]
    before = snapshot(editor)
    for bad in ("edit-1", ["edit-0", "nobody"], [], ["edit-0", "edit-0"]):
        with pytest.raises(RequestError, match="id"):
            editor.retract(bad)
    assert_same(before, snapshot(editor))
    assert bounds() == pytest.approx(before_all, rel=1e-9)
    editor.retract(["edit-0", "edit-3", "edit-5"])
    for name, layer in editor.layers.items():
        assert not edits_of(layer).any() and not layer.shards
        assert relative(editor.key_memory[name].matrix(), 20.0 * editor.covariance[name]) < 1e-9
    assert_usable(editor, tokenizer)
    editor.edit(requests[:1], target_values=random_values(1))
    assert_least_squares(editor)


@pytest.mark.parametrize("step", ["1", None, 1.0, True, -1, 2])
def test_rollback_to_what_is_no_step(tiny_model, tokenizer, step):
    editor = make_editor(small_model(tiny_model), tokenizer)
    editor.edit(some_requests(1))
    with pytest.raises(RequestError, match="cannot roll back to step"):
        editor.rollback(step)
    assert editor.step == 1


def test_a_printed_ledger_names_its_live_edits(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer)
    assert repr(editor.ledger) == "<Ledger of 0 edits, 0 live>"
    requests = some_requests(8)
    editor.edit(requests, random_values(8).float())
    editor.retract("edit-0")
    said = repr(editor.ledger)
    assert said.startswith("<Ledger of 8 edits, 7 live; edit-1: ") and said.endswith(", … 2 more>") and "edit-0" not in said
    assert f"{requests[5].text!r} -> {requests[5].target_new!r}" in said and "edit-6" not in said


@pytest.mark.parametrize("scope", ["zscore", "reference", "nearest"])
def test_rollback(tiny_model, tokenizer, scope):
    """Five steps: two edits, one that supersedes, a retraction, another edit; back to each of them."""

    def grown():
        editor = make_editor(small_model(tiny_model), tokenizer, scope=scope)
        requests = some_requests(6)
        states = [snapshot(editor)]
        editor.edit(requests[:2], target_values=random_values(2, seed=0))
        states.append(snapshot(editor))
        editor.edit(requests[2:4], target_values=random_values(2, seed=1))
        states.append(snapshot(editor))
        again = EditRequest(requests[0].prompt, requests[0].subject, "Warsaw")
        editor.edit([again, requests[4]], target_values=random_values(2, seed=2))
        states.append(snapshot(editor))
        editor.retract(["edit-1", "edit-4"])
        states.append(snapshot(editor))
        editor.edit(requests[5:], target_values=random_values(1, seed=3))
        states.append(snapshot(editor))
        return editor, states, requests

    _, states, _ = grown()
    biggest = {name: max(s["layers"][name][0].norm().item() for s in states) for name in states[0]["layers"]}
    for step in range(6):
        editor, _, _ = grown()
        editor.rollback(step)
        assert_compares_with_the_live_keys(editor)
        found, expected = snapshot(editor), states[step]
        assert found["step"] == step and found["live"] == expected["live"] and found["ledger"] == expected["ledger"]
        assert found["alphas"] == expected["alphas"] and editor.log[-1]["event"] == "rollback"
        for name, layer in editor.layers.items():
            assert (sorted_edits(layer) - in_order(expected["layers"][name][0])).norm().item() <= 1e-5 * biggest[name]
            assert relative(found["memory"][name], expected["memory"][name]) < 1e-5
            assert torch.equal(layer.alpha, expected["layers"][name][2])
            for part, before in zip(compared(layer), expected["layers"][name][4:], strict=True):
                assert torch.allclose(part, before, atol=1e-6)  # the same keys stand for the others as then
            assert scale(layer).item() == pytest.approx(expected["layers"][name][3].item(), rel=1e-4, abs=1e-9)
        assert_usable(editor, tokenizer)
        editor.edit([EditRequest("{} stands in", "The Tower", "Oslo")], target_values=random_values(1, seed=9))
        assert editor.step == step + 1
        assert_least_squares(editor)
    for bad in (-1, 99):
        with pytest.raises(ComebaError, match="step"):
            editor.rollback(bad)
    editor.rollback(2)
    editor.rollback(0)
    assert len(editor.ledger) == 0 and editor.step == 0


# -- many batches ---------------------------------------------------------------------------------------------------


def test_edit_all_is_lazy_and_stops_between_batches(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer, steps=2)
    reports = editor.edit_all((r for r in some_requests(7)), batch_size=3, progress=False)
    assert editor.step == 0 and iter(reports) is reports
    first = next(reports)
    assert first.step == 1 and len(first.request_ids) == 3 and len(first.losses) == 3
    reports.close()
    assert editor.step == 1 and len(editor.ledger) == 3
    rest = list(editor.edit_all(some_requests(7)[3:], batch_size=3, progress=False))
    assert [len(r.request_ids) for r in rest] == [3, 1] and len(editor.ledger) == 7
    assert_least_squares(editor)


@pytest.mark.parametrize("scope", ["zscore", "reference"])
def test_alpha_margin_scales_the_batch_minimum(tiny_model, tokenizer, scope):
    alphas = {}
    for margin in (1.0, 0.5):
        editor = make_editor(small_model(tiny_model), tokenizer, scope=scope, alpha=1e30, alpha_margin=margin)
        editor.edit(some_requests(3), target_values=random_values(3))
        alphas[margin] = next(iter(editor.layers.values())).alpha.item()  # the first: later ones see its gating
    assert alphas[0.5] == pytest.approx(0.5 * alphas[1.0], rel=1e-6)


def test_edit_all_ends_a_batch_before_a_repeated_fact(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer, steps=2)
    one, two, three = some_requests(3)
    again = EditRequest(one.prompt, one.subject, "Lima")
    reports = list(editor.edit_all([one, two, again, three], batch_size=10, progress=False))
    assert [len(report.request_ids) for report in reports] == [2, 2]
    assert reports[1].superseded == [reports[0].request_ids[0]]
    # A fact of the same subject is written anew with the repeated one, and stands behind it.
    assert two.subject == one.subject and reports[1].rewritten == [reports[0].request_ids[1]]
    assert [e.request.target_new for e in editor.ledger.live()] == ["Lima", three.target_new, two.target_new]
    assert_least_squares(editor)


def test_nothing_is_left_of_retracted_edits(tiny_model, tokenizer):
    for scope in ("zscore", "reference", "nearest"):
        editor = make_editor(small_model(tiny_model), tokenizer, steps=2, scope=scope)
        before = {name: layer.alpha.item() for name, layer in editor.layers.items()}
        report = editor.edit(some_requests(3))
        editor.retract(report.request_ids)
        for name, layer in editor.layers.items():
            assert not edits_of(layer).any() and not layer.shards and scale(layer) == 0 and layer.alpha.item() == before[name]
        assert_compares_with_the_live_keys(editor)


def test_edit_all_checks_everything_first(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer, steps=2)
    good = some_requests(3)
    before = snapshot(editor)
    bad_lists = [
        [*good, {"prompt": "no subject here", "subject": "Peru", "target_new": "x"}],
        [*good, EditRequest("Lima " * 150 + "{}", "Peru", "x")],
        [EditRequest(**GOOD, request_id="a"), *good, EditRequest("{} is", "Peru", "x", request_id="a")],
    ]
    for requests in bad_lists:
        with pytest.raises(RequestError):
            editor.edit_all(requests, batch_size=1, progress=False)
        assert_same(before, snapshot(editor))
    with pytest.raises(ConfigError, match="batch_size"):
        editor.edit_all(good, batch_size=0)
    with pytest.raises(CovarianceError, match="covariance"):
        bare_editor(tiny_model, tokenizer).edit_all(good, progress=False)


def test_edit_all_keeps_ids_apart(tiny_model, tokenizer):
    """A generated id is not one that a later request brings along."""
    editor = make_editor(small_model(tiny_model), tokenizer, steps=1)
    requests = [*some_requests(2), EditRequest("{} is", "Peru", "x", request_id="edit-1")]
    list(editor.edit_all(requests, batch_size=1, progress=False))
    ids = [e.request.request_id for e in editor.ledger.live()]
    assert len(set(ids)) == 3 and "edit-1" in ids


# -- the model and the user's surroundings --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_disabled_and_close_give_the_original(tiny_model, tokenizer, family):
    model = small_model(tiny_model, family)
    untouched = copy.deepcopy(model)
    ids = ids_of(model, tokenizer)
    editor = make_editor(model, tokenizer)
    for n, request in enumerate(some_requests(3, seed=1)):
        editor.edit(
            [request, EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English")],
            target_values=random_values(2, seed=n, scale=10),
        )
    with torch.no_grad():
        original = untouched(ids).logits
        assert not torch.equal(model(ids).logits, original)
        with editor.disabled() as same:
            assert same is model
            assert torch.equal(model(ids).logits, original)
        assert not torch.equal(model(ids).logits, original)
        with pytest.raises(RuntimeError), editor.disabled():
            raise RuntimeError
        assert not torch.equal(model(ids).logits, original)
    weights = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    for name, parameter in untouched.named_parameters():
        assert torch.equal(weights[name], parameter)
    editor.close()
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in untouched.named_modules()}
    assert all(len(m._forward_hooks) + len(m._forward_pre_hooks) == 0 for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original)


def test_random_state_gradients_and_training_flags_are_the_users(tiny_model, tokenizer):
    model = small_model(tiny_model)
    model.train()
    model.transformer.h[0].eval()
    flags = [m.training for m in model.modules()]
    torch.manual_seed(123)
    torch.rand(7)
    state = torch.get_rng_state()
    python_state = random.getstate()
    editor = make_editor(model, tokenizer, steps=3)
    editor.edit(some_requests(3))
    list(editor.edit_all(some_requests(4)[3:], progress=False))
    editor.retract("edit-0")
    editor.rollback(1)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state
    assert all(p.grad is None for p in model.parameters())
    editor.close()
    assert [m.training for m in model.modules()] == flags


def test_dropout_does_not_reach_the_edit(tiny_model, tokenizer):
    deltas = []
    for training in (False, True):
        editor = make_editor(small_model(tiny_model).train(training), tokenizer, steps=3)
        editor.edit(some_requests(2))
        deltas.append({name: layer.delta for name, layer in editor.layers.items()})
    for name in deltas[0]:
        assert torch.equal(deltas[0][name], deltas[1][name])


def test_bfloat16(tiny_model, tokenizer):
    """The buffer is rounded once from a float32 sum, not once an edit."""
    editor = make_editor(small_model(tiny_model).to(torch.bfloat16), tokenizer, steps=3, scope="reference")
    assert all(layer.delta.dtype == torch.bfloat16 for layer in editor.layers.values())
    for n, request in enumerate(some_requests(8)):
        editor.edit([request], target_values=None if n == 0 else random_values(1, seed=n))
    for name, layer in editor.layers.items():
        master = editor.method.masters[name]
        assert master.dtype == torch.float32 and layer.delta.dtype == torch.bfloat16
        assert relative(master, expected_delta(editor, name)) < 1e-5
        assert torch.equal(layer.delta, master.to(torch.bfloat16))
        assert not torch.equal(master, layer.delta.float())
    assert_usable(editor, tokenizer)
    editor.retract([e.request.request_id for e in editor.ledger.live()])
    for layer in editor.layers.values():
        assert layer.delta.float().norm() < 1e-4
