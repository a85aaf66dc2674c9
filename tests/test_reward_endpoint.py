"""A reward behind real HTTP: what is tried again, what is not, and where the token goes."""

from __future__ import annotations

import email.utils
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo import reward_endpoint
from rlhf_ppo.ppo.rewards import load_reward, score
from rlhf_ppo.settings import RewardSettings

Answer = tuple[int, dict[str, str], str]
IDS = [[5], [6, 7], [8]]
TEXTS = (["a", "b", "c"], ["one", "two 2", "three"])


class Server:
    """Answers as the test says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.answer: Callable[[int, dict[str, Any]], Answer] = lambda number, body: self.scores(body)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.headers.append(dict(self.headers))
                outer.times.append(time.monotonic())
                status, headers, text = outer.answer(len(outer.asked), body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def scores(body: dict[str, Any]) -> Answer:
        """The length of each response."""
        return 200, {}, json.dumps({"scores": [len(text) for text in body["responses"]]})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(reward_endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv("RLHF_PPO_REWARD_TOKEN", raising=False)
    found = Server()
    yield found
    found.server.shutdown()
    found.server.server_close()


def ask(server: Server, **settings: Any) -> list[Any]:
    return score(load_reward(server.url, RewardSettings(**settings)), *TEXTS, IDS)


def test_texts_go_in_batches_with_their_tokens_and_scores_come_back(server: Server) -> None:
    assert ask(server, reward_batch_size=2) == [3.0, 5.0, 5.0]
    assert server.asked == [
        {"prompts": ["a", "b"], "responses": ["one", "two 2"], "response_ids": [[5], [6, 7]]},
        {"prompts": ["c"], "responses": ["three"], "response_ids": [[8]]},
    ]


def test_an_endpoint_may_score_every_token(server: Server) -> None:
    server.answer = lambda number, body: (200, {}, json.dumps({"scores": body["response_ids"]}))
    assert ask(server) == [[5.0], [6.0, 7.0], [8.0]]


@pytest.mark.parametrize("status", reward_endpoint.TRANSIENT)
def test_what_may_pass_is_tried_again(server: Server, status: int) -> None:
    server.answer = lambda number, body: (status, {}, "later") if number < 3 else server.scores(body)
    assert ask(server) == [3.0, 5.0, 5.0]
    assert len(server.asked) == 3


@pytest.mark.parametrize("as_date", [False, True])
def test_the_servers_wish_for_a_pause_is_granted(server: Server, as_date: bool) -> None:
    def answer(number: int, body: dict[str, Any]) -> Answer:
        wish = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "1"
        return (429, {"Retry-After": wish}, "slow down") if number == 1 else server.scores(body)

    server.answer = answer
    assert ask(server) == [3.0, 5.0, 5.0]
    assert server.times[1] - server.times[0] > 0.9


def test_a_server_that_is_down_or_slow_is_given_up_at_the_deadline_with_its_last_words(server: Server) -> None:
    server.answer = lambda number, body: (503, {}, "no card is free")
    with pytest.raises(InputError, match="reward_deadline_seconds=0.3 and [0-9]+ tries; the last: HTTP 503: no card"):
        ask(server, reward_deadline_seconds=0.3)
    assert len(server.asked) > 1
    over = threading.Event()
    server.answer = lambda number, body: (over.wait(30), server.scores(body))[1]
    with pytest.raises(InputError, match="the last: ReadTimeout|the last: .*timed out"):
        ask(server, reward_deadline_seconds=0.3)
    over.set()
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(InputError, match="the last: ConnectionError"):
        ask(server, reward_deadline_seconds=0.3)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, {}, "who are you"), "HTTP 401: who are you"),
        ((400, {}, "no such field"), "HTTP 400: no such field"),
        ((200, {}, "<html>welcome</html>"), "<html>welcome"),
        ((200, {}, json.dumps({"scores": [1.0]})), "1 scores.* to 3 responses"),
        ((200, {}, json.dumps([1.0, 2.0, 3.0])), "one entry each is needed"),
        ((200, {}, json.dumps({"scores": ["high", 1, 2]})), "must return one number for each response"),
        ((200, {}, '{"scores": [NaN, 1, 2]}'), "nan for response 0"),
        ((200, {}, '{"scores": [[1, 2], 1, 2]}'), "2 numbers for 1 tokens"),
    ],
)
def test_what_no_further_try_will_mend_is_an_error_at_once(server: Server, answer: Answer, words: str) -> None:
    server.answer = lambda number, body: answer
    with pytest.raises(InputError, match=words):
        ask(server)
    assert len(server.asked) == 1


def test_the_token_goes_to_the_server_and_nowhere_else(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_PPO_REWARD_TOKEN", "secret-7\n")
    ask(server)
    assert server.headers[0]["Authorization"] == "Bearer secret-7"
    other = Server()
    server.answer = lambda number, body: (307, {"Location": other.url}, "")
    with pytest.raises(InputError, match="redirects to") as error:
        ask(server)
    assert other.asked == [] and "secret-7" not in str(error.value)
    with pytest.raises(InputError, match="in clear text: give an https address"):
        load_reward("http://reward.example.com/score", RewardSettings())
    for inside in ("http://reward:8080", "http://reward.mine.svc/x", "http://reward.mine.svc.cluster.local/x"):
        load_reward(inside, RewardSettings())
    monkeypatch.setenv("RLHF_PPO_REWARD_TOKEN", "two\nlines")
    with pytest.raises(InputError, match="characters that no token has"):
        load_reward("https://reward.example.com/score", RewardSettings())


def test_an_answer_without_end_is_not_read_to_the_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_endpoint, "LARGEST_ANSWER", 1000)
    server.answer = lambda number, body: (200, {}, "x" * 2000)
    with pytest.raises(InputError, match="more than 1000 bytes"):
        ask(server)
