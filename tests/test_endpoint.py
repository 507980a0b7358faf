"""The endpoint without Ray: what is asked, what is answered, what is refused, and how batches are made."""

import asyncio
import base64
import dataclasses
import gc
import json
import random
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from models import score_in_process, small_bundle, small_config
from processes import wait_for
from pydantic import SecretStr

from mmray.bundle import save_bundle
from mmray.options import ScoreConfig
from mmray.serve.api import build_api
from mmray.serve.batcher import Batcher
from mmray.serve.schema import Item
from mmray.serve.scorer import ItemScorer
from mmray.serve.settings import ServeConfig

SETTINGS = ServeConfig(max_items=8, max_body_bytes=200_000, body_timeout_s=0.3)


@pytest.fixture(scope="module")
def scorer(bundle: str) -> ItemScorer:
    return ItemScorer(bundle, SETTINGS)


def ask(
    scorer: ItemScorer, conversation: Callable[[httpx.AsyncClient], Awaitable[Any]], settings: ServeConfig = SETTINGS
) -> Any:
    """Talks to the app as a server would hand it requests, one event loop for each conversation."""

    async def talk() -> Any:
        transport = httpx.ASGITransport(app=build_api(lambda: scorer, settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
            return await conversation(client)

    return asyncio.run(talk())


def post(scorer: ItemScorer, settings: ServeConfig = SETTINGS, **request: Any) -> httpx.Response:
    response: httpx.Response = ask(scorer, lambda client: client.post("/v1/score", **request), settings)
    return response


def encoded(path: Path) -> dict[str, str]:
    return {"base64": base64.b64encode(path.read_bytes()).decode()}


def test_a_request_gets_what_the_same_row_gets_in_a_scored_table(
    rows: Path, bundle: str, scorer: ItemScorer, tmp_path: Path
) -> None:
    score_in_process(bundle, str(rows), str(tmp_path / "out"), ScoreConfig(probabilities=True))
    table = pq.read_table(tmp_path / "out" / "data").slice(0, 8).to_pylist()
    items = [{"text": row["text"], "image": encoded(rows / row["image_path"])} for row in table]
    answer = post(scorer, json={"items": items}).json()
    for row, result in zip(table, answer["results"], strict=True):
        assert result["score"] == pytest.approx(row["score"], abs=1e-5)
        assert list(result["probabilities"].values()) == pytest.approx(row["probabilities"], abs=1e-5)
        assert result["image_weight"] == pytest.approx(row["image_weight"], abs=1e-5)
        same = ("predicted_label", "modalities_used", "status", "reason", "reason_detail")
        assert [result[name] for name in same] == [row[name] for name in same]
    assert answer["fingerprint"] == scorer.bundle.fingerprint
    assert answer["milliseconds"] > 0


def test_an_item_without_a_modality_is_scored_and_one_without_any_says_why(rows: Path, scorer: ItemScorer) -> None:
    image = encoded(rows / "images" / "0.jpg")
    items = [{"text": "the red square"}, {"image": image}, {}, {"text": "red", "image": {"base64": "%%%"}}]
    results = post(scorer, json={"items": items}).json()["results"]
    assert [result["modalities_used"] for result in results] == ["text", "image", "", "text"]
    assert [result["status"] for result in results] == ["degraded", "degraded", "failed", "degraded"]
    assert [result["reason"] for result in results] == ["IMAGE_NULL", "TEXT_NULL", "IMAGE_NULL", "BAD_FORMAT"]
    assert results[2]["score"] is None


def test_a_form_with_a_file_is_the_same_request(rows: Path, scorer: ItemScorer) -> None:
    path = rows / "images" / "1.jpg"
    form = post(scorer, data={"text": "a green one"}, files={"image": path.read_bytes()})
    asked = post(scorer, json={"text": "a green one", "image": encoded(path)})
    assert form.json()["results"] == asked.json()["results"]
    assert post(scorer, files={"image": path.read_bytes()}).json()["results"][0]["modalities_used"] == "image"
    assert post(scorer, files={"picture": path.read_bytes()}).status_code == 422


def test_paths_and_urls_of_the_server_are_closed_unless_a_folder_is_opened(
    rows: Path, bundle: str, scorer: ItemScorer
) -> None:
    names = ["images/0.jpg", str(rows / "images" / "0.jpg"), "/etc/passwd", "../secret"]
    wheres = [{"path": name} for name in names] + [{"url": "http://127.0.0.1/a.jpg"}, {"url": "file:///etc/passwd"}]
    items = [{"image": where} for where in wheres]
    assert {r["reason"] for r in post(scorer, json={"items": items}).json()["results"]} == {"NOT_ALLOWED"}
    opened = ItemScorer(bundle, SETTINGS.model_copy(update={"image_roots": (str(rows),)}))
    reasons = [r["reason"] for r in post(opened, json={"items": items}).json()["results"]]
    assert reasons == ["TEXT_NULL", "TEXT_NULL", *["NOT_ALLOWED"] * 4]


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"json": {"txt": "x"}}, 422, "txt: Extra inputs are not permitted"),
        ({"json": {"text": 5}}, 422, "text: Input should be a valid string"),
        ({"json": {"items": []}}, 422, "items is empty"),
        ({"json": {"items": [{}], "text": "x"}}, 422, "not both"),
        ({"json": {"image": {"base64": "", "path": "x"}}}, 422, "exactly one of"),
        ({"json": {"image": {}}}, 422, "exactly one of"),
        ({"json": {"items": [{}] * 9}}, 413, "a request may have 8 items, got 9"),
        ({"json": [1]}, 422, "should be an object"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "the body is not JSON"),
        ({"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 400, "the body is not JSON"),
        ({"content": b'{"text": "\\ud800"}', "headers": {"content-type": "application/json"}}, 400, "not JSON"),
        ({"content": b"text"}, 415, "send application/json"),
        ({"content": b"x" * 200_001}, 413, "200,000 bytes"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_with_a_code_and_a_sentence(
    scorer: ItemScorer, request_: dict[str, Any], status: int, words: str
) -> None:
    response = post(scorer, **request_)
    assert response.status_code == status
    assert set(response.json()) == {"code", "message", "request_id"}
    assert words in response.json()["message"]


def test_a_body_without_a_length_is_cut_off_and_one_that_drips_times_out(scorer: ItemScorer) -> None:
    async def endless() -> Any:
        while True:
            yield b"x" * 50_000

    async def dripping() -> Any:
        yield b"{"
        await asyncio.sleep(60)

    assert post(scorer, content=endless()).status_code == 413
    assert post(scorer, content=dripping()).status_code == 408


def test_only_who_has_the_token_is_answered(scorer: ItemScorer) -> None:
    settings = SETTINGS.model_copy(update={"token": SecretStr("hush")})

    async def conversation(client: httpx.AsyncClient) -> list[int]:
        headers = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer hush"}]
        codes = [(await client.get("/v1/model", headers=h)).status_code for h in headers]
        return [*codes, (await client.get("/healthz")).status_code]

    assert ask(scorer, conversation, settings) == [401, 401, 200, 200]
    assert "hush" not in repr(settings)


def test_the_endpoint_describes_itself(scorer: ItemScorer) -> None:
    async def conversation(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        return [(await client.get(path)).json() for path in ("/v1/model", "/readyz", "/openapi.json")]

    model, ready, schema = ask(scorer, conversation)
    assert model["labels"] == ["blue", "green", "red"]
    assert model["task"] == "multiclass"
    assert ready == {"status": "ready", "fingerprint": scorer.bundle.fingerprint}
    asked = schema["paths"]["/v1/score"]["post"]["requestBody"]["content"]
    assert set(asked) == {"application/json", "multipart/form-data"}
    assert "examples" in json.dumps(asked)


def test_a_request_keeps_the_id_it_came_with_if_it_is_a_harmless_one(scorer: ItemScorer) -> None:
    given = post(scorer, json={"text": "red"}, headers={"X-Request-ID": "order-66"}).json()["request_id"]
    made = post(scorer, json={"text": "red"}, headers={"X-Request-ID": "a b<script>"}).json()["request_id"]
    assert given == "order-66"
    assert made.isalnum()


def test_a_model_of_texts_says_that_it_does_not_read_images(tmp_path: Path) -> None:
    config = small_config(table={"train": "rows", "image_column": ""})
    save_bundle(small_bundle(config), str(tmp_path / "texts"))
    result = post(ItemScorer(str(tmp_path / "texts"), SETTINGS), json={"text": "red", "image": {"base64": ""}}).json()
    assert result["results"][0]["status"] == "ok"
    assert result["results"][0]["warnings"] == ["the image is ignored: the model does not read it"]


def test_a_text_longer_than_the_model_reads_is_scored_with_a_warning(scorer: ItemScorer) -> None:
    limit = scorer.bundle.config.text.max_bytes
    items = [{"text": "red" + " " * (limit - 3)}, {"text": "red" + " " * (limit - 2)}, {"text": "red"}]
    results = post(scorer, SETTINGS.model_copy(update={"max_body_bytes": 10 * limit}), json={"items": items}).json()
    whole, cut, short = results["results"]
    assert cut["warnings"] == [f"the text is cut: the model reads {limit:,} bytes of {limit + 1:,}"]
    assert whole["warnings"] == short["warnings"] == []
    assert cut["score"] == pytest.approx(short["score"], abs=1e-5)


def test_pages_of_other_origins_may_ask_only_if_they_are_named(scorer: ItemScorer) -> None:
    settings = SETTINGS.model_copy(update={"cors_origins": ("https://shop.example",), "token": SecretStr("hush")})
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}

    async def conversation(client: httpx.AsyncClient) -> list[tuple[int, str | None]]:
        origins = ("https://shop.example", "https://evil.example")
        answers = [await client.options("/v1/score", headers={"Origin": o, **asks}) for o in origins]
        return [(answer.status_code, answer.headers.get("access-control-allow-origin")) for answer in answers]

    assert ask(scorer, conversation, settings) == [(200, "https://shop.example"), (400, None)]
    closed = post(scorer, json={"text": "red"}, headers={"Origin": "https://shop.example"})
    assert "access-control-allow-origin" not in closed.headers


def test_a_bundle_that_was_replaced_leaves_nothing_in_memory(bundle: str) -> None:
    old = ItemScorer(bundle, SETTINGS)
    asyncio.run(old.score([Item(text="red")]))
    gone = weakref.ref(old._predictor)
    gc.disable()  # Serve freezes it: what only it would find stays for ever
    try:
        del old
        wait_for(lambda: gone() is None, timeout_s=10)  # the thread that prepared its item lets go a moment later
    finally:
        gc.enable()


def test_each_batch_is_told_to_who_counts(bundle: str) -> None:
    told: list[tuple[list[str], float]] = []
    counted = ItemScorer(bundle, SETTINGS, lambda results, seconds: told.append(([r.status for r in results], seconds)))
    post(counted, json={"items": [{"text": "red"}, {}]})
    assert sorted(status for statuses, _ in told for status in statuses) == ["degraded", "failed"]
    assert all(seconds > 0 for _, seconds in told)


def test_no_request_made_of_rubbish_gets_a_500(scorer: ItemScorer, rows: Path) -> None:
    generator = random.Random(0)
    whole = json.dumps({"items": [{"text": "the red square", "image": encoded(rows / "images" / "0.jpg")}]}).encode()

    async def conversation(client: httpx.AsyncClient) -> set[int]:
        codes = set()
        for _ in range(500):
            body, kind = spoiled(whole, generator), generator.choice(["application/json", "multipart/form-data", "x"])
            if kind.startswith("multi") and generator.random() < 0.5:
                kind += "; boundary=x"
            response = await client.post("/v1/score", content=body, headers={"content-type": kind})
            codes.add(response.status_code)
        return codes

    assert ask(scorer, conversation) <= {200, 400, 413, 415, 422}


def spoiled(body: bytes, generator: random.Random) -> bytes:
    data = bytearray(body)
    for _ in range(generator.randint(1, 8)):
        kind, at = generator.randrange(3), generator.randrange(max(len(data), 1))
        if kind == 0 and data:
            data[at] = generator.randrange(256)
        elif kind == 1:
            del data[at : at + generator.randrange(200)]
        else:
            data[at:at] = generator.choice([b"null", b'"', b"{", b"\x00", b"\\ud800", b"1e999", b"--x\r\n"])
    return bytes(data)


def run_batches(conversation: Callable[[], Awaitable[Any]]) -> Any:
    async def talk() -> Any:
        return await conversation()

    return asyncio.run(talk())


def test_what_waits_while_a_batch_runs_goes_together() -> None:
    started, release, batches = threading.Event(), threading.Event(), list[list[int]]()

    def run(items: Sequence[int]) -> list[int]:
        batches.append(list(items))
        started.set()
        assert release.wait(10)
        return [item * 2 for item in items]

    async def conversation() -> list[int]:
        batcher = Batcher(run, 4)
        first = asyncio.create_task(batcher.submit(1))
        await asyncio.to_thread(started.wait)
        others = [asyncio.create_task(batcher.submit(k)) for k in range(2, 8)]
        await asyncio.sleep(0)
        others[0].cancel()
        release.set()
        return await asyncio.gather(first, *others[1:])

    assert run_batches(conversation) == [2, 6, 8, 10, 12, 14]
    assert batches == [[1], [3, 4, 5], [6, 7]], "who has gone is left out"


def test_an_item_that_fails_its_batch_fails_alone() -> None:
    def run(items: Sequence[int]) -> list[int]:
        if 3 in items:
            raise ValueError("poison")
        return [item * 2 for item in items]

    async def conversation() -> list[Any]:
        batcher = Batcher(run, 8)
        results = await asyncio.gather(*(batcher.submit(k) for k in range(6)), return_exceptions=True)
        return [*results, await batcher.submit(10)]

    *results, after = run_batches(conversation)
    assert [str(result) for result in results] == ["0", "2", "4", "poison", "8", "10"]
    assert after == 20


def test_features_that_were_made_apart_predict_like_features_made_together(scorer: ItemScorer, rows: Path) -> None:
    from mmray.preprocess import Features

    predictor = scorer._predictor
    cells = {"image": [(rows / "images" / f"{k}.jpg").read_bytes() for k in range(3)], "text": ["red", None, "a b c d"]}
    together = predictor.predict(cells).outputs
    apart = [predictor.prepare({name: [column[k]] for name, column in cells.items()}) for k in range(3)]
    joined = predictor.predict_features(Features.concatenate(apart)).outputs
    assert abs(together - joined).max() < 1e-6
    assert dataclasses.is_dataclass(apart[0])
