"""A judge behind an endpoint: a stub server in this process says what a real one might."""

import json
import resource
import socket
import struct
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_cli import output, run
from test_evaluation import RECORDS, pair  # noqa: F401  (a fixture)

from comeba_ext import evaluate, testbed
from comeba_ext.errors import ComebaError, ConfigError
from comeba_ext.evaluation import Judge, Writing
from comeba_ext.evaluation.judge import Answer
from comeba_ext.evaluation.written import normalised

pytestmark = pytest.mark.usefixtures("one_block")

WARSAW = Answer("She was born in", ("Warsaw", "Warszawa"), "the Polish capital, where she")


@contextmanager
def served(handler):
    """Its address, while it answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def endpoint(say):
    """A server that answers every request with ``say(number, headers, body)``: text, or a status."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, dict(self.headers), body))
            said = say(len(seen), body)
            self.send_response(said if isinstance(said, int) else 200)
            self.end_headers()
            if not isinstance(said, int):
                self.wfile.write(said if isinstance(said, bytes) else json.dumps({"choices": [{"message": {"content": said}}]}).encode())

        def log_message(self, *args):
            pass

    with served(Handler) as url:
        yield url, seen


def by_capital(number, body):
    text = body["messages"][1]["content"]
    return "CORRECT" if "capital" in text.partition("Answer:")[2] else "INCORRECT."


def test_one_word_from_the_endpoint():
    with endpoint(by_capital) as (url, seen):
        judge = Judge(url, "small", key="secret")
        wrong = WARSAW._replace(written="Paris")
        assert judge.verdicts([WARSAW, wrong, WARSAW]) == {WARSAW: True, wrong: False}
        assert (judge.asked, judge.nothing, len(seen)) == (2, 0, 2)
        assert "secret" not in repr(judge)
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "small" and body["temperature"] == 0
    asked = {body["messages"][1]["content"] for _, _, body in seen}
    assert "Question or statement: She was born in\nCorrect answers: Warsaw; Warszawa\nAnswer: the Polish capital, where she" in asked


def test_an_equal_answer_needs_no_judge():
    equal = WARSAW._replace(written="warszawa.")
    assert Judge("http://127.0.0.1:9/v1", "m").verdicts([equal]) == {equal: True}  # nobody listens there
    nothing = Answer("She was born in", ("...", "Warsaw"), "")  # a right answer of no words, and none written
    assert Judge("http://127.0.0.1:9/v1", "m").known([nothing, nothing._replace(written="?!")]) == {}


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("correct", True),
        ("Incorrect", False),
        ("**CORRECT**", True),
        ('\n"Correct."', True),
        ("_INCORRECT_", False),
        ("CORRECT. CORRECT", True),
        ("CORRECT: it says Warsaw", True),
        ("INCORRECT. It does not say Warsaw", False),
        ("INCORRECT, partially", False),
        ("The answer is incorrect. INCORRECT", None),
        ("CORRECT or INCORRECT?", None),
        ("INCORRECT. CORRECT", None),
        ("Correct?", None),
        ("NOT CORRECT", None),
        ("Not incorrect", None),
        ("Partially correct", None),
        ("Correct, but only partially", None),
        ("CORRECT isn't the word", None),
        ("correct-ish", None),
        ("Correctly written", None),
        ("maybe", None),
        ("", None),
        (None, None),
        (["CORRECT"], None),
        ([{"type": "text", "text": "CORRECT"}], None),
        ({"a": 1}, None),
        (True, None),
        (5.0, None),
    ],
)
def test_what_counts_as_a_verdict(said, verdict):
    reply = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
    with endpoint(lambda number, body: reply) as (url, seen):
        judge = Judge(url, "m", tries=2)
        assert judge.verdicts([WARSAW]) == {WARSAW: verdict}
        assert len(seen) == (2 if verdict is None else 1) and judge.nothing == (verdict is None)


@pytest.mark.parametrize("trouble", [500, 429, b"not json", b"{}", "slow"])
def test_troubles_that_pass(trouble):
    def say(number, body):
        if number == 1 and trouble == "slow":
            time.sleep(0.6)
        return trouble if number == 1 and trouble != "slow" else "CORRECT"

    with endpoint(say) as (url, seen):
        assert Judge(url, "m", timeout=0.3).verdicts([WARSAW]) == {WARSAW: True}
        assert len(seen) == 2
    with endpoint(lambda number, body: time.sleep(0.5) or "CORRECT" if trouble == "slow" else trouble) as (url, _):
        judge = Judge(url, "m", timeout=0.2, tries=2)
        assert judge.verdicts([WARSAW]) == {WARSAW: None} and judge.nothing == 1  # a counted null, no zero


