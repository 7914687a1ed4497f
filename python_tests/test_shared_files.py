"""Every file of published records at hand, through ``comeba edit`` and ``comeba eval``: read is used and skipped, and all is asked."""

import json

import pytest
import torch
from test_cli import output, run
from transformers import GPT2Config, GPT2LMHeadModel

from comeba_ext import testbed

LIMIT = 5


# -- how many edits a record asks for, and prompts of each metric, straight from the files' own fields ---------------


def counterfact(row):
    return 1, len(row["paraphrase_prompts"]), len(row["neighborhood_prompts"]), 0


def mquake(row):
    return len(row["requested_rewrite"]), sum("question" in own for own in row["requested_rewrite"]), 0, 0


def qaedit(row):
    return 1, 1, len(row["locality"]), 0


def unke(row):
    return 1, 1, 0, len(row["sub_question"])


FILES = {
    "counterfact/counterfact-edit.json": lambda row: (1, 1, 1, 0),
    "counterfact/counterfact-train.json": lambda row: (1, 1, 1, 0),
    "counterfact/counterfact_500.json": counterfact,
    "counterfact/counterfact_qna.json": lambda row: (1, 0, 0, 0),
    "mquake/akew_mquake_cf_200.json": mquake,
    "mquake/mquake_hard_215.json": mquake,
    "qaedit/qaedit_500.json": qaedit,
    "unke/unke_500.json": unke,
    "zsre/zsre_mend_eval_portability_gpt4.json": lambda row: (1, 1, 1, 1),
}


@pytest.fixture(scope="module")
def model_of(tokenizer, tmp_path_factory):
    """Factory: the folder of a tiny random model with so long a context, whose tokens are bytes, mostly."""
    made = {}

    def make(context: int):
        if context not in made:
            ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
            sizes = {"vocab_size": len(tokenizer), "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": context}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = GPT2LMHeadModel(GPT2Config(**sizes, **ids, initializer_range=0.3))
            made[context] = tmp_path_factory.mktemp("model")
            model.save_pretrained(made[context])
            tokenizer.save_pretrained(made[context])
        return made[context]

    return make


@pytest.fixture
def edit_and_eval(tmp_path):
    """Function of a model's folder and a file of records: what both commands print as JSON."""

    def both(model, path):
        (tmp_path / "once.yaml").write_text("layers: [0]\nsteps: 1\n")
        options = ("--limit", LIMIT, "--device", "cpu")
        done = run("edit", model, path, "--out", tmp_path / "out", "--method", "FT", "--config", tmp_path / "once.yaml", *options, "--json")
        edited = json.loads(done.stdout)
        assert "error" not in edited
        assert done.exit_code == (0 if edited["answered"] else 1)  # which one step of a tiny model is free not to manage
        return edited, output("eval", model, path, "--edits", tmp_path / "out", "--no-generate", "--answer-tokens", 2, *options)

    return both


def rows_of(shared_data, name: str) -> list[dict]:
    path = shared_data / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    return json.loads(path.read_text(encoding="utf-8"))[:LIMIT]


def test_no_file_is_forgotten(shared_data):
    folders = {name.partition("/")[0] for name in FILES}
    assert {path.relative_to(shared_data).as_posix() for folder in folders for path in (shared_data / folder).glob("*.json")} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_record_goes_through_the_commands(shared_data, model_of, edit_and_eval, name):
    rows = rows_of(shared_data, name)
    edited, found = edit_and_eval(model_of(2048), shared_data / name)
    for counts in (edited["records"], found["records"]):
        assert counts["read"] == counts["used"] + len(counts["skipped"]) == len(rows) == LIMIT
        assert counts["skipped"] == []
    edits, *others = (sum(own) for own in zip(*map(FILES[name], rows)))
    assert edited["edits"] + edited["repeated"] == edits and len(edited["steps"]) >= 1
    asked = [found[f"{metric}_prompts"] for metric in ("reliability", "generality", "locality", "portability")]
    assert asked == [edits, *others]
    for metric, count in zip(("reliability", "generality", "locality", "portability"), asked, strict=True):
        assert (found[metric] is None) == (count == 0)
    assert (found["locality_written"] is None) == (found["locality_prompts"] == 0)
    if "mquake" in name:  # one question by hops, one of their single hops
        expected = {"edit-wise": edits, "instance-wise": LIMIT, "multi-hop": LIMIT}
        assert {criterion: own["questions"] for criterion, own in found["questions"].items()} == expected
    else:
        assert "questions" not in found


def test_paragraphs_that_are_too_long_are_skipped_and_counted(shared_data, tokenizer, model_of, edit_and_eval):
    name, context = "unke/unke_500.json", 800
    lengths = [
        [len(tokenizer.encode(f"{row[asked].strip()} {row['answer'].strip()}")) for asked in ("question", "para_question")]
        for row in rows_of(shared_data, name)
    ]
    long = [n for n, own in enumerate(lengths) if max(own) > context]
    assert 0 < len(long) < LIMIT
    assert all(abs(length - context) > 25 for own in lengths for length in own)  # editing and asking may differ by a few tokens
    edited, found = edit_and_eval(model_of(context), shared_data / name)
    for counts in (edited["records"], found["records"]):
        assert (counts["read"], counts["used"]) == (LIMIT, LIMIT - len(long))
        assert [skip["index"] for skip in counts["skipped"]] == long
        assert all("context" in skip["reason"] and str(context) in skip["reason"] for skip in counts["skipped"])
    assert edited["edits"] == found["reliability_prompts"] == LIMIT - len(long)


def test_a_case_with_an_edit_that_is_too_long_is_skipped_whole(tmp_path):
    fact, other = testbed.facts()[:2]
    own = {"prompt": fact.prompt, "subject": fact.subject, "target_new": {"str": fact.target_new}}
    case = {"case_id": 1, "requested_rewrite": [own, own | {"prompt": "{} " + "very " * 200}], "questions": [fact.text], "new_answer": "x"}
    (tmp_path / "cases.json").write_text(json.dumps([case, other.to_record()]))
    found = output("eval", "testbed", tmp_path / "cases.json", "--no-generate", "--answer-tokens", 0)
    assert [skip["index"] for skip in found["records"]["skipped"]] == [0]
    assert found["records"]["read"] == found["records"]["used"] + len(found["records"]["skipped"]) == 2
    assert found["reliability_prompts"] == 1
