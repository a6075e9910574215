"""The report at the end of a training: what is in it, what is not, and what happens when it cannot be written."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from accelerate_unsloth.reporting.html import FILE_NAME, PhaseSeconds, Record, charts, figures, render, write
from accelerate_unsloth.reporting.readings import Interval, RankReading, summary, totals
from accelerate_unsloth.reporting.secrets import HIDDEN, command_without_secrets, is_secret_name, without_secrets

from ..launching import WORKERS, launch, result

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HUB_TOKEN, WANDB_KEY = "hf_" + "abcDEF123456" * 2, "0123456789abcdef" * 2 + "01234567"


class Page(HTMLParser):
    """Sections by their heading, each with the rows of its tables; every element, and its text."""

    def __init__(self, source: str):
        super().__init__()
        self.elements, self.text, self.rows, self.open = [], "", {}, []
        self.heading, self._cells = "", None
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "h2":
            self.heading = ""
        elif tag == "tr":
            self._cells = []
        elif tag in ("td", "th"):
            self._cells.append("")
        elif tag == "data":
            self._cells = self._cells if self._cells else [""]
            self._cells[-1] = float(dict(attributes)["value"])

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"
        if tag == "tr":
            self.rows.setdefault(self.heading, []).append(self._cells)
            self._cells = None

    def handle_data(self, text):
        self.text += text
        if self.open and self.open[-1] == "h2":
            self.heading += text
        elif self._cells and self.open[-1] in ("td", "th"):
            self._cells[-1] += text

    def column(self, heading: str, name: str) -> list:
        head, *rows = self.rows[heading]
        return [row[head.index(name)] for row in rows]

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def a_record(ranks: int = 2, steps: int = 6, **changes) -> Record:
    history, log, tokens = [], [], 0
    for step in range(1, steps + 1):
        readings = [
            RankReading(
                100 * (rank + 1), 2.0, 0.5 * (rank + 1), 1, 10.0 + rank, 12.0 + rank, 3.0, "GPU X", 0, 24.0, 9, 64
            )
            for rank in range(ranks)
        ]
        tokens += sum(reading.tokens for reading in readings)
        history.append(Interval(step, readings))
        log.append({"step": step, "loss": 3.0 - step / 10, "num_tokens": tokens, **summary(readings)})
        log.append({"step": step, "eval_loss": 3.1 - step / 10, "eval_runtime": 1.0})
    spent = PhaseSeconds(total_s=30.0, preparation_s=4.0, evaluation_s=6.0, checkpoints_s=3.0)
    values = {"model": "some/model", "steps": steps, "max_steps": steps, "log_history": log, "processes": ranks}
    values |= {"spent": spent, "history": history, "decisions": [("engine", "unsloth", "a GPU is visible")]}
    return Record(**values | changes)


NOTHING_TO_DRAW = {"history": [], "log_history": []}


# ---- A real training ----


@pytest.fixture(scope="module")
def trained(tiny_model, uneven_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reported")
    options = {
        "args": {
            "gradient_accumulation_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "hub_token": "a-key-to-the-hub",
        }
        | {"save_strategy": "steps", "save_steps": 10},
        "plugin": {"report": True},
        "evaluate": True,
        "words of the command": f"<b>bold</b> {HUB_TOKEN} {WANDB_KEY} open-sesame",
    }
    finished = launch(
        WORKERS / "train.py",
        [tiny_model, uneven_data, folder, json.dumps(options)],
        environment={"HF_HOME": str(folder / "cache"), "WANDB_API_KEY": WANDB_KEY, "DOOR_PASSWORD": "open-sesame"},
    )
    assert finished.status == 0, finished.output[-3000:]
    return folder


@pytest.fixture(scope="module")
def source(trained):
    return (trained / "run" / FILE_NAME).read_text()


@pytest.mark.launch
def test_the_figures_are_those_of_the_log(trained, source):
    seen, log = Page(source), result(trained)["log_history"]
    logged = {name: [entry.get(name, "") for entry in log[:-1]] for name in ("loss", "eval_loss", "tokens_per_second")}
    assert len([loss for loss in logged["loss"] if loss]) == 6
    assert seen.column("All logged values", "loss") == logged["loss"]
    assert seen.column("All logged values", "eval loss") == logged["eval_loss"]
    assert seen.column("All logged values", "tokens/s") == logged["tokens_per_second"]
    losses = [loss for loss in logged["loss"] if loss]
    assert "6 steps on 2 CPU processes in" in seen.text
    assert f"loss from {losses[0]:.4g} to {losses[-1]:.4g}" in seen.text


@pytest.mark.launch
def test_all_ranks_are_in_it_with_all_their_tokens(trained, source):
    seen = Page(source)
    assert seen.column("Each rank", "Rank") == [0, 1]
    assert seen.column("Each rank", "Device") == ["CPU", "CPU"]
    assert sum(seen.column("Each rank", "Tokens")) == result(trained)["num_tokens"][-1]
    assert all(seconds > 0 for seconds in seen.column("Each rank", "Own work per step, s"))
    assert all(gib > 0 for gib in seen.column("Each rank", "Host, GiB"))
    assert {"rank 0", "rank 1"} <= set(
        re.findall(r"rank \d", "".join(re.findall(r"<svg.*?</svg>", source, re.DOTALL)))
    )


@pytest.mark.launch
def test_decisions_versions_and_parts_of_the_time_are_in_it(trained, source):
    import torch

    seen = Page(source)
    decided = [list(row) for row in result(trained)["decisions"] if row[0] != "versions"]
    assert len(decided) > 5
    assert ["Samples", "22"] in seen.rows["The run"]
    assert seen.rows["Decisions"][1:] == decided
    assert ["torch", torch.__version__.split("+")[0]] in [
        [row[0], row[1].split("+")[0]] for row in seen.rows["Versions"]
    ]
    parts = [row[0] for row in seen.rows["Where the time went"][1:]]
    assert parts[:2] == ["Preparation", "Forward and backward"]
    assert {"Evaluation", "Checkpoints"} <= set(parts)


@pytest.mark.launch
def test_the_command_is_in_it_without_secrets_and_without_markup(source):
    seen = Page(source)
    assert str(WORKERS / "train.py") in seen.text
    assert "<b>bold</b>" in seen.text
    assert all(tag != "b" for tag, _ in seen.elements)
    assert seen.text.count(HIDDEN) == 4
    for secret in ("a-key-to-the-hub", HUB_TOKEN, WANDB_KEY, "open-sesame"):
        assert secret not in source


@pytest.mark.launch
def test_the_page_needs_nothing_from_elsewhere_and_reads_without_eyes(source):
    seen = Page(source)
    assert seen.open == []
    assert "://" not in source.replace("http://www.w3.org/", "")  # names of XML formats, which nobody fetches
    assert {tag for tag, _ in seen.elements}.isdisjoint({"script", "link", "img", "iframe", "object", "image"})
    assert all(link.startswith("#") for name in ("href", "xlink:href", "src") for link in seen.attributes(name))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", source))
    assert "@import" not in source
    assert ("html", {"lang": "en"}) in seen.elements
    drawings = [attributes for tag, attributes in seen.elements if tag == "svg"]
    assert len(drawings) == 5
    assert all(drawing["role"] == "img" and len(drawing["aria-label"]) > 20 for drawing in drawings)


@pytest.mark.launch
def test_the_file_has_the_permissions_of_the_umask_and_leaves_nothing_behind(trained):
    umask = os.umask(0)
    os.umask(umask)
    report = trained / "run" / FILE_NAME
    assert report.stat().st_mode & 0o777 == 0o666 & ~umask
    assert [file.name for file in report.parent.glob(".*")] == []


# ---- Secrets ----


@pytest.mark.parametrize(
    ("words", "clean"),
    [
        (["--hub_token", "abc"], ["--hub_token", HIDDEN]),
        (["--hub-token=abc,d e"], [f"--hub-token={HIDDEN}"]),
        (["--password", "-abc"], ["--password", HIDDEN]),
        (["trainer.hubToken=abc"], [f"trainer.hubToken={HIDDEN}"]),
        (["WANDB_API_KEY=abc"], [f"WANDB_API_KEY={HIDDEN}"]),
        (['{"api_key": "a, b", "lr": 1}'], [f'{{"api_key": "{HIDDEN}", "lr": 1}}']),
        (["--header", "Authorization: Bearer abc"], ["--header", f'Authorization: "{HIDDEN}"']),
        (["""note="token='abc'" """], [f"""note="token="{HIDDEN}"" """]),
        (["train.py --lr --hub_token abc --x 1"], [f'train.py --lr --hub_token "{HIDDEN}" --x 1']),
        (["https://me:abc@host/x"], [f"https://{HIDDEN}@host/x"]),
        (["--anything", HUB_TOKEN], ["--anything", HIDDEN]),
        (["--accessKey=abc", "privateKey: abc"], [f"--accessKey={HIDDEN}", f'privateKey: "{HIDDEN}"']),
        # And what is none stays.
        (["--token", "--lr", "1"], ["--token", "--lr", "1"]),
        (
            ["--pad_token", "<pad>", "--micro_batch_tokens", "2048"],
            ["--pad_token", "<pad>", "--micro_batch_tokens", "2048"],
        ),
        (["--tokenizer=x", "--author", "me", "a=b"], ["--tokenizer=x", "--author", "me", "a=b"]),
    ],
)
def test_secrets_of_a_command_line_are_hidden(words, clean):
    assert command_without_secrets(words, environment={}) == clean


@pytest.mark.parametrize("secret", [HUB_TOKEN, "open-sesame"])
@pytest.mark.parametrize(
    "field", ["model", "device", "began", "versions", "command", "warnings", "facts", "decisions"]
)
def test_secrets_are_hidden_in_every_field(field, secret, monkeypatch):
    monkeypatch.setenv("DOOR_PASSWORD", "open-sesame")
    value = f"out/run_{secret}"
    values = {"versions": {"name": value}, "command": [value], "warnings": [value], "facts": [("name", value)]}
    values["decisions"] = [("subject", value, value)]
    changes = {"facts": [("Samples", "22")], **NOTHING_TO_DRAW, field: values.get(field, value)}
    source = render(a_record(**changes))
    assert secret not in source
    assert HIDDEN in source


def test_names_and_hashes_that_are_no_secrets_stay():
    plain = f"sk-learn-classifier at {WANDB_KEY}, hf_config"
    assert without_secrets(plain, environment={}) == plain


def test_a_value_of_a_secret_variable_is_hidden_wherever_it_turns_up():
    environment = {"DB_PASSWORD": "open-sesame", "HOME": "/home/me", "PWD": "/home/me/runs", "API_KEY": "true"}
    text = without_secrets("at open-sesame in /home/me/runs, true", environment)
    assert text == f"at {HIDDEN} in /home/me/runs, true"


def test_names_of_secrets():
    secret = [
        "HF_TOKEN",
        "--wandb-api-key",
        "clientSecret",
        "OPENAI_APIKEY",
        "db.passwd",
        "auth",
        "AWS_SECRET_ACCESS_KEY",
    ]
    plain = ["tokenizer", "num_tokens", "eos_token", "TOKENIZERS_PARALLELISM", "author", "keyboard", "monkey"]
    assert [name for name in secret if not is_secret_name(name)] == []
    assert [name for name in plain if is_secret_name(name)] == []


def test_what_users_control_is_escaped_everywhere():
    evil = "\"><script>alert(1)</script><img src=x onerror='y'>"
    changes = {"model": evil, "device": evil, "began": evil, "history": [], "versions": {evil: evil}}
    changes |= {"command": [evil], "warnings": [evil], "facts": [(evil, evil)], "decisions": [(evil, evil, evil)]}
    source = render(a_record(**changes))
    assert source.count("&lt;script&gt;") >= 11
    assert {tag for tag, _ in Page(source).elements}.isdisjoint({"script", "img"})


# ---- The arithmetic ----


def test_the_parts_of_the_time_add_up_to_the_whole():
    found = {share.name: share.seconds for share in figures.shares(a_record())}
    assert found == {
        "Preparation": 4.0,
        "Forward and backward": pytest.approx(6 * 0.75),
        "Waiting for the slowest rank": pytest.approx(6 * 0.25),
        "The rest of steps": pytest.approx(6 * 1.0),
        "Evaluation": 6.0,
        "Checkpoints": 3.0,
        "The rest": pytest.approx(30 - 4 - 12 - 6 - 3),
    }


def test_steps_after_the_last_log_are_not_lost():
    record = a_record()
    record.spent.unlogged_s = 2.5
    found = {share.name: share.seconds for share in figures.shares(record)}
    assert found["Steps after the last log"] == 2.5
    assert sum(found.values()) == pytest.approx(30.0)


def test_each_rank_has_its_own_figures():
    one, other = a_record().ranks
    assert (one.tokens, other.tokens) == (600, 1200)
    assert (one.step_s, other.step_s) == (0.5, 1.0)
    assert (one.rest_s, other.rest_s) == (1.5, 1.0)
    assert (one.peak_gib, other.reserved_gib, other.reachable_gib) == (10.0, 13.0, 24.0)
    assert figures.tokens_per_second(a_record()) == pytest.approx(1800 / 12)
    assert figures.imbalance(a_record()) == pytest.approx(200 / 150)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Finished at step 6 of 6."),
        ({"max_steps": 9}, "Ended at step 6 of 9, before its last step."),
        ({"max_steps": 9, "stopped": True}, "Stopped by a signal at step 6 of 9; resume_from_checkpoint='auto'"),
        (
            {"began_at_step": 2},
            "resumed at step 2: losses are those of the whole run, while times and the values of single",
        ),
    ],
)
def test_the_ending_is_told(changes, words):
    record = a_record(**changes)
    assert words in " ".join(Page(render(record)).text.split())
    assert figures.headline(record).startswith(
        f"model: {6 - record.began_at_step} steps on 2 x GPU X in 30.0 s, loss from 2.9"
    )


def test_the_readings_of_a_rank_are_summed_up():
    one = RankReading(1, 2.0, 3.0, 4, 9.0, 6.0, 7.0, "A", 1, 5.0, 6.0, 7.0)
    other = RankReading(10, 20.0, 30.0, 40, 5.0, 60.0, 7.5, "A", 2, 4.0, 5.0, 8.0)
    both = RankReading(11, 22.0, 33.0, 44, 9.0, 60.0, 7.5, "A", 3, 4.0, 5.0, 8.0)
    assert totals([Interval(1, [one, other]), Interval(2, [other, one])])[0] == both
    assert totals([]) == []


# ---- The page ----


def test_without_the_monitor_the_log_is_shown_and_the_lack_is_told():
    log = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 2, "train_loss": 2.75}]
    record = a_record(history=[], log_history=log)
    seen = Page(render(record))
    assert "Steps were not monitored (monitor=False)" in seen.text
    assert seen.column("All logged values", "loss") == [3.0, 2.5]
    assert [chart.title for chart in charts.draw(record)] == ["Loss"]
    assert [share.name for share in figures.shares(record)][-1] == "Steps, and the rest"


def test_a_run_that_logged_nothing_has_a_page_too():
    record = Record("tiny", 1, 1, [{"step": 1, "train_loss": 2.75}])
    assert "1 step on 1 CPU process in 0.00 s, loss 2.75" in Page(render(record)).text
    assert charts.draw(record) == []


def test_a_loss_that_is_not_finite_is_shown_as_it_is():
    losses = [3.0, float("inf"), float("nan")]
    record = a_record(log_history=[{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)])
    seen = Page(render(record))
    assert "loss from 3 to nan" in seen.text
    assert repr(seen.column("All logged values", "loss")) == repr(losses)


def test_warnings_stand_at_the_top():
    source = render(a_record(warnings=["The GPU memory of rank 1 is nearly full"]))
    assert source.index("nearly full") < source.index("Where the time went")


def test_a_long_run_of_many_ranks_is_drawn_with_few_points_and_lines():
    source = render(a_record(ranks=12, steps=1300))
    assert len(source) < 1_000_000
    assert source.count("Each point is the mean of 3 logs.</figcaption>") == 5
    assert {"lowest rank", "highest rank"} <= set(re.findall(r">(\w+ rank)</text>", source))
    assert len(Page(source).rows["All logged values"]) <= 502
    assert len(Page(source).rows["Each rank"]) == 13


def test_the_drawings_of_a_page_share_no_identifiers_and_miss_none():
    source = render(a_record())
    identifiers = Page(source).attributes("id")
    assert len(identifiers) == len(set(identifiers)) > 0
    used = {*Page(source).attributes("xlink:href"), *re.findall(r"url\(([^)]*)", source)}
    assert len(used) > 6
    assert used <= {f"#{identifier}" for identifier in identifiers}


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    charts.draw(a_record())
    assert dict(matplotlib.rcParams) == before


# ---- Writing ----


def test_an_older_report_is_replaced_as_a_whole(tmp_path, monkeypatch):
    write(a_record(model="first"), tmp_path)
    write(a_record(model="second"), tmp_path)
    assert "second: 6 steps" in (tmp_path / FILE_NAME).read_text()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write(a_record(model="third"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]
    assert "second: 6 steps" in (tmp_path / FILE_NAME).read_text()


class Training:
    """As little of a trainer as the report needs."""

    def __init__(self):
        self.callbacks = []

    def add_callback(self, callback):
        self.callbacks.append(callback)

    def train(self):
        """As if it went on from step 4."""
        for callback in self.callbacks:
            callback.on_train_begin(None, SimpleNamespace(global_step=4), None)
        return "trained"


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    from accelerate_unsloth import UnslothPlugin
    from accelerate_unsloth.reporting import html
    from accelerate_unsloth.trainers.reporting import ReportMixin

    class Reporting(ReportMixin, Training):
        plugin = UnslothPlugin(report=True)
        args = SimpleNamespace(output_dir=str(tmp_path / "out"))
        _monitor = SimpleNamespace(history=[], unlogged_s=0.0)

    def collect(trainer, began, began_at_step, spent, history, warnings):
        return a_record(began=began, began_at_step=began_at_step, spent=spent, warnings=list(warnings))

    monkeypatch.setattr(html, "collect", collect)
    return Reporting()


def test_a_trainer_writes_the_report_when_it_has_trained(trainer, tmp_path):
    assert trainer.train() == "trained"
    assert "It was resumed at step 4" in (tmp_path / "out" / FILE_NAME).read_text()
    assert trainer._clock.spent.total_s > trainer._clock.spent.preparation_s > 0


def test_the_report_can_be_switched_off(trainer, tmp_path):
    trainer.plugin.report = False
    assert trainer.train() == "trained"
    assert not (tmp_path / "out").exists()


def test_a_training_that_failed_leaves_no_report(trainer, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("step")

    monkeypatch.setattr(Training, "train", fail)
    with pytest.raises(RuntimeError, match="step"):
        trainer.train()
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written_costs_one_warning_and_not_the_training(trainer, tmp_path, monkeypatch):
    from accelerate_unsloth.trainers import reporting

    warnings = []
    monkeypatch.setattr(reporting.logger, "warning", warnings.append)
    (tmp_path / "out").write_text("a file where the folder should be")
    assert trainer.train() == "trained"
    assert len(warnings) == 1
    assert "The training is complete, but its report was not written" in warnings[0]
    assert "FileExistsError" in warnings[0]


# ---- A browser ----

MEASURE = """<script>document.body.setAttribute("data-drawings", JSON.stringify([...document.querySelectorAll("svg")]
.map(svg => { const r = svg.getBoundingClientRect(); return [r.x, r.y, r.width, r.height].map(Math.round) })))</script>"""


def browse(folder, *options):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", *options]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1200,3000"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome to look at the page")
def test_a_browser_draws_every_chart(tmp_path):
    from matplotlib import image

    record = a_record()
    report = write(record, tmp_path)
    measured = tmp_path / "measured.html"
    source = re.sub(r"<meta http-equiv[^>]*>", "", report.read_text())  # it forbids scripts, and the test has one
    measured.write_text(source.replace("</body>", f"{MEASURE}</body>"))
    found = Page(browse(tmp_path, "--dump-dom", measured.as_uri())).attributes("data-drawings")
    places = json.loads(found[0])
    assert len(places) == len(charts.draw(record)) == 6

    browse(tmp_path, f"--screenshot={tmp_path / 'page.png'}", report.as_uri())
    pixels = (image.imread(tmp_path / "page.png")[..., :3] * 255).round()
    for (left, top, width, height), chart in zip(places, charts.draw(record), strict=True):
        drawing = pixels[top : top + height, left : left + width]
        assert drawing.shape[0] > 150
        assert drawing.shape[1] > 350
        lines = (abs(drawing - [0x2F, 0x7E, 0xD8]).max(axis=-1) < 24).sum()
        ink = (drawing.max(axis=-1) < 110).sum()  # text and axes, in the page's dark
        assert lines > 100, f"{chart.title}: {lines} pixels in the colour of its first line"
        assert ink > 300, f"{chart.title}: {ink} pixels of text and axes"
