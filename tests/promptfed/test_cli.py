"""The command line as a person meets it: real processes, exit codes, messages."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from promptfed.errors import PromptfedError
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.soft import soft_prompt
from promptfed.prompts.template import PromptTemplate
from tests.support import public_texts, sentences

pytestmark = pytest.mark.model  # `run` loads the encoder


def promptfed(*args: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "promptfed.cli", *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "120"},
        check=False,
    )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a configuration for the scripted FM, and one finished run."""
    folder = tmp_path_factory.mktemp("cli")
    names = ("negative", "positive")
    for split, n, seed in (("train", 24, 0), ("test", 12, 50)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["client", "text", "label"])
            for c in range(2):
                data = sentences(n, seed + c)
                out.writerows([f"site{c}", t, names[y]] for t, y in zip(data.texts, data.labels, strict=True))
    (folder / "public.csv").write_text("text\n" + "\n".join(public_texts()) + "\n")
    (folder / "run.toml").write_text(
        '[data]\ntrain = "train.csv"\ntest = "test.csv"\npublic = "public.csv"\n'
        '[fm]\nscorer = "scripted:overlap"\n[budget]\nmax_fm_calls = 400\n'
    )
    done = promptfed("run", folder / "run.toml", "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    assert "in-process simulation" in done.stdout
    assert "fm_dm" in done.stdout
    assert "report.html" in done.stdout
    return folder


def test_run_as_json_prints_the_summary_alone(workspace: Path, tmp_path: Path) -> None:
    done = promptfed("run", workspace / "run.toml", "--out", tmp_path / "o", "--set", "seed=2", "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seed"] == 2


def test_a_run_tells_who_has_no_label_and_what_the_fm_taught(workspace: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.csv"
    more.write_text("client,text\n" + "\n".join(f"stie1,{text}" for text in sentences(8, 70).texts) + "\n")
    settings = (f'data.unlabelled="{more}"', "distillation.max_fm_calls=30", "distillation.min_confidence=0")
    options = [part for setting in settings for part in ("--set", setting)]

    done = promptfed("run", workspace / "run.toml", "--out", tmp_path / "o", *options)

    assert done.returncode == 0, done.stderr
    assert "no labelled text: stie1" in done.stderr
    assert "74 lessons of the FM, over all clients: score of the domain models 0." in " ".join(done.stderr.split())


def test_an_existing_folder_is_refused_with_the_way_out(workspace: Path) -> None:
    done = promptfed("run", workspace / "run.toml", "--out", workspace / "out")

    assert done.returncode == 2
    assert "--force" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_was_killed_goes_on_to_the_same_end(workspace: Path, tmp_path: Path) -> None:
    log = tmp_path / "run" / "events.jsonl"
    command = [
        sys.executable,
        "-m",
        "promptfed.cli",
        "run",
        str(workspace / "run.toml"),
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 8):
        time.sleep(0.01)
    process.kill()
    process.wait()

    refused = promptfed("run", workspace / "run.toml", "--out", tmp_path / "run")
    done = promptfed("resume", tmp_path / "run")

    assert refused.returncode == 2
    assert "promptfed resume" in " ".join(refused.stderr.split())
    assert done.returncode == 0, done.stderr
    assert "fm_dm" in done.stdout
    assert (tmp_path / "run" / "prompt.json").read_bytes() == (workspace / "out" / "prompt.json").read_bytes()


def test_what_is_no_run_folder_cannot_be_resumed(tmp_path: Path) -> None:
    done = promptfed("resume", tmp_path / "nowhere")

    assert done.returncode == 2
    assert "no config.toml" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_dry_run_estimates_and_writes_nothing(workspace: Path, tmp_path: Path) -> None:
    done = promptfed("run", workspace / "run.toml", "--out", tmp_path / "none", "--dry-run", "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["phases"]["tuning"]["fm_calls"] == 400
    assert not (tmp_path / "none").exists()


def test_predict_reads_lines_and_writes_json_lines(workspace: Path) -> None:
    fm = ("--fm", "scripted:overlap")
    text = "The plot seemed superb.\nThe cast seemed dreadful.\n"

    pooled = promptfed("predict", workspace / "out", *fm, stdin=text)
    own = promptfed("predict", workspace / "out", *fm, "--client", "site0", stdin=text)
    stranger = promptfed("predict", workspace / "out", *fm, "--client", "siteX", stdin=text)

    for done in (pooled, own):
        assert done.returncode == 0, done.stderr
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert [set(a["proba"]) for a in answers] == [{"negative", "positive"}] * 2
    assert pooled.stdout != own.stdout
    assert stranger.returncode == 2
    assert "site0, site1" in stranger.stderr


def test_predict_answers_line_by_line_also_blank_ones_and_those_with_strange_characters(workspace: Path) -> None:
    fm = ("--fm", "scripted:overlap")
    text = "\ufeffThe plot seemed superb.\r\n\nThe cast\u2028seemed dreadful.\n"

    for client in ((), ("--client", "site0")):
        done = promptfed("predict", workspace / "out", *fm, *client, stdin=text)

        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert [answer["label"] is None for answer in answers] == [False, True, False]
        assert done.stderr == ""


def test_predict_says_so_where_another_model_answers_than_the_tuned_one(workspace: Path) -> None:
    done = promptfed("predict", workspace / "out", "--fm", "scripted:other", stdin="The plot seemed superb.\n")

    assert done.returncode == 0
    assert "tuned on scripted:overlap@0, answered by scripted:other@0" in " ".join(done.stderr.split())


@pytest.mark.parametrize("option", [["--isolate"], ["--passages", "9"], ["--encoder", "x"]])
def test_options_about_passages_need_an_index(workspace: Path, option: list[str]) -> None:
    done = promptfed("predict", workspace / "out", "--client", "site0", *option, stdin="x\n")

    assert done.returncode == 2
    assert f"{option[0]} is about passages: it needs --index" in " ".join(done.stderr.split())


def test_eval_measures_a_prompt_on_a_file(workspace: Path) -> None:
    done = promptfed(
        "eval", workspace / "out" / "prompt.json", workspace / "test.csv", "--fm", "scripted:overlap", "--json"
    )

    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["n"] == 24
    assert body["metrics"]["nll"]["value"] > 0.0
    assert 0.0 <= body["metrics"]["accuracy"]["value"] <= 1.0


def test_eval_as_a_client_measures_what_predict_answers(workspace: Path, tmp_path: Path) -> None:
    fm, run, data = ("--fm", "scripted:overlap"), workspace / "out", tmp_path / "site0.csv"
    with (workspace / "test.csv").open(newline="") as file:
        mine = [row for row in csv.DictReader(file) if row["client"] == "site0"]
    text = "".join(row["text"] + "\n" for row in mine)
    data.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in mine) + " ,negative\n")

    answers = promptfed("predict", run, *fm, "--client", "site0", stdin=text).stdout.splitlines()
    measured = promptfed("eval", run, data, *fm, "--client", "site0", "--json")

    right = [json.loads(line)["label"] == row["label"] for line, row in zip(answers, mine, strict=True)]
    body = json.loads(measured.stdout)
    assert (body["n"], body["metrics"]["accuracy"]["value"]) == (12, pytest.approx(np.mean(right)))
    assert "1 rows with an empty text are left out" in " ".join(measured.stderr.split())


def test_eval_says_so_where_another_model_answers_and_asks_nobody_about_labels_it_does_not_know(
    workspace: Path, tmp_path: Path
) -> None:
    run, data = workspace / "out", workspace / "test.csv"
    (tmp_path / "odd.csv").write_text("text,label\nGood.,Positive\n")

    other = promptfed("eval", run, data, "--fm", "scripted:other")
    odd = promptfed("eval", run, tmp_path / "odd.csv", "--fm", "openai:http://127.0.0.1:9/v1#none")
    texts = promptfed("eval", run, data, "--label-column", "text", "--fm", "scripted:overlap")

    assert "tuned on scripted:overlap@0, answered by scripted:other@0" in " ".join(other.stderr.split())
    assert (odd.returncode, "has labels Positive; expected" in " ".join(odd.stderr.split())) == (2, True)
    assert (texts.returncode, "is it the right column?" in " ".join(texts.stderr.split())) == (2, True)
    assert "seemed" not in texts.stderr


def test_a_client_has_one_prompt_at_a_time(workspace: Path) -> None:
    both = promptfed("predict", workspace / "out", "--client", "site0", "--personal", "--prompt-only", stdin="x\n")

    assert both.returncode == 2
    assert "--personal and --prompt-only are two prompts" in " ".join(both.stderr.split())


def test_compare_report_and_methods(workspace: Path) -> None:
    run = workspace / "out"
    compared = promptfed("compare", run, run, "--arm", "fm", "--arm-b", "zero_shot", "--json")
    (run / "report.html").unlink()
    reported = promptfed("report", run)
    methods = promptfed("methods", "--json")

    assert json.loads(compared.stdout)["n_texts"] == 24
    assert reported.returncode == 0
    assert (run / "report.html").is_file()
    assert "race" in [m["name"] for m in json.loads(methods.stdout)]


def test_methods_shows_one_method_with_its_options(tmp_path: Path) -> None:
    shown = promptfed("methods", "manual_few_shot")
    found = json.loads(promptfed("methods", "local_only", "--json").stdout)
    bounded = promptfed("methods", "fedbpt").stdout
    unknown = promptfed("methods", "rase")

    assert "prompt" in shown.stdout
    assert "float, at least 0, below 1" in bounded
    assert "full | separable | low_rank" in bounded
    assert "text or none" in shown.stdout
    assert [(o["name"], o["default"]) for o in found["options"]] == [("inner", "race"), ("inner_options", {})]
    assert found["sends"] == ["ask", "newton", "score", "vote", "weigh", "write"]
    assert (unknown.returncode, "did you mean 'race'" in unknown.stderr) == (2, True)


def test_a_client_s_own_choice_predicts(workspace: Path) -> None:
    fm, text = ("--fm", "scripted:overlap"), "The plot seemed superb.\n"

    own = promptfed("predict", workspace / "out", *fm, "--client", "site0", "--personal", stdin=text)
    nobody = promptfed("predict", workspace / "out", *fm, "--personal", stdin=text)
    measured = promptfed(
        "eval", workspace / "out", workspace / "test.csv", *fm, "--client", "site0", "--personal", "--json"
    )

    assert set(json.loads(own.stdout)["proba"]) == {"negative", "positive"}
    assert (nobody.returncode, "needs --client" in nobody.stderr) == (2, True)
    assert json.loads(measured.stdout)["n"] == 24


def test_transfer_measures_a_prompt_at_another_model(workspace: Path, tmp_path: Path) -> None:
    prompt, data, other = workspace / "out" / "prompt.json", workspace / "test.csv", ("--fm", "scripted:other")

    done = promptfed("transfer", prompt, data, *other, "--json")
    shown = promptfed("transfer", workspace / "out", data, *other, "--from", "scripted:another")
    unknown = promptfed("transfer", prompt, data, *other, "--from", "magic:8")
    moved = json.loads(prompt.read_text())
    moved["about"]["fm"] = "vllm:gone@123"
    (tmp_path / "prompt.json").write_text(json.dumps(moved))
    alone = promptfed("transfer", tmp_path / "prompt.json", data, *other, "--json")

    body = json.loads(done.stdout)
    assert (done.returncode, body["n"], body["from"]) == (0, 24, "scripted:overlap@0")
    assert set(body["accuracy"]) == {"origin", "stored", "recalibrated"}
    # Both are the scripted rule, by another name.
    assert body["accuracy"]["stored"] == body["accuracy"]["origin"]
    assert [(d["of"], d["less"]) for d in body["differences"]] == [
        ("stored", "origin"),
        ("recalibrated", "origin"),
        ("recalibrated", "stored"),
    ]
    assert "recalibrated without labels" in " ".join(shown.stdout.split())
    assert "other weights" in " ".join(shown.stderr.split())
    assert unknown.returncode == 2
    assert set(json.loads(alone.stdout)["accuracy"]) == {"stored", "recalibrated"}
    assert "not measured at vllm:gone@123" in json.loads(alone.stdout)["note"]


def test_a_soft_prompt_is_not_transferred(workspace: Path, tmp_path: Path) -> None:
    words = ("negative", "positive")
    soft = PromptTemplate(text="{text} is", words=words, soft=soft_prompt(np.ones((2, 4))))
    made = PromptSet(labels=words, prompts=(soft,), weights=(1.0,), bias=(0.0, 0.0))
    made.save(tmp_path / "prompt.json", about={"fm": "embedded:x@1"})

    done = promptfed("transfer", tmp_path / "prompt.json", workspace / "test.csv", "--fm", "scripted:overlap")

    assert done.returncode == 2
    assert "belong to the embeddings of the model" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("budget.max_fm_call=3", "did you mean 'max_fm_calls'"),
        ("method.name=rase", "did you mean 'race'"),
        ("budget.max_fm_calls=10", "too small"),
        ("data.text_column=body", "no column 'body'"),
        ("data.train=nowhere.csv", "no such file"),
        ("fm.scorer=magic:8", "unknown FM kind 'magic'"),
        ("data.public=test.csv.gz", "no such file"),
        ("rounds.quorum=0", "greater than 0"),
        ("rounds.deadline=3", "did you mean 'deadline_s'"),
    ],
)
def test_user_errors_exit_with_2_and_words(workspace: Path, tmp_path: Path, change: str, says: str) -> None:
    done = promptfed("run", workspace / "run.toml", "--out", tmp_path / "o", "--set", change)

    assert done.returncode == 2, done.stderr
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"client,text,label,text\nsite0,a secret,positive,a secret\n", "2 columns"),
        ("client,text,label\nsite0,a secret caf\u00e9,positive\n".encode("latin-1"), "UTF-8"),
        (b"client,text,label\nsite0,a secret,positive\n", "one label only"),
    ],
    ids=["empty", "duplicated header", "not UTF-8", "one label"],
)
def test_bad_files_exit_with_2_and_without_their_text(
    workspace: Path, tmp_path: Path, content: bytes, says: str
) -> None:
    (tmp_path / "bad.csv").write_bytes(content)

    done = promptfed("run", workspace / "run.toml", "--out", tmp_path / "o", "--set", f"data.train={tmp_path}/bad.csv")

    assert done.returncode == 2, done.stderr
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


