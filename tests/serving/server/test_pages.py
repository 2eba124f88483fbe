"""The live page, its data, the hand on the ratio, and the metrics."""

import re
import shutil
import subprocess
import time

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flexiq_jax.serving.server.live import Window
from tests.serving.server.served_for_test import SHAPE, served

X = np.zeros((4, *SHAPE), np.float32)
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client():
  with served(hold=True, controller="load") as client:
    yield client


def samples(client) -> dict:
  families = text_string_to_metric_families(client.get("/metrics").body.decode())
  return {(s.name, *sorted(s.labels.values())): s.value for f in families for s in f.samples}


def test_metrics_count(client):
  before = samples(client)
  assert client.infer(X).status == 200
  assert client.infer(X[:, :1]).status == 400
  after = samples(client)
  grown = {key: after[key] - before.get(key, 0) for key in after}
  assert grown["flexiq_requests_total", "answered", "infer"] == 1
  assert grown["flexiq_requests_total", "infer", "refused"] == 1
  assert grown["flexiq_examples_total", "0"] == 4
  assert grown["flexiq_batch_examples_count",] == 1
  assert grown["flexiq_batch_examples_sum",] == 4
  assert grown["flexiq_queue_seconds_count",] == 1
  assert grown["flexiq_compute_seconds_count",] == 1
  assert grown["flexiq_latency_seconds_count", "infer"] == 2
  assert grown["flexiq_failed_batches_total",] == 0
  assert after["flexiq_ratio",] == 0
  assert after["flexiq_effective_accuracy",] == 80.0
  assert after["process_resident_memory_bytes",] > 0


def test_state_has_the_present_and_what_is_new(client):
  facts = client.get("/state").json
  assert (facts["model"], facts["ready"], facts["levels"]) == ("toy", True, [0.0, 0.5, 1.0])
  assert facts["accuracies"] == [80.0, 79.0, 75.0]
  time.sleep(0.6)
  new = client.get(f"/state?after={facts['newest']}").json
  assert [p["n"] for p in new["points"]] == [*range(facts["newest"] + 1, new["newest"] + 1)]
  assert new["newest"] > facts["newest"]
  for bad in ("x", "-1", "9" * 16, "%C2%B2"):
    assert client.get(f"/state?after={bad}").status == 400


def test_the_ratio_is_held_by_hand(client):
  assert client.post("/hold", {"ratio": 0.5}, JSON).json == {"held": 0.5}
  assert client.infer(X).json["parameters"]["ratio"] == 0.5
  facts = client.get("/state").json
  assert (facts["held"], facts["now"]["ratio"]) == (0.5, 0.5)
  assert client.post("/hold", {"ratio": None}, JSON).json == {"held": None}
  assert client.get("/state").json["held"] is None
  for body, headers, status in (
    ({"ratio": 0.3}, JSON, 400),
    ({"ratio": "1"}, JSON, 400),
    ({}, JSON, 400),
    (b"", JSON, 400),
    ({"ratio": 0.5}, {"Content-Type": "text/plain"}, 415),
  ):
    assert client.post("/hold", body, headers).status == status
  assert client.get("/state").json["held"] is None


def test_the_ratio_is_not_held_where_that_is_not_allowed():
  with served() as client:
    assert client.get("/state").json["may_hold"] is False
    reply = client.post("/hold", {"ratio": 0.5}, JSON)
    assert (reply.status, client.get("/state").json["held"]) == (403, None)


def test_window_weighs_examples():
  now = [0.0]
  window, accuracy = Window(10, lambda: now[0]), {0.0: 80.0, 1.0: 70.0}.get
  assert window.mean(accuracy) is None
  window.add(0.0, 3)
  now[0] = 5
  window.add(1.0, 1)
  assert window.mean(accuracy) == 77.5
  assert window.mean(lambda ratio: None) is None
  now[0] = 12
  assert window.mean(accuracy) == 70.0
  now[0] = 30
  assert window.mean(accuracy) is None


def test_page_asks_nobody_else(client):
  reply = client.get("/")
  assert reply.status == 200 and reply.headers["content-type"].startswith("text/html")
  page = reply.body.decode()
  assert not re.findall(
    r"(?:https?:)?//[a-z]|<link(?! rel=\"icon\" href=\"data:)|src=|@import", page
  )
  policy = reply.headers["content-security-policy"]
  assert "default-src 'none'" in policy and "unsafe" not in policy


@pytest.fixture
def browser(tmp_path):
  path = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
  )
  if path is None:
    pytest.skip("Chromium is not installed, as by apt-get install chromium")

  def look(url: str) -> str:
    """The page after some seconds of its own time, as the browser has it."""
    ended = subprocess.run(
      [
        *(path, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *(f"--user-data-dir={tmp_path}", "--virtual-time-budget=3000", "--dump-dom", url),
      ],
      capture_output=True,
      text=True,
      timeout=120,
    )
    assert "CONSOLE" not in ended.stderr, ended.stderr  # no script failed, nothing was blocked
    return ended.stdout

  return look


@pytest.mark.slow
def test_page_in_a_browser(client, browser):
  client.post("/hold", {"ratio": 1.0}, JSON)
  for _ in range(20):
    client.infer(X)
  page = browser(f"http://127.0.0.1:{client.port}/")
  text = lambda name: re.sub(
    "<.*?>", "", re.search(f'id="{name}"[^>]*>(.*?)</(?:div|span|h1)', page)[1]
  )
  assert (text("model"), text("share"), text("how")) == ("toy", "100 %", "held by hand")
  assert text("top1").endswith("% top-1") and 75 <= float(text("top1").split()[0]) <= 80
  assert re.search(r'class="ready"[^>]*><i></i><span>ready', page)
  assert re.search(r'id="hand"(?![^>]*hidden)', page)
  assert re.search(r'aria-label="ratio, now 100 %"', page)
  client.post("/hold", {"ratio": None}, JSON)
