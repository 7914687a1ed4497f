"""The server, asked over loopback by the client that its API is named after, against ``generate``; killed, stopped, and given nonsense."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from test_cli import run
from test_serving import FACTS, covariance, folder, written  # noqa: F401  (fixtures among them)

from comeba_ext import testbed
from comeba_ext.serving.service import EditingService

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
openai = pytest.importorskip("openai", reason="the OpenAI client is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

from comeba_ext.serving.answers import finite  # noqa: E402
from comeba_ext.serving.app import create_app  # noqa: E402
from comeba_ext.serving.listen import bound, url_of  # noqa: E402
from comeba_ext.serving.listen import run as listen  # noqa: E402
from comeba_ext.serving.requests import Limits  # noqa: E402

TOKEN = "a token that is hard to guess"
ASKED = [fact.text for fact in FACTS[:3]]
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_what_json_cannot_hold():
    assert finite({"a": [1.0, float("inf"), {"b": float("nan")}], "c": True}) == {"a": [1.0, None, {"b": None}], "c": True}


@contextmanager
def served(service, **options):
    """The base address of a server in a thread of this process."""
    app = create_app(service, "testbed", **options)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    with bound("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            until(lambda: server.started)
            yield url_of(listening)
        finally:
            server.should_exit = True
            thread.join()


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False, timeout=120))


@pytest.fixture(scope="module")
def service(folder):  # noqa: F811
    """Two edits, a chat template."""
    model, tokenizer = testbed.load()
    tokenizer.chat_template = CHAT
    return EditingService(model, tokenizer, edits=folder, editable=False)


@pytest.fixture(scope="module")
def url(service):
    with served(service, threads=3, limits=Limits(body=100_000, new_tokens=100, texts=8)) as url:
        yield url


@pytest.fixture(scope="module")
def says(service):
    """What ``generate`` alone writes with and without the edits."""
    with service.generating() as model:
        edited = [written(model, service.tokenizer, text, 8)[0] for text in ASKED]
    return edited, service.generate(ASKED, max_new_tokens=8, edited=False)


def test_the_client_gets_an_edited_fact(url, says):
    own, (edited, plain) = client(url), says
    assert [model.id for model in own.models.list()] == ["testbed", "testbed-unedited"]
    assert own.models.retrieve("testbed").id == "testbed"
    assert FACTS[0].target_new in edited[0] and edited[0] != plain[0]
    for name, texts in (("testbed", edited), ("testbed-unedited", plain)):
        found = own.completions.create(model=name, prompt=ASKED, max_tokens=8)
        assert [choice.text for choice in found.choices] == texts
        chat = own.chat.completions.create(model=name, messages=[{"role": "user", "content": ASKED[0]}], max_tokens=8)
        assert chat.choices[0].message.content == texts[0]
    ids = testbed.load()[1](ASKED)["input_ids"]
    assert own.completions.create(model="testbed", prompt=ids, max_tokens=8).usage.prompt_tokens == sum(map(len, ids))
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "model": "testbed", "step": 1, "edits": 2, "requests": 0}


@pytest.mark.parametrize(
    "more", [{"max_tokens": 30}, {"max_tokens": 30, "temperature": 1.2, "seed": 4, "top_p": 0.9, "stop": [" of"], "n": 2}]
)
def test_streams_say_the_same(url, more):
    own = client(url)
    text = {"model": "testbed", "prompt": ["The", ASKED[0]], "echo": True, **more}
    chat = {"model": "testbed", "messages": [{"role": "system", "content": "The"}, {"role": "user", "content": " city"}], **more}
    for create, asked, part in (
        (own.completions.create, text, lambda choice: choice.text),
        (own.chat.completions.create, chat, lambda choice: choice.delta.content or ""),
    ):
        whole = create(**asked)
        texts, reasons, usage = [""] * len(whole.choices), {}, None
        for chunk in create(**asked, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += part(choice)
                reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
        assert texts == [getattr(choice, "text", None) or choice.message.content for choice in whole.choices]
        assert reasons == {choice.index: choice.finish_reason for choice in whole.choices} and usage == whole.usage


def test_many_at_once_are_as_one_by_one(url):
    asked = [{"prompt": fact.text, "max_tokens": 4 + n, "seed": n, "temperature": n % 2} for n, fact in enumerate(testbed.facts()[:12])]
    ask = lambda one: client(url).completions.create(model="testbed", **one).choices[0].text  # noqa: E731
    alone = [ask(one) for one in asked]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(ask, asked)) == alone


def test_log_likelihoods_as_the_harness_reads_them(url, service):
    """lm-evaluation-harness: token ids, one token more, ``[ctxlen:-1]``, greedy where a token's is the largest."""
    context, target = (service.tokenizer(text)["input_ids"] for text in (ASKED[0], f" {FACTS[0].target_new}"))
    asked = {"prompt": [context + target], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choice = client(url).completions.create(model="testbed", **asked).choices[0]
    with service.generating() as model, torch.no_grad():
        logprobs = model(torch.tensor([context + target])).logits[0].log_softmax(-1)
    expected = [logprobs[len(context) - 1 + n, token].item() for n, token in enumerate(target)]
    given, top = choice.logprobs.token_logprobs[len(context) : -1], choice.logprobs.top_logprobs[len(context) : -1]
    assert given == pytest.approx(expected, abs=2e-4)
    assert [one == max(best.values()) for one, best in zip(given, top, strict=True)] == [
        token == logprobs[len(context) - 1 + n].argmax() for n, token in enumerate(target)
    ]
    assert "".join(choice.logprobs.tokens) == choice.text and ASKED[0] in choice.text
    assert len(choice.logprobs.tokens) == len(context + target) + 1 and choice.logprobs.text_offset[:2] == [
        0,
        len(choice.logprobs.tokens[0]),
    ]
    info, text = httpx.get(f"{url}/tokenizer_info").json(), {"prompt": ASKED[0], "add_special_tokens": False}
    assert info["eos_token"] == service.tokenizer.eos_token and info["chat_template"] == CHAT
    assert httpx.post(f"{url}/tokenize", json=text).json()["tokens"] == context
    assert ASKED[0] in httpx.post(f"{url}/detokenize", json={"tokens": context}).json()["prompt"]
    chat = client(url).chat.completions.create(
        model="testbed", messages=[{"role": "user", "content": ASKED[0]}], max_tokens=1, logprobs=True, top_logprobs=2
    )
    first = chat.choices[0].logprobs.content[0]
    assert [first.logprob, first.top_logprobs[1].logprob] == pytest.approx(logprobs[len(context) - 1].topk(2).values.tolist(), abs=2e-4)


TEXT = {"model": "testbed", "prompt": "The"}


@pytest.mark.parametrize(
    "path, body, status, words",
    [
        ("completions", {**TEXT, "model": "gpt-4"}, 404, "'gpt-4' is not here"),
        ("completions", {"prompt": "The"}, 400, "model"),
        ("completions", {**TEXT, "prompt": {"a": 1}}, 400, "prompt: should be"),
        ("completions", {**TEXT, "prompt": []}, 400, "no prompt"),
        ("completions", {**TEXT, "prompt": ""}, 400, "empty"),
        ("completions", {**TEXT, "prompt": [10**9]}, 400, "the model knows"),
        ("completions", {**TEXT, "prompt": [10**30], "echo": True}, 400, "the model knows"),
        ("completions", {**TEXT, "prompt": "a " * 500}, 400, "context is 128"),
        ("completions", {**TEXT, "max_tokens": 101}, 400, "at most 100"),
        ("completions", {**TEXT, "max_tokens": True}, 400, "max_tokens"),
        ("completions", {**TEXT, "n": 9}, 400, "at most 8"),
        ("completions", {**TEXT, "logprobs": 1000}, 400, "log probabilities"),
        ("completions", {**TEXT, "temperature": -1}, 400, "temperature"),
        ("completions", {**TEXT, "stop": ""}, 400, "stop"),
        ("completions", {**TEXT, "best_of": 5}, 400, "best_of is not supported"),
        ("completions", {**TEXT, "wings": 2}, 400, "unknown parameter wings"),
        ("completions", {**TEXT, "stream": True, "prompt": "a " * 500}, 400, "context is 128"),
        ("completions", {**TEXT, "prompt": "a" * 200_000}, 413, "too large"),
        ("completions", b"{", 400, "not JSON"),
        ("completions", b'{"model":"testbed","prompt":"\\ud800"}', 400, "half a character"),
        ("completions", b"[" * 50_000, 400, "JSON"),
        ("chat/completions", {"model": "testbed", "messages": []}, 400, "messages"),
        ("chat/completions", {"model": "testbed", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        ("chat/completions", {"model": "testbed", "messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400, "tools"),
        ("edits", {}, 403, "without an edit token"),
        ("wings", {}, 404, "no POST /v1/wings"),
    ],
)
def test_one_clear_refusal(url, path, body, status, words):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{url}/v1/{path}", content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status and words in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_the_client_raises_its_own_errors(url):
    with pytest.raises(openai.NotFoundError, match="not here"):
        client(url).completions.create(model="gpt-4", prompt="The")
    with pytest.raises(openai.BadRequestError, match="at most 100"):
        client(url).completions.create(**TEXT, max_tokens=1000)
    # Of no length that it says: it is counted as it comes.
    answer = httpx.post(f"{url}/v1/completions", content=(b"x" * 10_000 for _ in range(50)), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_who_goes_away_is_not_written_for(service):
    """The one thread is free again, and long before the text is complete; who finds the line full is told so."""
    started, steps = threading.Event(), []

    class Slow:
        def __getattr__(self, name):
            return getattr(service, name)

        def complete(self, prompts, sampling, stream=None, **options):
            def slowly(n, text):
                started.set()
                steps.append(text)
                time.sleep(0.05)
                stream(n, text)

            return service.complete(prompts, sampling, slowly, **options)

    with served(Slow(), waiting=0) as url:
        asked = {**TEXT, "max_tokens": 120, "temperature": 3, "seed": 1, "stream": True}
        with client(url).completions.create(**asked) as stream:
            next(iter(stream))
            assert started.wait(60)
            with pytest.raises(openai.RateLimitError, match="try again later"):
                client(url).completions.create(**TEXT)
        until(lambda: httpx.get(f"{url}/health").json()["requests"] == 0)
        assert 0 < len(steps) < 100


def test_who_goes_away_before_the_first_token_leaves_the_line(service):
    """The one who waited for the thread is not written for when it is free."""
    held, free, begun = threading.Event(), threading.Event(), []

    class Slow:
        def __getattr__(self, name):
            return getattr(service, name)

        def complete(self, prompts, sampling, stream=None, *, cancel, **options):
            begun.append(cancel)
            held.set()
            until(lambda: free.is_set() or cancel.is_set())
            return service.complete(prompts, sampling, stream, cancel=cancel, **options)

    with served(Slow()) as url:
        line = lambda: httpx.get(f"{url}/health").json()["requests"]  # noqa: E731
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(client(url).completions.create, **TEXT, max_tokens=2)
            assert held.wait(60)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json={**TEXT, "stream": True}, timeout=0.3)
            assert line() == 2
            time.sleep(1.5)  # as long as it takes to look
            free.set()
            assert first.result().choices
            until(lambda: line() == 0)
            assert len(begun) == 1
            # Nor is one who is at the thread, and has nothing yet.
            free.clear()
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json={**TEXT, "stream": True}, timeout=0.3)
            until(lambda: line() == 0)
            assert len(begun) == 2 and begun[1].is_set()


def test_edits_while_it_runs(covariance, tmp_path):  # noqa: F811
    with EditingService(*testbed.load(), edits=tmp_path / "edits", covariance=covariance, autosave=True) as own:
        with served(own, edit_token=TOKEN, limits=Limits(edits=3)) as url:
            ask = lambda: client(url).completions.create(model="testbed", prompt=ASKED[0], max_tokens=6).choices[0].text  # noqa: E731
            with httpx.Client(base_url=f"{url}/v1", timeout=120, trust_env=False) as web:
                plain = ask()
                record = {"prompt": FACTS[0].prompt, "subject": FACTS[0].subject, "target_new": FACTS[0].target_new}
                for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer"}):
                    for method, path in (("GET", "edits"), ("POST", "edits"), ("DELETE", "edits"), ("DELETE", "edits/edit-0")):
                        answer = web.request(method, path, headers=wrong, json=None if method == "GET" else record)
                        assert answer.status_code == 401 and "wrong" in answer.json()["error"]["message"]
                web.headers["Authorization"] = f"Bearer {TOKEN}"
                for bad in ([], [1], [record] * 4, {"prompt": "x"}, {**record, "subject": "somebody else", "prompt": "no place"}, 3):
                    assert web.post("edits", json=bad).status_code == 400
                assert web.get("edits").json()["data"] == [] and ask() == plain
                report = web.post("edits", json=record).json()
                assert report["answered"] == [True] and FACTS[0].target_new in ask()
                (listed,) = web.get("edits").json()["data"]
                assert listed == {"id": report["request_ids"][0], "step": 1, "superseded": None, **record}
                assert EditingService(*testbed.load(), edits=tmp_path / "edits", editable=False).live == 1
                assert web.request("DELETE", "edits", json={"ids": ["nobody"]}).status_code == 404
                assert web.delete(f"edits/{listed['id']}").status_code == 200 and ask() == plain
                assert web.delete(f"edits/{listed['id']}").status_code == 404
                assert [edit["superseded"] for edit in web.get("edits").json()["data"]] == [2]


def test_killed_during_an_edit(covariance, tmp_path):  # noqa: F811
    """The last complete state is there."""
    covariance.save(tmp_path / "covariance.safetensors")
    options = ("--port", "0", "--json", "--edits", tmp_path / "edits", "--covariance", tmp_path / "covariance.safetensors")
    record = {"prompt": FACTS[0].prompt, "subject": FACTS[0].subject, "target_new": FACTS[0].target_new}
    process = subprocess.Popen(
        [sys.executable, "-m", "comeba_ext.cli", "serve", "testbed", *map(str, options)],
        stdout=subprocess.PIPE, env={**os.environ, "COMEBA_EDIT_TOKEN": TOKEN},
    )  # fmt: skip
    try:
        said = json.loads(process.stdout.readline())
        assert said["local"] and said["editing"] and said["edits"] == 0 and said["models"] == ["testbed", "testbed-unedited"]
        with httpx.Client(trust_env=False, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120) as web:
            assert web.post(f"{said['url']}/edits", json=record).json()["answered"] == [True]
            more = [request.to_record() for request in testbed.facts()[1:1000]]
            with ThreadPoolExecutor(1) as threads:
                pending = threads.submit(web.post, f"{said['url']}/edits", json=more)
                time.sleep(1)
                written = client(said["url"][:-3]).completions.create(**{**TEXT, "prompt": ASKED[0]}).choices[0].text  # while it is edited
                assert FACTS[0].target_new in written and not pending.done()
                process.kill()
                assert isinstance(pending.exception(), httpx.TransportError)
    finally:
        process.kill()
        process.communicate()
    with EditingService(*testbed.load(), edits=tmp_path / "edits") as own:
        assert [edit.request.subject for edit in own.edits()] == [FACTS[0].subject]
        assert FACTS[0].target_new in own.generate(ASKED[:1], max_new_tokens=6)[0]
        own.add(FACTS[1:2])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_finishes_what_it_began(service, number):
    asked = {**TEXT, "max_tokens": 60, "temperature": 3, "seed": 1}
    (whole,) = service.generate(["The"], max_new_tokens=60, temperature=3, seed=1)
    handlers = [signal.getsignal(own) for own in (signal.SIGTERM, signal.SIGINT)]
    listening, ready = bound("127.0.0.1", 0), threading.Event()

    def ask():
        assert ready.wait(60)
        chunks = client(url_of(listening)).completions.create(**asked, stream=True)
        first = next(iter(chunks)).choices[0].text
        os.kill(os.getpid(), number)
        return first + "".join(chunk.choices[0].text for chunk in chunks)

    with listening, ThreadPoolExecutor(1) as threads:
        found = threads.submit(ask)
        listen(create_app(service, "testbed"), listening, ready.set)
        assert found.result(0.5) == whole
    assert [signal.getsignal(own) for own in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_the_documentation_runs(url, monkeypatch, capsys):
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    page = (Path(__file__).resolve().parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    client_block, service_block = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(client_block.replace("http://127.0.0.1:8000", url), {})
    assert len(capsys.readouterr().out.splitlines()) >= 2
    exec(service_block, {})
    edited, rest = capsys.readouterr().out.split("\n", 1)
    assert FACTS[0].target_new in edited and "'superseded': None" in rest


@pytest.mark.parametrize(
    "args, words",
    [
        (("--edits", "{tmp}/nowhere"), "no edits"),
        (("--method", "FT"), "add --edit-token"),
        (("--edit-token", " "), "--edit-token is empty"),
        (("--host", "203.0.113.7"), "no address of this machine"),
        (("--edit-token", "t", "--covariance", "{tmp}/nothing"), "does not exist"),
    ],
)
def test_one_clear_error(args, words, tmp_path):
    result = run("serve", "testbed", "--port", "0", "--json", *(part.format(tmp=tmp_path) for part in args))
    assert result.exit_code == 1 and words in json.loads(result.stdout)["error"]


def test_a_port_that_is_taken():
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        result = run("serve", "testbed", "--port", str(other.getsockname()[1]))
    assert result.exit_code == 1 and "is taken by another program" in result.stderr and len(result.stderr.splitlines()) == 1
