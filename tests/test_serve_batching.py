"""Requests at the same time: batches, places, clients that leave, faults, the end of the server."""

from __future__ import annotations

import asyncio
import json
import queue
from pathlib import Path
from typing import Any

import pytest
import tiny_service
from tiny_server import SECONDS, Client, Held, body, held, running

import medmoe_jax
from medmoe_jax.model import Model, Request
from medmoe_jax.sampling import Sampling
from medmoe_jax.serve import app as serving
from medmoe_jax.serve.batching import Batcher, Failed, Job, Stopping


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder: Path = tmp_path_factory.mktemp("batching") / "model"
    return medmoe_jax.load(tiny_service.save(folder, tiny_service.config("phi")))


# --- the thread that answers ---


def jobs(model: Model, *rows: tuple[str, Sampling, int]) -> tuple[list[Job], list[queue.Queue]]:
    """Jobs of (question, settings, number of options), and where each tells."""
    told: list[queue.Queue] = [queue.Queue() for _ in rows]
    made = []
    for (question, how, many), heard in zip(rows, told, strict=True):
        request = Request(question, model.pixels(None), tuple(map(str, range(many))))
        made.append(Job(request, how, False, lambda *what, heard=heard: heard.put(what)))
    return made, told


def test_what_waits_together_is_answered_together(model: Model) -> None:
    """The oldest first, with those of the same settings, as many as there are rows."""
    stand_in, long = held(model, 9), Sampling(max_new_tokens=9)
    rows = [(f"{n}", Sampling(), 0) for n in range(5)]
    made, told = jobs(stand_in, *rows[:2], ("long", long, 0), *rows[2:], ("longer", long, 0))
    batcher = Batcher(stand_in, 4)
    for job in made:
        batcher.submit(job)
    assert batcher.counts() == {"running": 0, "waiting": 7} and not batcher.works
    batcher.start()
    replies = [heard.get(timeout=SECONDS) for heard in told]
    batcher.stop()
    assert [r.text for r, last in replies if last] == [
        f"answer to {job.request.question}" for job in made
    ]
    assert stand_in.batches == [
        (["0", "1", "2", "3"], 4),
        (["long", "longer"], 4),
        (["4"], 1),
    ]


@pytest.mark.parametrize(("options", "rows"), [(1, 8), (2, 4), (3, 2), (4, 2), (8, 1), (9, 1)])
def test_each_option_takes_the_place_of_a_row(model: Model, options: int, rows: int) -> None:
    stand_in = held(model, 9)
    made, told = jobs(stand_in, *[(f"{n}", Sampling(), options) for n in range(9)])
    batcher = Batcher(stand_in, 8)
    for job in made:
        batcher.submit(job)
    batcher.start()
    for heard in told:
        assert len(heard.get(timeout=SECONDS)[0].options) == options
    batcher.stop()
    assert [size for _, size in stand_in.batches[:2]] == [rows, min(rows, 8) if rows < 8 else 1]


