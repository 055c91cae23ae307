"""`liushui generate` as a person uses it."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.conftest import finish, make_model, start


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo\nthree\n")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_line(rows: list[dict]) -> dict[int, dict]:
    return {row["line"]: row for row in rows}


def test_a_text_file_is_answered(liushui, engine_flags, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    done = liushui("generate", prompts, "-o", out, *engine_flags, "--max-tokens", 5, "--ignore-eos")
    assert done.code == 0, done.err
    rows = read(out)
    assert sorted((row["index"], row["line"], row["prompt"]) for row in rows) == [
        (0, 1, "one"),
        (1, 3, "two"),
        (2, 4, "three"),
    ]
    for row in rows:
        assert row["completion_tokens"] == len(row["token_ids"]) == 5
        assert row["finish_reason"] == "length"
        assert row["truncated_tokens"] == 0
        assert row["timings"]["total"] > 0
    assert done.out == ""
    for words in (
        "3 rows of",
        "chat template",
        "temperature 0.0 (greedy), ignore_eos True, max_tokens 5",
        "KV cache",
        "3 rows answered",
    ):
        assert words in done.err


def test_rows_go_to_standard_output_without_o(liushui, engine_flags, prompts):
    done = liushui("generate", prompts, *engine_flags, "--max-tokens", 3, "--quiet")
    assert done.code == 0
    assert {row["prompt"] for row in done.rows} == {"one", "two", "three"}
    assert done.err == ""


def test_the_chat_template_is_used_unless_told_otherwise(liushui, engine_flags, prompts, model):
    templated = by_line(liushui("generate", prompts, *engine_flags, "--max-tokens", 1).rows)
    raw = by_line(liushui("generate", prompts, *engine_flags, "--max-tokens", 1, "--template", "none").rows)
    assert raw[1]["prompt_tokens"] == len("one")
    assert templated[1]["prompt_tokens"] == len("<user>one\n<assistant>")


def test_rows_bring_their_own_parameters_and_their_own_errors(liushui, engine_flags, tmp_path):
    lines = [
        '{"prompt": "a", "max_tokens": 2, "ignore_eos": true, "custom_id": "first"}',
        '{"prompt": "a", "temprature": 1, "custom_id": "typo"}',
        "not json",
        '{"messages": [{"role": "user", "content": "hi"}], "n": 2, "temperature": 1.0, "seed": 7}',
        '{"prompt_token_ids": [65, 66], "logprobs": 1, "prompt_logprobs": 0}',
        '{"prompt_token_ids": [99999]}',
        '{"prompt": "' + "x" * 600 + '"}',
        '{"prompt": "' + "x" * 600 + '", "truncate_prompt_tokens": 10}',
        '{"prompt": "a", "stop": 5}',
        '{"messages": [{"role": "user", "content": "a"}], "ignore_eos": true}',
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.jsonl"
    done = liushui("generate", tmp_path / "p.jsonl", "-o", out, *engine_flags, "--max-tokens", 4)
    assert done.code == 1
    rows = by_line(read(out))
    assert len(rows) == len(lines)
    assert rows[1]["custom_id"] == "first"
    assert len(rows[1]["token_ids"]) == 2
    assert "unknown key 'temprature'" in rows[2]["error"]
    assert rows[2]["custom_id"] == "typo"
    assert "not JSON" in rows[3]["error"]
    assert [answer["index"] for answer in rows[4]["outputs"]] == [0, 1]
    assert rows[4]["seed"] == 7
    assert len(rows[5]["logprobs"]) == rows[5]["completion_tokens"]
    assert len(rows[5]["prompt_logprobs"]) == 2
    assert "prompt_token_ids" in rows[6]["error"]
    assert "512" in rows[7]["error"]
    assert rows[8]["prompt_tokens"] == 10
    assert rows[8]["truncated_tokens"] > 500
    assert "stop: must be" in rows[9]["error"]
    assert rows[10]["completion_tokens"] == 4
    assert "5 rows failed" in done.err


def test_answers_do_not_depend_on_the_rest_of_the_file(liushui, engine_flags, tmp_path):
    line = '{"prompt": "the same", "temperature": 1.0, "seed": 3, "max_tokens": 12, "ignore_eos": true}\n'
    (tmp_path / "alone.jsonl").write_text(line)
    others = "".join(f'{{"prompt": "other {i}", "max_tokens": {i + 1}}}\n' for i in range(9))
    (tmp_path / "crowd.jsonl").write_text(others + line)
    alone = liushui("generate", tmp_path / "alone.jsonl", *engine_flags).rows[0]
    for policy in ("continuous", "static"):
        flags = [*engine_flags, "--policy", policy, "--max-num-seqs", 4]
        crowd = by_line(liushui("generate", tmp_path / "crowd.jsonl", *flags).rows)
        assert crowd[10]["token_ids"] == alone["token_ids"]
        assert crowd[10]["text"] == alone["text"]


def test_verbose_writes_what_was_in_force(liushui, engine_flags, prompts):
    done = liushui("generate", prompts, *engine_flags, "--max-tokens", 2, "--temperature", 1, "-v")
    row = done.rows[0]
    effective = row["effective_params"]
    assert effective["temperature"] == {"value": 1, "source": "request"}
    assert effective["seed"] == {"value": row["seed"], "source": "drawn"}
    assert effective["top_p"] == {"value": 1.0, "source": "default"}
    assert len(row["chat_template"]) == 12
    assert f"chat template {row['chat_template']} from the model" in done.err
    assert '"max_num_seqs": 64' in done.err
    assert "temperature 1.0 (command line)" in done.err
    assert "top_p 1.0 (default)" in done.err


def test_defaults_of_the_models_files(liushui, engine_flags, prompts, tmp_path):
    folder = make_model(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "top_k": 9, "max_new_tokens": 3}')
    flags = [*engine_flags, "--model", folder, "--ignore-eos", "--top-k", 0, "-v"]
    plain = liushui("generate", prompts, *flags)
    assert plain.rows[0]["effective_params"]["temperature"] == {"value": 0.0, "source": "default"}
    assert "not applied, though the model's files suggest it: temperature=0.7, top_k=9, max_tokens=3" in plain.err
    asked = liushui("generate", prompts, *flags, "--generation-config", "auto")
    effective = asked.rows[0]["effective_params"]
    assert effective["temperature"] == {"value": 0.7, "source": "generation_config"}
    assert effective["top_k"] == {"value": 0, "source": "request"}
    assert effective["max_tokens"] == {"value": 3, "source": "generation_config"}
    assert asked.rows[0]["completion_tokens"] == 3
    assert "parameters: temperature 0.7 (generation_config), ignore_eos True, max_tokens 3 (gener" in asked.err


def test_extras_are_saved(liushui, engine_flags, prompts, tmp_path):
    picture, report = tmp_path / "t.png", tmp_path / "r.json"
    done = liushui("generate", prompts, *engine_flags, "--timeline", picture, "--json-report", report)
    assert done.code == 0, done.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    summary = json.loads(report.read_text())
    assert summary["summary"]["requests"] == 3
    assert summary["sampling"]["max_tokens"] == 256


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["no-such-file.txt"], "there is no file no-such-file.txt"),
        (["."], "is a folder"),
        (["PROMPTS", "--top-p", "7"], "--top-p: must be in"),
        (["PROMPTS", "--top-p", "x"], "--top-p"),
        (["PROMPTS", "--policy", "best"], "--policy"),
        (["PROMPTS", "--block-size", "17"], "--block-size: must be a power of two"),
        (["PROMPTS", "--no-such-flag"], "--no-such-flag"),
        (["PROMPTS", "--model", "/no/such/folder"], "/no/such/folder"),
        (["PROMPTS", "-o", "/no/such/folder/out"], "does not exist"),
        (["PROMPTS", "--timeline", "/no/such/folder/t.png"], "does not exist"),
        (["PROMPTS", "--timeline", "t.txt"], "must end in"),
        ([], "PROMPTS"),
    ],
)
def test_a_mistake_is_a_message_and_no_trace(liushui, prompts, args, words):
    done = liushui("generate", *[prompts if arg == "PROMPTS" else arg for arg in args])
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_an_empty_file_is_a_mistake(liushui, tmp_path):
    (tmp_path / "p.txt").write_text("\n \n")
    done = liushui("generate", tmp_path / "p.txt")
    assert done.code == 2
    assert "no prompts" in done.err


def test_an_unknown_architecture_is_refused_with_the_known_ones(liushui, prompts, tmp_path):
    folder = make_model(tmp_path / "odd", architecture="OddForCausalLM")
    done = liushui("generate", prompts, "--model", folder)
    assert done.code == 2
    assert "OddForCausalLM" in done.err
    assert "LlamaForCausalLM" in done.err


def test_a_model_without_a_template_takes_prompts_as_they_are_and_refuses_messages(liushui, tmp_path, prompts):
    folder = make_model(tmp_path / "plain", template=None)
    (tmp_path / "p.jsonl").write_text('{"prompt": "abc"}\n{"messages": [{"role": "user", "content": "a"}]}\n')
    flags = ["--model", folder, "--kv-cache-gib", "0.01", "--max-tokens", 2]
    done = liushui("generate", tmp_path / "p.jsonl", *flags)
    rows = by_line(done.rows)
    assert done.code == 1
    assert rows[1]["prompt_tokens"] == 3
    assert "template" in rows[2]["error"]
    assert "the model has no chat template" in done.err


def test_an_existing_output_is_not_touched(liushui, engine_flags, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    done = liushui("generate", prompts, "-o", out, *engine_flags)
    assert done.code == 2
    assert "--overwrite" in done.err
    assert out.read_text() == "precious"
    assert liushui("generate", prompts, "-o", out, "--overwrite", "--model", "/no/model").code == 2
    assert out.read_text() == "precious"
    assert liushui("generate", prompts, "-o", out, "--overwrite", *engine_flags, "--max-tokens", 1).code == 0
    assert len(read(out)) == 3


def test_a_full_disk_is_reported(liushui, engine_flags, prompts):
    done = liushui("generate", prompts, "-o", "/dev/full", *engine_flags, "--max-tokens", 2)
    assert done.code == 1
    assert "no space left for /dev/full" in done.err
    assert "Traceback" not in done.err


def test_standard_input_is_read_as_it_comes(engine_flags):
    """The answer to a line does not wait for the next line; nor does the end, after Ctrl-C."""
    process = start("generate", "-", *engine_flags, "--max-tokens", 3)
    for prompt in ("a", "b"):
        process.stdin.write(json.dumps({"prompt": prompt}) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["prompt"] == prompt
    process.stdin.write("not json\n")
    process.stdin.flush()
    assert "not JSON" in json.loads(process.stdout.readline())["error"]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    err = process.stderr.read()
    assert "standard input (jsonl)" in err
    assert "interrupted: 3 rows are complete" in err
    assert "Traceback" not in err
    assert "Fatal" not in err


def test_standard_input_is_read_to_its_end(engine_flags):
    process = start("generate", "-", *engine_flags, "--max-num-seqs", 1, "--max-tokens", 2)
    done = finish(process, '{"prompt": "a"}\n' * 6 + '{"prompt": "the last, without an end of line"}')
    assert done.code == 0, done.err
    assert [row["line"] for row in done.rows] == [1, 2, 3, 4, 5, 6, 7]


def test_ctrl_c_keeps_the_rows_that_were_finished(engine_flags, tmp_path):
    lines = ['{"prompt": "quick", "max_tokens": 1}'] + ['{"prompt": "slow", "max_tokens": 480}'] * 40
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.jsonl"
    flags = [*engine_flags, "--max-num-seqs", 2, "--ignore-eos"]
    process = start("generate", tmp_path / "p.jsonl", "-o", out, *flags, stdin=subprocess.DEVNULL)
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    rows = read(out)
    assert done.code == 130, done.err
    assert 1 <= len(rows) < 41
    assert by_line(rows)[1]["finish_reason"] == "length"
    assert f"interrupted: {len(rows)} rows are complete" in done.err
    assert "Traceback" not in done.err


def test_a_reader_that_goes_away_ends_the_run(engine_flags, tmp_path):
    (tmp_path / "p.txt").write_text("a line\n" * 300)
    process = start("generate", tmp_path / "p.txt", *engine_flags, "--max-tokens", 8, stdin=subprocess.DEVNULL)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 1
    err = process.stderr.read()
    assert "went away" in err
    assert "Traceback" not in err
