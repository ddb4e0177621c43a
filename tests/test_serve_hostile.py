"""Hostile requests: slow, huge, malformed, without a key, from another site; a fuzz of the server's own description."""

import http.client
import json
import socket
import threading
import time

import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as examples
from serving import in_thread, raw, write_model

from luthier.errors import ConfigError, LuthierError
from luthier.serve.guard import Rate
from luthier.serve.settings import Serving, keys_of

pytest.importorskip("fastapi", reason="no fastapi here (the serve extra has it)")
KEY = "a-key-of-sufficient-length"
LIMITS = {
    "header_timeout": 0.4, "body_timeout": 0.4, "write_timeout": 1.0, "max_body": 200_000, "slots": 4, "waiting": 6,
    "max_new_tokens": 1500, "timeout": 100.0, "connections": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture(scope="module")
def log():
    return []


@pytest.fixture(scope="module")
def server(folder, log):
    with in_thread(folder, log, **LIMITS) as made:
        yield made


@pytest.fixture(scope="module")
def url(server):
    return server[0]


@pytest.fixture(autouse=True)
def alive(request):
    """After whatever was done, it answers, nothing of it is still at hand, and nothing of ours has failed."""
    yield
    if "url" not in request.fixturenames:
        return
    url, server = request.getfixturevalue("url"), request.getfixturevalue("server")[1]
    status, body = ask(url, chat())
    assert (status, body["usage"]["completion_tokens"] if status == 200 else body) == (200, 2)
    engine = next(iter(server.served.engines.values()))
    for _ in range(500):
        if engine.stats()["running"] == engine.stats()["waiting"] == 0 and server.guard.at_hand == 0:
            break
        ask(url, None, "/health", method="GET")
    assert engine.stats()["running"] == engine.stats()["waiting"] == server.guard.at_hand == 0
    assert not request.getfixturevalue("log")


def chat(**more):
    return {"model": "model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0} | more


def ask(url, body, path="/v1/chat/completions", method="POST", **headers):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        given_headers = ({"content-type": "application/json"} if method == "POST" else {}) | named
        connection.request(method, path, data, {k: v for k, v in given_headers.items() if v})
        answer = connection.getresponse()
        text = answer.read()
        for name in ("x-content-type-options", "cache-control", "x-request-id"):
            assert answer.headers[name]
        assert b"Traceback" not in text
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text.decode()
    finally:
        connection.close()


def fails(url, status, body, path="/v1/chat/completions", method="POST", **headers):
    """It fails so, in OpenAI's form of an error."""
    found, told = ask(url, body, path, method, **headers)
    assert found == status, told
    assert set(told) == {"error"}
    assert set(told["error"]) == {"message", "type", "param", "code"}
    return told["error"]["message"]


# ---------------------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"{" * 5000, b"[" * 9000, b'{"model": "model"}', b'{"a": NaN}',
     b'{"model": "model", "messages": [{"role": "user", "content": "\\ud800"}]}',
     b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}',
     b'{"model": {"a": 1}, "messages": "x"}', b'{"model": "model", "messages": [1, null, []]}'],
)  # fmt: skip
def test_bodies_that_are_none(url, body):
    assert "\n" not in fails(url, 400, body)


@pytest.mark.parametrize("model", [
    "../model", "/etc/passwd", "model/", "MODEL", "model\u0000", "%2e%2e/model", "model\n", "é" * 200,
])  # fmt: skip
def test_a_models_name_is_only_ever_a_name(url, model):
    fails(url, 404, chat(model=model))
    fails(url, 404, {"model": model, "input": "x"}, "/v1/embeddings")


@pytest.mark.parametrize("path", [
    "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/", "/..", "/page", "/static/../x", "/%00", "//health",
])  # fmt: skip
def test_paths_lead_nowhere(url, path):
    assert ask(url, None, path, "GET")[0] == 404


def test_methods_and_kinds_of_bodies(url):
    fails(url, 405, None, method="DELETE")
    fails(url, 405, chat(), "/v1/models")
    fails(url, 415, chat(), content_type="text/plain")
    fails(url, 415, chat(), content_type="application/x-www-form-urlencoded")
    fails(url, 415, chat(), content_type="")
    assert ask(url, chat(), content_type="application/json; charset=utf-8")[0] == 200


def test_a_body_that_is_too_large_is_not_read(url):
    large = json.dumps(chat(messages=[{"role": "user", "content": "x" * 300_000}])).encode()
    fails(url, 413, large)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    told = raw(url, head + b"Content-Length: 999999999999\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 413")
    chunks = b"".join(b"4000\r\n" + b"x" * 16384 + b"\r\n" for _ in range(16))  # nothing says how much is to come
    assert raw(url, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks).startswith(b"HTTP/1.1 413")