def test_a_broken_request_hurts_nobody_else(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """The others are asked again, alone; the log does not repeat what was asked."""
    stand_in = held(model, 9)
    made, told = jobs(stand_in, *[(text, Sampling(), 0) for text in ("a", "broken Miller", "b")])
    batcher = Batcher(stand_in, 4)
    for job in made:
        batcher.submit(job)
    batcher.start()
    replies = [heard.get(timeout=SECONDS)[0] for heard in told]
    batcher.stop()
    assert replies[0].text == "answer to a" and replies[2].text == "answer to b"
    assert isinstance(replies[1], Failed) and all(heard.empty() for heard in told)
    assert "a batch of 3 failed, ValueError" in caplog.text and "growing" in caplog.text
    assert "Miller" not in caplog.text


def test_after_the_end_nothing_is_taken(model: Model) -> None:
    """What waited is answered first."""
    stand_in = held(model, 9)
    made, told = jobs(stand_in, ("a", Sampling(), 0), ("b", Sampling(), 1), ("c", Sampling(), 0))
    batcher = Batcher(stand_in, 1)
    batcher.submit(made[0])
    batcher.submit(made[1])
    batcher.start()
    batcher.stop()
    assert [heard.get_nowait()[0].text for heard in told[:2]] == ["answer to a", "answer to b"]
    with pytest.raises(Stopping, match="the server is stopping"):
        batcher.submit(made[2])


# --- over HTTP ---


def gathered(stand_in: Held, scenario: Any, **settings: Any) -> Any:
    """What a scenario with a client returns."""

    async def run() -> Any:
        async with running(stand_in, **settings) as client:
            return await scenario(client)

    return asyncio.run(run())


def test_clients_at_the_same_time_share_batches(model: Model) -> None:
    stand_in = held(model)

    async def scenario(client: Client) -> list[str]:
        asked = [asyncio.create_task(client.ask(body("0")))]
        await client.until(running=1, waiting=0, busy=True)
        asked += [asyncio.create_task(client.ask(body(f"{n}"))) for n in range(1, 6)]
        await client.until(waiting=5)
        stand_in.permits.release(3)
        return [answer.text for answer in await asyncio.gather(*asked)]

    assert gathered(stand_in, scenario, rows=4) == [f"answer to {n}" for n in range(6)]
    assert [len(questions) for questions, _ in stand_in.batches] == [1, 4, 1]


def test_streams_share_batches_too(model: Model) -> None:
    stand_in = held(model)

    async def scenario(client: Client) -> list[list[str]]:
        asked = [asyncio.create_task(client.ask(body("first")))]
        await client.until(running=1, waiting=0)
        streamed = [body("Größe 🫁?", stream=True), body("Und?", stream=True), body("no stream")]
        asked += [asyncio.create_task(client.ask(sent)) for sent in streamed]
        await client.until(waiting=3)
        stand_in.permits.release(9)
        _, *streams, whole = await asyncio.gather(*asked)
        assert whole.text == "answer to no stream"
        return [stream.events for stream in streams]

    for events, text in zip(
        gathered(stand_in, scenario), ("answer to Größe 🫁?", "answer to Und?"), strict=True
    ):
        assert events[-1] == "[DONE]"
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
        assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
        assert "".join(delta["content"] for delta in deltas[:-1]) == text and len(deltas) > 3
    assert sorted(questions for questions, _ in stand_in.batches[1:]) == [
        ["Größe 🫁?", "Und?"],
        ["no stream"],
    ]


def test_a_full_server_says_so(model: Model) -> None:
    stand_in = held(model)

    async def scenario(client: Client) -> None:
        asked = [asyncio.create_task(client.ask(body(f"{n}"))) for n in range(3)]
        await client.until(running=1, waiting=2)
        full = await client.ask(body("one more"))
        assert full.status == 429 and full.headers["retry-after"] == "1"
        assert (
            full.error["code"] == "queue_full" and "all places are taken" in full.error["message"]
        )
        stand_in.permits.release(3)
        assert [answer.status for answer in await asyncio.gather(*asked)] == [200] * 3
        stand_in.permits.release()
        assert (await client.ask(body("now"))).status == 200

    gathered(stand_in, scenario, rows=1, waiting=2)


def test_who_leaves_gives_the_place_back(model: Model) -> None:
    """One that waits is never asked; a stream ends the batch that nobody listens to any more."""
    stand_in = held(model)

    async def scenario(client: Client) -> None:
        first = asyncio.create_task(client.ask(body("first")))
        await client.until(running=1, waiting=0)
        leave = asyncio.Event()
        second = asyncio.create_task(client.ask(body("second"), leave=leave))
        await client.until(waiting=1)
        leave.set()
        assert (await second).status == 499
        await client.until(running=1, waiting=0)
        stand_in.permits.release()
        assert (await first).text == "answer to first"

        leave = asyncio.Event()
        stand_in.permits.release()
        stream = asyncio.create_task(
            client.ask(
                body("a long one", stream=True),
                leave=leave,
                listen=lambda piece: leave.set() if b"answer" in piece else None,
            )
        )
        await stream
        stand_in.permits.release()  # the look after which nobody is there
        await client.until(running=0)
        assert stand_in.permits.acquire(blocking=False) is False

    gathered(stand_in, scenario)
    assert [questions for questions, _ in stand_in.batches] == [["first"], ["a long one"]]


def test_a_stream_that_fails_ends_with_the_error(model: Model) -> None:
    class Breaking(Held):
        def growing(self, *given: Any, **named: Any) -> Any:
            yield next(super().growing(*given, **named))
            raise MemoryError

    stand_in = held(model, 9)
    stand_in.__class__ = Breaking

    async def scenario(client: Client) -> None:
        stream = await client.ask(body("What?", stream=True))
        assert stream.status == 200 and "[DONE]" not in stream.events
        assert '"type": "server_error"' in stream.events[-1]

    gathered(stand_in, scenario)


def test_what_fails_is_told_with_its_status(model: Model, caplog: Any) -> None:
    async def scenario(client: Client) -> None:
        for stream in (False, True):
            answer = await client.ask(body("broken Miller", stream=stream))
            assert answer.status == 500 and answer.error["type"] == "server_error"
            assert "the log of the server says where" in answer.error["message"]

    gathered(held(model, 2), scenario)
    assert "ValueError" in caplog.text and "Miller" not in caplog.text


def test_the_end_waits_for_what_runs_and_refuses_what_comes(model: Model) -> None:
    stand_in = held(model)
    app = serving.build(stand_in, serving.Settings("tiny"))

    async def scenario() -> None:
        client, lifespan = Client(app), app.router.lifespan_context(app)
        await lifespan.__aenter__()
        first = asyncio.create_task(client.ask(body("first")))
        await client.until(running=1)
        ending = asyncio.create_task(lifespan.__aexit__(None, None, None))
        await client.until(status="stopping")
        assert (await client.ask(path="/health")).status == 503
        refused = await client.ask(body("too late"))
        assert refused.status == 503 and "is stopping" in refused.error["message"]
        assert refused.headers["retry-after"] == "1" and not first.done()
        stand_in.permits.release()
        assert (await first).text == "answer to first"
        await ending

    asyncio.run(scenario())
    assert [questions for questions, _ in stand_in.batches] == [["first"]]