def test_a_model_that_does_not_answer_exits_with_3_and_says_how_to_start_one(workspace: Path, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        scorer = f"fm.scorer=openai:http://127.0.0.1:{nobody.getsockname()[1]}/v1#m"
        done = promptfed("run", workspace / "run.toml", "--out", tmp_path / "o", "--set", scorer)

    assert done.returncode == 3, done.stderr
    assert "promptfed serve" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cache_is_filled_by_a_run_looked_at_and_purged(workspace: Path, tmp_path: Path) -> None:
    cache = tmp_path / "answers.sqlite"
    setting = ("--set", f'fm.cache="{cache}"')
    first = promptfed("run", workspace / "run.toml", "--out", tmp_path / "a", *setting, "--json")
    again = promptfed("run", workspace / "run.toml", "--out", tmp_path / "b", *setting, "--json")
    spent = [json.loads(done.stdout)["ledger"]["tuning"] for done in (first, again)]

    stats = json.loads(promptfed("cache", "stats", cache, "--json").stdout)
    purged = promptfed("cache", "purge", cache)

    assert spent[0]["fm_calls"] == spent[1]["fm_calls"]
    assert (spent[0]["prompt_tokens"] > 0, spent[1]["prompt_tokens"]) == (True, 0)
    assert list(stats["answers"]) == ["scripted:overlap@0"]
    assert purged.stdout.strip().startswith(f"{stats['answers']['scripted:overlap@0']} answers removed")
    assert json.loads(promptfed("cache", "stats", cache, "--json").stdout)["answers"] == {}


def test_a_file_that_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")

    done = promptfed("cache", "purge", notes)

    assert (done.returncode, notes.read_text()) == (2, "mine")
    assert "no promptfed cache" in done.stderr


def test_money_without_prices_is_refused_before_anything_is_asked(tmp_path: Path, workspace: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text("date = 2026-01-01\n[models.other]\nprompt = 1.0\ncompletion = 1.0\n")

    done = promptfed("run", workspace / "run.toml", "--out", tmp_path / "o", "--set", f'fm.prices="{prices}"')

    assert done.returncode == 2
    assert "has no price of overlap; it has other" in done.stderr
    assert not (tmp_path / "o").exists()


def test_serving_by_vllm_without_vllm_says_what_to_do(tmp_path: Path) -> None:
    done = promptfed("serve", "smollm2-135m-instruct", "--python", tmp_path / "python")
    embedded = promptfed("serve", "scripted:overlap", "--soft-prompts")

    assert (done.returncode, embedded.returncode) == (2, 2)
    assert "make vllm-cpu" in done.stderr
    assert "served without vLLM" in embedded.stderr


def test_doctor_finds_the_scripted_fm(workspace: Path) -> None:
    done = promptfed("doctor", "--fm", "scripted:overlap", "--json")
    broken = promptfed("doctor", "--fm", "magic:8", "--json")

    assert done.returncode == 0, done.stderr
    assert all(check["ok"] for check in json.loads(done.stdout))
    assert broken.returncode == 3
    assert [c["check"] for c in json.loads(broken.stdout) if not c["ok"]] == ["FM magic:8"]


def test_every_error_class_has_an_exit_code() -> None:
    def tree(kind: type[PromptfedError]) -> list[type[PromptfedError]]:
        return [kind, *(k for sub in kind.__subclasses__() for k in tree(sub))]

    codes = {kind.__name__: kind.exit_code for kind in tree(PromptfedError)}

    assert {codes[n] for n in ("UserError", "ConfigError", "DataError", "UnknownNameError", "CapabilityError")} == {2}
    assert {codes[n] for n in ("RunError", "FMError", "BudgetError", "WireError")} == {3}


def test_an_index_is_made_searched_and_changed(tmp_path: Path) -> None:
    (tmp_path / "docs.csv").write_text("id,text\nleave,Staff have thirty days of leave.\nfire,Use the stairs.\n")
    index = ["--encoder", "static:all-minilm-l6-v2"]

    added = promptfed("index", "add", tmp_path / "index", tmp_path / "docs.csv", "--json", *index)
    again = promptfed("index", "add", tmp_path / "index", tmp_path / "docs.csv", *index)
    found = promptfed("index", "search", tmp_path / "index", "how many days of leave?", "-k", "1", "--json", *index)
    shown = promptfed("index", "search", tmp_path / "index", "stairs", "--mode", "lexical", *index)
    deleted = promptfed("index", "delete", tmp_path / "index", "leave", "nobody", *index)
    info = promptfed("index", "info", tmp_path / "index", "--json", *index)

    assert json.loads(added.stdout) == {
        "new": 2, "replaced": 0, "unchanged": 0, "empty": 0, "removed": 0, "documents": 2, "passages": 2
    }  # fmt: skip
    assert "2 unchanged" in again.stdout
    assert json.loads(found.stdout)["doc_id"] == "leave"
    assert "Use the stairs." in shown.stdout
    assert "1 deleted" in deleted.stdout
    assert "not there: nobody" in deleted.stderr
    assert json.loads(info.stdout) == {
        "documents": 1, "passages": 1, "kind": "flat", "encoder": "static:all-minilm-l6-v2"
    }  # fmt: skip


def test_a_row_that_lost_its_text_takes_its_document_out_and_says_so(tmp_path: Path) -> None:
    index, docs = ("--encoder", "static:all-minilm-l6-v2"), tmp_path / "docs.csv"
    docs.write_text("id,text\nleave,Staff have thirty days.\nfire,Use the stairs.\n")
    promptfed("index", "add", tmp_path / "index", docs, *index)
    docs.write_text("id,text\nleave,\nfire,Use the stairs.\nnew,\n")

    done = promptfed("index", "add", tmp_path / "index", docs, *index)

    assert "2 empty and left out (1 of them had a text before, and are gone)" in done.stdout
    assert "has 1 documents" in done.stdout


def test_a_passage_is_shown_as_text_and_not_obeyed(tmp_path: Path) -> None:
    """Neither as markup nor by the terminal."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "evil.txt").write_text("a [/b] and [red]colour \x1b[2J\x1b]0;owned\x07 end")
    index = ["--encoder", "static:all-minilm-l6-v2"]
    promptfed("index", "add", tmp_path / "index", tmp_path / "docs", *index)

    shown = promptfed("index", "search", tmp_path / "index", "colour", *index)

    assert shown.returncode == 0
    assert "a [/b] and [red]colour" in shown.stdout
    assert "\x1b]" not in shown.stdout
    assert "\x1b[2J" not in shown.stdout


def test_an_unknown_merge_is_told_before_anybody_is_waited_for(tmp_path: Path) -> None:
    server = tmp_path / "server.toml"
    server.write_text('[task]\nlabels = ["no", "yes"]\n[network]\nclients = ["site0"]\ninsecure = true\n')

    done = promptfed("search", server, "x", "--merge", "ranks")

    assert done.returncode == 2
    assert "unknown merge 'ranks'" in done.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["index", "search", "{folder}/none", "x"], "no index; make one with promptfed index add"),
        (["index", "add", "{folder}/index", "{folder}/run.toml"], "no column 'id'"),
        (["index", "add", "{folder}/index", "{folder}/none.csv"], "no such file"),
        (["search", "{folder}/run.toml", "x"], "has no [network]"),
        (["search", "{folder}/run.toml", "x", "--mode", "lexcial"], "'lexcial' is not one of 'dense', 'lexical'"),
        (["search", "{folder}/run.toml", "x", "--send", "vectors"], "'vectors' is not one of 'text', 'vector'"),
    ],
)
def test_what_an_index_can_not_do_exits_with_2(workspace: Path, args: list[str], says: str) -> None:
    done = promptfed(*[arg.format(folder=workspace) for arg in args])

    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