def test_slow_headers_and_bodies(url):
    assert raw(url, b"GET /health HTTP/1.1\r\nHost: local").startswith(b"HTTP/1.1 408")
    assert raw(url, b"").startswith(b"HTTP/1.1 408")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert raw(url, head + b"Content-Length: 100\r\n\r\n{").startswith(b"HTTP/1.1 408")
    # the second request on a connection is watched, too
    first = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert b"HTTP/1.1 408" in raw(url, first + b"GET /hea")


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n",
                                  b"POST / HTTP/9.9\r\nConnection: close\r\n\r\n",
                                  b"A" * 100_000,
                                  b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n"])  # fmt: skip
def test_what_is_no_http(url, data):
    told = raw(url, data)
    assert told.startswith(b"HTTP/1.1 4")
    assert b"Traceback" not in told


# ---------------------------------------------------------------------------- who asks


def test_another_sites_name_or_page_gets_nothing(url):
    fails(url, 403, chat(), Host="evil.example:8000")
    fails(url, 403, None, "/v1/models", "GET", Host="127.0.0.1.evil.example")
    fails(url, 403, chat(), Origin="http://evil.example")
    fails(url, 403, chat(), Origin="null")
    fails(url, 403, chat(), Sec_Fetch_Site="cross-site")
    assert ask(url, chat(), Origin=url)[0] == 200
    assert ask(url, None, "/health", "GET", Host="localhost:9999")[0] == 200


def test_beyond_this_machine_a_key_is_required():
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigError, match="a key is required"):
            Serving(host=host).check()
        Serving(host=host, keys=(KEY,)).check()
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.9"):
        Serving(host=host).check()
    with pytest.raises(ConfigError, match="at least 16"):
        Serving(keys=("short",)).check()


def test_keys_come_from_files_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\nsecond-key-long-enough\n")
    assert keys_of(str(file)) == (KEY, "second-key-long-enough")
    monkeypatch.setenv("LUTHIER_API_KEY", KEY)
    assert keys_of(None) == (KEY,)
    file.write_text("\n")
    for bad in (str(file), str(tmp_path / "gone"), str(tmp_path)):
        with pytest.raises(ConfigError, match="--api-key-file"):
            keys_of(bad)


def test_keys_rates_and_a_stop(folder):
    log = []
    with in_thread(folder, log, keys=(KEY, "another-key-of-length"), rate=5.0) as (url, server):
        for given_key in (None, "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer ", "Bearer é"):
            told = fails(url, 401, chat(), authorization=given_key)
            assert KEY not in told
        fails(url, 401, None, "/v1/models", "GET")
        fails(url, 401, None, "/metrics", "GET")
        assert ask(url, None, "/health", "GET", Host="any.example")[0] == 200
        assert ask(url, None, "/", "GET")[0] == 200
        good = {"authorization": f"Bearer {KEY}"}
        for _ in range(5):
            assert ask(url, chat(), **good)[0] == 200
        assert "requests a minute" in fails(url, 429, chat(), **good)
        assert ask(url, None, "/v1/models", "GET", **good)[0] == 200
        assert ask(url, chat(), authorization="bearer another-key-of-length")[0] == 200
        server.guard.stopping = True
        assert "stopping" in fails(url, 503, chat(), **good)
        fails(url, 503, None, "/health", "GET")
    assert not log


def test_a_rate_is_a_bucket():
    now = [0.0]
    rate = Rate(60, lambda: now[0])
    assert [rate.take("a") for _ in range(61)] == [0] * 60 + [1]
    assert rate.take("b") == 0
    now[0] = 1.5
    assert [rate.take("a"), rate.take("a")] == [0, 1]


# ---------------------------------------------------------------------------- many, and those who go away


def test_those_who_go_away_free_their_slots(url, server):
    engine = next(iter(server[1].served.engines.values()))
    before = engine.stats()["ended_cancelled"]
    body = json.dumps(chat(max_tokens=1500)).encode()
    streamed = json.dumps(chat(max_tokens=1500, stream=True, n=3)).encode()
    for data in (body, streamed):
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        host, port = url.removeprefix("http://").rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(head.encode() + data)
            if data is streamed:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            else:
                while engine.stats()["running"] == 0:
                    ask(url, None, "/health", "GET")
    while server[1].guard.at_hand > 1 or engine.stats()["running"] or engine.stats()["waiting"]:
        ask(url, None, "/health", "GET")
    ended = engine.stats()
    assert ended["ended_cancelled"] - before == 4, ended