def test_troubles_that_do_not():
    with endpoint(lambda number, body: 401) as (url, _), pytest.raises(ComebaError, match="refuses: HTTP 401"):
        Judge(url, "m").verdicts([WARSAW])
    with pytest.raises(ComebaError, match="cannot be reached"):
        Judge("http://127.0.0.1:9/v1", "m").verdicts([WARSAW])
    with pytest.raises(ComebaError, match="http"):
        Judge("localhost", "m")


@contextmanager
def hanging_up(before):
    """A server that hangs up on its first ``before`` clients in turn without an answer, in the middle of one, and with a reset."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(self.path)
            said = json.dumps({"choices": [{"message": {"content": "CORRECT"}}]}).encode()
            if len(seen) > before or len(seen) % 3 == 2:
                self.send_response(200)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said[: None if len(seen) > before else 9])
            elif len(seen) % 3 == 0:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

        def log_message(self, *args):
            pass

        def finish(self):
            with suppress(OSError, ValueError):
                super().finish()

    with served(Handler) as url:
        yield url, seen


def test_a_connection_that_is_dropped(pair, tokenizer):  # noqa: F811
    """It is asked again, and at last the judge alone has failed."""
    with hanging_up(3) as (url, seen):
        assert Judge(url, "m", tries=4).verdicts([WARSAW]) == {WARSAW: True} and len(seen) == 4
    with hanging_up(99) as (url, seen):
        for tries in (1, 2, 3):
            with pytest.raises(ComebaError, match="drops the connection"):
                Judge(url, "m", tries=tries).verdicts([WARSAW])
        assert len(seen) == 6
        judge = Judge(url, "m", parallel=1)
        found = evaluate(pair("gpt2")[0], tokenizer, RECORDS, generate=False, writing=Writing(4), judge=judge)
    assert "drops the connection" in found["judge_error"] and found["reliability_written"] is not None


def test_a_torn_last_line_is_dropped(tmp_path):
    path, others = tmp_path / "verdicts.jsonl", [WARSAW._replace(written=f"answer {n}") for n in range(3)]
    with endpoint(lambda number, body: "INCORRECT") as (url, seen):
        Judge(url, "m", kept=path).verdicts(others[:2])
        whole = path.read_text()
        for cut in (1, 5, 60, 120):  # the last is cut off in what it was about
            path.write_text(whole[: whole.index("\n") + 1 + cut])
            count = len(seen)
            assert set(Judge(url, "m", kept=path).verdicts(others).values()) == {False} and len(seen) == count + 2
            assert [json.loads(line)["written"] for line in path.read_text().splitlines()] == [own.written for own in others]
        path.write_text(whole.removesuffix("\n"))  # whole, but for its end
        Judge(url, "m", kept=path).verdicts(others)
        assert len(path.read_text().splitlines()) == 3 and all(map(json.loads, path.read_text().splitlines()))
    path.write_text(text := whole + "somebody's notes")
    with pytest.raises(ComebaError, match="not a file of verdicts"):
        Judge("http://x", "m", kept=path)
    assert path.read_text() == text


def test_where_verdicts_cannot_be_kept_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in ("none/v.jsonl", "file/v.jsonl", "folder", "/proc/v.jsonl", "/proc/version"):
        with pytest.raises(ComebaError, match=r"folder|cannot be"):
            Judge("http://x", "m", kept=tmp_path / path)
    assert Judge("http://x", "m", kept=str(tmp_path / "v.jsonl")).kept == tmp_path / "v.jsonl"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]  # nothing is left there


def test_a_disk_that_fills_costs_no_answers(pair, tokenizer, tmp_path):  # noqa: F811
    """The file may grow by a verdict and a half: the system itself writes the half, and refuses the rest."""
    path, others = tmp_path / "verdicts.jsonl", [WARSAW._replace(written=f"answer {n}") for n in range(3)]
    with endpoint(lambda number, body: "INCORRECT") as (url, seen):
        Judge(url, "m", kept=path).verdicts(others[:1])
        line = path.read_text()
        judge, limits = Judge(url, "m", kept=path, parallel=1), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(line) * 5 // 2, limits[1]))
        try:
            with pytest.raises(ComebaError, match="cannot be kept there"):
                judge.verdicts(others)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert judge.known(others) == dict.fromkeys(others, False)  # what was said is not lost
        assert [json.loads(own)["written"] for own in path.read_text().splitlines()] == ["answer 0", "answer 1"]  # nothing torn
        assert Judge(url, "m", kept=path).verdicts(others) == dict.fromkeys(others, False) and len(seen) == 4
        folder = tmp_path / "folder"
        folder.mkdir()
        judge = Judge(url, "m", kept=folder / "v.jsonl")
        folder.rmdir()
        found = evaluate(pair("gpt2")[0], tokenizer, RECORDS, generate=False, writing=Writing(4), judge=judge)
    assert "cannot be kept there" in found["judge_error"] and found["reliability_written"] is not None


def test_verdicts_are_kept(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    others = [WARSAW._replace(written=f"answer {n}") for n in range(6)]
    with endpoint(lambda number, body: "INCORRECT" if number < 4 else 403) as (url, _):
        with pytest.raises(ComebaError, match="403"):
            Judge(url, "m", kept=path, parallel=1).verdicts(others)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["written"] for line in kept] == ["answer 0", "answer 1", "answer 2"]
    with endpoint(by_capital) as (url, seen):
        assert set(Judge(url, "m", kept=path).verdicts(others).values()) == {False} and len(seen) == 3
        assert Judge(url, "other", kept=path).verdicts(others[:1]) == {others[0]: False} and len(seen) == 4  # another judge's are not its
    path.write_text("nonsense\n")
    with pytest.raises(ComebaError, match="not a file of verdicts"):
        Judge("http://x", "m", kept=path)


def test_judged_scores_stand_beside_the_others(pair, tokenizer):  # noqa: F811
    edited, base = pair("gpt2")
    with pytest.raises(ConfigError, match="writing"):
        evaluate(edited, tokenizer, RECORDS, base, judge=Judge("http://x", "m"))
    plain = evaluate(edited, tokenizer, RECORDS, base, generate=False, writing=Writing(6))
    says = lambda number, body: "CORRECT" if len(body["messages"][1]["content"]) % 2 else "INCORRECT"  # noqa: E731
    with endpoint(says) as (url, seen):
        found = evaluate(edited, tokenizer, RECORDS, base, generate=False, writing=Writing(6), judge=Judge(url, "m"))
    assert {key: found[key] for key in plain if key != "per_record"} == {key: plain[key] for key in plain if key != "per_record"}
    packed = lambda text: "".join(text.split())  # noqa: E731  (a decoded prompt may differ in its spaces)
    bodies = {packed(body["messages"][1]["content"]): says(0, body) == "CORRECT" for _, _, body in seen}
    for row in found.per_record:
        for metric in ("reliability", "generality", "portability"):
            own = [answer for answer in row["answers"] if answer["metric"] == metric]
            for answer in own:
                shown = answer["written"] or "(nothing)"
                text = f"Question or statement: {answer['prompt']}\nCorrect answers: {answer['wanted']}\nAnswer: {shown}"
                assert answer["judged"] == (normalised(shown) == normalised(answer["wanted"]) or bodies[packed(text)])
            assert row[f"{metric}_judged"] == (sum(answer["judged"] for answer in own) / len(own) if own else None)
    local = [answer for row in found.per_record for answer in row["answers"] if answer["metric"] == "locality"]
    assert found["locality_judged"] is None and local and not any("judged" in answer for answer in local)
    # One that fails half-way costs nothing else.
    with endpoint(lambda number, body: "CORRECT" if number == 1 else 403) as (url, _):
        broken = evaluate(edited, tokenizer, RECORDS, base, generate=False, writing=Writing(6), judge=Judge(url, "m", parallel=1))
    assert "403" in broken["judge_error"] and broken["reliability_written"] == plain["reliability_written"]
    verdicts = [a["judged"] for row in broken.per_record for a in row["answers"] if a["metric"] != "locality"]
    equal = sum(normalised(a["written"]) == normalised(a["wanted"]) for row in broken.per_record for a in row["answers"] if "judged" in a)
    assert equal <= verdicts.count(True) <= equal + 2 and verdicts.count(False) == 0 and None in verdicts  # one, and its like


def test_from_the_command(tmp_path, monkeypatch):
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([fact.to_record() for fact in testbed.facts()[:2]]))
    monkeypatch.setenv("MY_KEY", "secret")
    with endpoint(lambda number, body: "CORRECT" if number % 2 else "maybe") as (url, seen):
        options = ("--judge", url, "--judge-model", "m", "--judge-key", "MY_KEY", "--verdicts", tmp_path / "v.jsonl")
        found = output("eval", "testbed", facts, *options)
        assert found["reliability_judged"] is not None and "secret" not in json.dumps(found)
        assert {headers["Authorization"] for _, headers, _ in seen} == {"Bearer secret"}
        shown = " ".join(run("eval", "testbed", facts, *options).stdout.split())
        assert "Judge: " in shown and "judged" in shown
    shown = " ".join(run("eval", "testbed", facts, "--judge", "http://127.0.0.1:9/v1", "--judge-model", "m").stdout.split())
    assert "! the judge at http://127.0.0.1:9/v1 cannot be reached" in shown and "written" in shown
    refused = run("eval", "testbed", facts, "--judge", url, "--json")
    assert refused.exit_code == 1 and "--judge-model" in json.loads(refused.stdout)["error"]
