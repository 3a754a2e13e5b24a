"""The page of a session: everything in it, nothing fetched, and never broken by what a log lacks."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from support.virtual_rig import joint_plan

from chatvla_edge.drivers import rig as rigs
from chatvla_edge.runtime import servo_plan
from chatvla_edge.runtime.daemon import log_file, report, ros
from chatvla_edge.runtime.daemon.log_file import Channel, LogWriter
from chatvla_edge.runtime.servo_records import telemetry

VOID = {"meta", "img", "br"}


class Balanced(HTMLParser):
    """Every element that begins ends, in order; collects what would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [
            value for name, value in attributes if name in ("src", "href") and not value.startswith("data:")
        ]

    def handle_startendtag(self, tag, attributes):  # <polyline .../>
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def session(folder, ticks=300, pictures=3, text="5 + 3 = 8 <b>& so on</b>"):
    rig = rigs.load("sim_arx_r5_bimanual").model_dump(mode="json", by_alias=True)
    plan = joint_plan(axes=2)
    row = telemetry(len(plan.components), plan.axes)
    about = {"kind": "live", "variant": "tiny", "bundle": "ab" * 32, "plan": json.loads(servo_plan.to_json(plan))}
    log = LogWriter(folder, {"rig": json.dumps(rig), **{key: json.dumps(value) for key, value in about.items()}})
    log.declare(Channel.rows("/ticks", row))
    for topic in ("/events", "/policy", "/gaps", "/camera/top/frame"):
        log.declare(Channel.json(topic))
    log.declare(log_file.image_channel("/camera/top"))
    log.reopen()
    begin, period = 10**12, 2_000_000
    rows = np.zeros(ticks, row)
    rows["tick"] = np.arange(1, ticks + 1)
    rows["tick_ns"] = begin + period * np.arange(ticks)
    rows["late_ns"], rows["cost_ns"], rows["doing"], rows["chunk"] = 20_000, 8_000, 3, 1
    rows["measured"][:, 0] = np.sin(np.arange(ticks) / 20)
    rows["limited"][:10] = np.nan
    if ticks:
        log.write("/ticks", rows.tobytes(), begin)
    for at, name in ((0, "READY"), (100, "ACTIVE"), (250, "HOLD")):
        event = {"at_ns": begin + at * period, "kind": "mode", "name": name, "text": f"-> {name}"}
        log.write_json("/events", event, event["at_ns"])
    for i in range(pictures):
        at = begin + i * 60_000_000
        stamps = {
            "sequence": i,
            "number": i + 1,
            "captured_ns": at,
            "received_ns": at,
            "published_ns": at,
            "clock": "device",
        }
        log.write("/camera/top", ros.compressed_image(at, "top", b"\xff\xd8jpeg"), at)
        log.write_json("/camera/top/frame", stamps, at)
        query = {"text": text, "begun_ns": at, "done_ns": at + 40_000_000, "seconds": {"language": 0.03}}
        log.write_json("/policy", {**query, "frames": {"top": stamps}}, at)
    log.write_json("/gaps", {"number": 1, "from": 5, "to": 9, "why": "disk: No space left"}, begin)
    log.close()
    return folder


def test_a_page_holds_it_all_and_fetches_nothing(tmp_path):
    output = tmp_path / "report.html"
    report.write(session(tmp_path), output)
    page = Balanced()
    page.feed(output.read_text())
    assert page.open == []
    assert page.fetched == []
    for words in ("sim_arx_r5_bimanual", "nothing real moved", "500.00 Hz", "-> HOLD", "5 + 3 = 8 <b>& so on</b>"):
        assert words in page.text
    assert "disk: No space left" in page.text
    assert len(re.findall(r"<polyline", output.read_text())) == 2 * 5
    assert output.read_text().count("data:image/jpeg;base64,") == 3
    assert "<script" not in output.read_text()


@pytest.mark.parametrize("parts", [{"ticks": 0}, {"pictures": 0}, {"ticks": 1, "pictures": 1}])
def test_what_a_log_lacks_breaks_nothing(tmp_path, parts):
    page = Balanced()
    page.feed(report.page(report.read(session(tmp_path, **parts))))
    assert page.open == []


def test_rates_are_of_what_was_published_not_of_what_was_logged(tmp_path):
    table = report._rates(report.read(session(tmp_path)), rigs.load("sim_arx_r5_bimanual").model_dump(by_alias=True))
    assert "16.67 Hz" in table  # three frames, 60 ms apart
    assert "1.0000" in table  # the servo


def test_no_log_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"found no log-"):
        report.read(tmp_path)