def test_who_does_not_read_an_answer_is_let_go(folder):
    """A client that takes nothing: the connection is ended after `write_timeout`, and the slot is free."""
    log = []
    with in_thread(folder, log, **LIMITS | {"write_timeout": 0.3, "waiting": 100}) as (url, server):
        asked = chat(max_tokens=1500, stream=True, n=16, logprobs=True, top_logprobs=20)
        data = json.dumps(asked).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        host, port = url.removeprefix("http://").rsplit(":", 1)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(head.encode() + data)
        engine = next(iter(server.served.engines.values()))
        until = time.monotonic() + 60
        while engine.stats()["submitted"] < 16:
            ask(url, None, "/health", "GET")
        while server.guard.at_hand > 0 and time.monotonic() < until:
            time.sleep(0.05)
        assert server.guard.at_hand == 0
        connection.close()


def test_more_than_may_wait_are_refused(url):
    seen = []

    def one():
        seen.append(ask(url, chat(max_tokens=300, temperature=1.0))[0])

    threads = [threading.Thread(target=one) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {200, 429}
    assert seen.count(200) >= 10
    fails(url, 429, chat(n=64))
    fails(url, 400, {"model": "model", "prompt": ["a"] * 200}, "/v1/completions")


def test_nothing_is_kept_of_what_is_over(url, server):
    """Of hundreds of requests, many of them wrong, no stream is left beyond what the cache may keep, nor is a guide."""
    import gc

    from luthier.serve.grammar import Guide
    from luthier.serve.requests import Stream

    def alive():
        gc.collect()
        found = gc.get_objects()
        return sum(type(one) is Stream for one in found), sum(type(one) is Guide for one in found)

    engine = next(iter(server[1].served.engines.values()))
    for number in range(200):
        ask(url, [chat(), chat(max_tokens=9, response_format={"type": "json_object"}), chat(n=99), b"{"][number % 4])
    streams, guides = alive()
    assert streams <= engine.limits.kept + engine.limits.slots
    assert guides <= engine.limits.kept + engine.limits.slots
    for number in range(200):
        ask(url, [chat(), chat(max_tokens=9, response_format={"type": "json_object"}), chat(n=99), b"{"][number % 4])
    after = alive()
    assert after[0] <= streams + 2
    assert after[1] <= guides + 2


def test_an_answer_that_takes_too_long(folder):
    with in_thread(folder, timeout=0.2, max_new_tokens=1500) as (url, _):
        assert "after 0.2 s" in fails(url, 408, chat(max_tokens=1500, logprobs=True))
        status, text = ask(url, chat(max_tokens=1500, stream=True))
        assert status == 200
        assert '"type": "timeout_error"' in text
        assert text.endswith("data: [DONE]\n\n")


def test_an_address_that_is_taken_is_told(url, folder):
    from luthier.serve.listening import listen
    from luthier.serve.served import Served

    with pytest.raises(LuthierError, match="--port"):
        listen(Served(Serving(port=int(url.rsplit(":", 1)[1]))))


def test_a_second_signal_ends_it_at_once(folder):
    with in_thread(folder, drain=600.0, max_new_tokens=1900) as (url, server):
        found = []

        def one():
            try:
                found.append(ask(url, chat(max_tokens=1900, stream=True)))
            except (OSError, http.client.HTTPException) as error:
                found.append(error)

        thread = threading.Thread(target=one)
        thread.start()
        engine = next(iter(server.served.engines.values()))
        while engine.stats()["running"] == 0:
            ask(url, None, "/health", "GET")
        server.stop()
        server.stop(now=True)
        server.served.stop(0)
        thread.join(30)
        assert found


# ---------------------------------------------------------------------------- the server's own description


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify",
                                  "/v1/score",
                                  "/v1/models", "/v1/models/{model}", "/health", "/metrics"])  # fmt: skip
def test_fuzz_from_its_own_description(url, path, mode):
    schemathesis = pytest.importorskip("schemathesis", reason="no schemathesis here (the test extra has it)")
    from schemathesis.generation import GenerationMode

    status, told = ask(url, None, "/openapi.json", "GET")
    assert status == 200
    method = next(iter(told["paths"][path]))
    operation = schemathesis.openapi.from_dict(told)[path][method.upper()]

    @examples(max_examples=20, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=GenerationMode[mode]))
    def fuzz(case):
        if isinstance(case.body, dict) and mode == "POSITIVE":
            case.body["model"] = "model"
            case.body.pop("n", None)
            case.body |= {"max_tokens": 3} if path in ("/v1/completions", "/v1/chat/completions") else {}
        case.call_and_validate(base_url=url, timeout=60, excluded_checks=[
            check for check in schemathesis.checks.CHECKS.get_all()
            if check.__name__ in ("positive_data_acceptance", "ignored_auth", "unsupported_method")
        ])  # fmt: skip

    try:
        fuzz()
    except Exception as error:
        if type(error).__name__ not in ("Unsatisfiable",):
            raise
