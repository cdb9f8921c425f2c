"""`adapter run`: the text of the model, as it comes, and beside that of others."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from adapterkit.cli.main import main
from adapterkit.cli.output import readable, side_by_side
from adapterkit.hub import load

pytestmark = pytest.mark.filterwarnings("ignore::adapterkit.registry.errors.AdapterWarning")
PROMPT = "the west and north"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def tone(fixtures: Path) -> Path:
    return fixtures / "cases/llama.dora/adapter"


@pytest.fixture
def asked(run):
    """The text that `adapter run SOURCES... --base BASE` writes after PROMPT, 12 tokens of it."""

    def asked(*arguments: object, prompt: str = PROMPT, code: int = 0) -> str:
        done = run("run", *arguments, "--prompt", prompt, "--max-new-tokens", 12, code=code)
        return done.stderr if code else done.stdout

    return asked


def copied(source: Path, folder: Path, **files: object) -> Path:
    """The folder; files: replaced or added, `tokenizer_json={...}`; None leaves one out."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copyfile(file, folder / file.name)
    for name, content in files.items():
        place = folder / ".".join(name.rsplit("_", 1))
        if content is None:
            place.unlink()
        else:
            place.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def expected(base: Path, adapters: dict[Path, float], prompt: str = PROMPT, **settings) -> str:
    """The same by transformers' own means."""
    ids = generated(base, adapters, prompt, **settings)
    return AutoTokenizer.from_pretrained(base).decode(ids, skip_special_tokens=True)


def generated(
    base: Path, adapters: dict[Path, float], prompt: str = PROMPT, **settings
) -> list[int]:
    model = load(base, adapters, **settings)
    inputs = AutoTokenizer.from_pretrained(base)(prompt, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return made[start:].tolist()


@pytest.mark.parametrize("quantization", [None, "none", "nf4", "int8"])
def test_the_text_is_that_of_generate(asked, llama, sql, quantization):
    more = ("--quantization", quantization) if quantization else ()
    found = asked(sql, "--base", llama, *more)
    assert found == expected(llama, {sql: 1}, quantization=quantization) + "\n"
    assert found != expected(llama, {}, quantization=quantization) + "\n"


def test_adapters_are_added_with_their_weights(asked, llama, sql, tone):
    found = asked(f"{sql}=0.7", f"{tone}=-0.3", "--base", llama)
    assert found == expected(llama, {sql: 0.7, tone: -0.3}) + "\n"


def test_an_encoder_decoder_writes_what_its_decoder_makes(asked, fixtures):
    base, adapter = fixtures / "bases/t5", fixtures / "cases/t5.lora/adapter"
    assert asked(adapter, "--base", base) == expected(base, {adapter: 1}) + "\n"


@pytest.mark.parametrize("name", ["llama_prefix1", "llama_prompt1"])
def test_what_stands_in_front_of_the_prompt_is_there(asked, fixtures, llama, name):
    adapter = fixtures / "adapters" / name
    found = asked(adapter, "--base", llama)
    assert found == expected(llama, {adapter: 1}) + "\n" != expected(llama, {}) + "\n"


def test_a_recipe_is_run_like_one_adapter(run, asked, llama, sql, tone):
    for name, folder in (("sql", sql), ("tone", tone)):
        run("add", folder, name, "--base", llama)
    run("blend", "sql=0.7", "tone=-0.3", "--as", "recipe", "-o", "mix")
    assert asked("mix=0.5", "--base", llama) == asked("sql=0.35", "tone=-0.15", "--base", llama)


class Recorder(io.StringIO):
    """Remembers every write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


def test_the_text_is_written_piece_by_piece(asked, llama, sql):
    arguments = ["--prompt", PROMPT, "--max-new-tokens", "12"]
    with contextlib.redirect_stdout(Recorder()) as output:
        main(["run", str(sql), "--base", str(llama), *arguments], standalone_mode=False)
    assert output.getvalue() == asked(sql, "--base", llama)
    assert len([piece for piece in output.writes if piece.strip()]) > 6


def test_json_says_what_was_asked_and_what_came(run_json, llama, sql, asked):
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 12)
    found = run_json("run", f"{sql}=0.5", "--base", llama, *arguments)
    assert list(found) == ["prompt", "prompt_tokens", "chat", "tokenizer", "settings", "outputs"]
    assert found["prompt"] == PROMPT and found["chat"] is False
    assert found["settings"] == {
        "max_new_tokens": 12, "temperature": 0.0, "top_p": None, "top_k": None, "seed": 0,
    }  # fmt: skip
    (output,) = found["outputs"]
    assert output == {
        "label": f"0.5 {sql}", "weights": {str(sql): 0.5}, "tokens": 12, "end": "length",
        "text": asked(f"{sql}=0.5", "--base", llama).removesuffix("\n"),
    }  # fmt: skip


def test_compare_shows_the_base_each_adapter_and_all(run_json, llama, sql, tone):
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 12, "--compare")
    found = run_json("run", sql, f"{tone}=-0.3", "--base", llama, *arguments)["outputs"]
    shown = [(row["label"], row["text"]) for row in found]
    assert shown == [
        ("base", expected(llama, {})),
        (str(sql), expected(llama, {sql: 1})),
        (f"-0.3 {tone}", expected(llama, {tone: -0.3})),
        (f"{sql} + -0.3 {tone}", expected(llama, {sql: 1, tone: -0.3})),
    ]
    alone = run_json("run", sql, "--base", llama, *arguments)["outputs"]
    assert [row["label"] for row in alone] == ["base", str(sql)]


def test_each_text_that_is_compared_has_a_cache_of_its_own(run_json, fixtures, llama, sql):
    prefix, prompt = fixtures / "adapters/llama_prefix1", fixtures / "adapters/llama_prompt1"
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 12, "--compare")
    found = run_json("run", prefix, prompt, sql, "--base", llama, *arguments)["outputs"]
    sets = [{}, {prefix: 1}, {prompt: 1}, {sql: 1}, {prefix: 1, prompt: 1, sql: 1}]
    assert [row["text"] for row in found] == [expected(llama, each) for each in sets]


@pytest.mark.parametrize(("width", "columns"), [(90, True), (60, False)])
def test_what_is_compared_fits_the_terminal(run, llama, sql, tone, monkeypatch, width, columns):
    monkeypatch.setenv("COLUMNS", str(width))
    for name, folder in (("sql", sql), ("tone", tone)):
        run("add", folder, name, "--base", llama)
    arguments = ("--prompt", PROMPT, "--compare", "--max-new-tokens", "30")
    found = run("run", "sql", "tone=0.5", "--base", llama, *arguments).stdout
    lines = found.splitlines()
    assert [line == line.rstrip() for line in lines] == [True] * len(lines)
    assert max(map(len, lines)) <= width
    if columns:
        assert re.split(r" {2,}", lines[0]) == ["base", "sql", "0.5 tone", "sql + 0.5 tone"]
    else:
        titles = [lines[0], *(after for line, after in pairwise(lines) if not line)]
        assert titles == ["base", "sql", "0.5 tone", "sql + 0.5 tone"]


def test_columns_keep_every_word_and_break_between_them(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    side_by_side(["one", "[red]two"], ["a long text " * 8, "x\tend\n\n  deep \x1b[31m"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60 and lines[0].split() == ["one", "[red]two"]
    start = lines[0].index("[")
    assert " ".join(line[:start].strip() for line in lines[1:]).split() == ["a", "long", "text"] * 8
    assert [line[start:] for line in lines[1:4]] == ["x   end", "", "  deep \\x1b[31m"]


def test_nothing_written_drives_a_terminal():
    assert readable("a\x1b[2J\r\x9b\tb\nc") == "a\\x1b[2J\\r\\x9b\tb\nc"
    assert readable("👩\u200d💻 می\u200cخواهم") == "👩\u200d💻 می\u200cخواهم"


def test_what_is_drawn_follows_the_seed(asked, llama, sql):
    drawn = [asked(sql, "--base", llama, "--temperature", 1.5, "--seed", n) for n in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = asked(sql, "--base", llama)
    assert asked(sql, "--base", llama, "--temperature", 1.5, "--top-k", 1) == greedy
    assert asked(sql, "--base", llama, "--temperature", 1, "--top-p", 1e-6) == greedy
    before = torch.random.get_rng_state()
    asked(sql, "--base", llama, "--temperature", 1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_settings_of_the_base_hold_unless_they_would_not_do(run, asked, llama, sql, tmp_path):
    """Beams and a static cache would break the stream and prefixes; a penalty is the base's."""
    own = {"num_beams": 4, "cache_implementation": "static", "max_length": 20, "eos_token_id": 2}
    own |= {"do_sample": True, "temperature": 0.6}
    base = copied(llama, tmp_path / "beams", generation_config_json=own)
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 12)
    done = run("-q", "run", sql, "--base", base, *arguments)
    assert done.stdout == asked(sql, "--base", llama) and done.stderr == ""
    base = copied(llama, tmp_path / "x", generation_config_json={"repetition_penalty": 9.0})
    assert asked(sql, "--base", base) != asked(sql, "--base", llama)


def test_a_text_ends_where_the_model_or_the_adapters_tokenizer_ends_it(
    run_json, llama, sql, tmp_path
):
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 12)
    tokenizer, ids = AutoTokenizer.from_pretrained(llama), generated(llama, {sql: 1})
    third = ids[2]
    ended = copied(llama, tmp_path / "ended", generation_config_json={"eos_token_id": [2, third]})
    (output,) = run_json("run", sql, "--base", ended, *arguments)["outputs"]
    assert (output["tokens"], output["end"]) == (3, "stop")
    assert output["text"] == tokenizer.decode(ids[:3])
    own = copied(sql, tmp_path / "own")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(third)
    tokenizer.save_pretrained(own)
    (output,) = run_json("run", own, "--base", llama, *arguments)["outputs"]
    assert (output["tokens"], output["end"]) == (3, "stop")


@pytest.mark.parametrize("name", ["gpt2.lora_c_attn", "gpt2.prefix_li_liang_deep"])
def test_a_text_ends_where_the_model_has_no_more_positions(run, fixtures, name):
    base, adapter = fixtures / "bases/gpt2", fixtures / "cases" / name / "adapter"
    arguments = ("run", adapter, "--base", base, "--prompt", PROMPT)
    done = run(*arguments, "--json")
    found = json.loads(done.stdout)
    (output,) = found["outputs"]
    room = 64 - found["prompt_tokens"]
    assert output["end"] == "full"
    assert output["tokens"] == room if "lora" in name else 0 < output["tokens"] < room
    assert "no more positions" in done.stderr
    long = run("run", adapter, "--base", base, "--prompt", "a " * 80, code=2).stderr
    assert "the prompt has " in long and "64 positions" in long


def test_a_prompt_is_read_from_a_file_or_from_stdin(run, asked, llama, sql, tmp_path):
    from click.testing import CliRunner

    wanted, file = asked(sql, "--base", llama), tmp_path / "prompt.txt"
    file.write_bytes(f"{PROMPT}\r\n".encode())
    arguments = ["run", str(sql), "--base", str(llama), "--max-new-tokens", "12"]
    assert run(*arguments, "--prompt-file", file).stdout == wanted
    done = CliRunner().invoke(main, [*arguments, "--prompt", "-"], input=f"{PROMPT}\n")
    assert done.stdout == wanted
    file.write_bytes(b"\xff")
    assert "no UTF-8" in run(*arguments, "--prompt-file", file, code=2).stderr
    run(*arguments, "--prompt-file", tmp_path / "none", code=1)
    run(*arguments, "--prompt-file", file, "--prompt", "x", code=2)
    assert "give one prompt" in run(*arguments, code=2).stderr


def test_a_chat_template_makes_a_message_of_the_prompt(run, run_json, asked, llama, sql, tmp_path):
    base = copied(llama, tmp_path / "chat", chat_template_jinja=TEMPLATE)
    spelled = f"user {PROMPT} assistant "
    assert asked(sql, "--base", base) == expected(llama, {sql: 1}, spelled) + "\n"
    assert asked(sql, "--base", base, "--raw") == asked(sql, "--base", llama)
    found = asked(sql, "--base", base, "--system", "the key")
    assert found == expected(llama, {sql: 1}, f"system the key {spelled}") + "\n"
    assert run_json("run", sql, "--base", base, "--prompt", "x", "--max-new-tokens", 1)["chat"]
    assert "is raw" in asked(sql, "--base", base, "--raw", "--system", "x", code=2)
    assert "no chat template" in asked(sql, "--base", llama, "--system", "x", code=2)
    strict = "{{ raise_exception('roles must alternate') }}"
    base = copied(llama, tmp_path / "strict", chat_template_jinja=strict)
    assert "refuses the prompt: roles must alternate" in asked(sql, "--base", base, code=2)


def test_an_adapters_own_tokenizer_and_template_are_used_and_named(
    run, asked, llama, sql, tmp_path
):
    tokenizer = json.loads((llama / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["▁a"], vocabulary["▁b"] = vocabulary["▁b"], vocabulary["▁a"]
    own = copied(sql, tmp_path / "own", tokenizer_json=tokenizer)
    shutil.copyfile(llama / "tokenizer_config.json", own / "tokenizer_config.json")
    run("add", own, "own", "--base", llama)
    done = run("run", "own", "--base", llama, "--prompt", "a b", "--max-new-tokens", 12)
    assert "own brings its own tokenizer" in done.stderr
    assert "Tokenizer: that of own\n" in done.stderr
    assert done.stdout == asked(own, "--base", llama, prompt="a b")
    plain = asked("own", "--base", llama, "--tokenizer", llama, prompt="a b")
    assert plain == asked(sql, "--base", llama, prompt="a b") != done.stdout
    same = copied(sql, tmp_path / "same", chat_template_jinja=TEMPLATE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(llama / name, same / name)
    spelled = f"user {PROMPT} assistant "
    assert asked(same, "--base", llama) == expected(llama, {sql: 1}, spelled) + "\n"
    assert "tokenizers that differ" in asked(own, same, "--base", llama, code=6)
    bare = copied(same, tmp_path / "bare", chat_template_jinja=None)
    assert "chat templates that differ" in asked(bare, same, "--base", llama, code=6)


def test_a_base_without_a_tokenizer_takes_another(asked, fixtures, llama, sql):
    base = fixtures / "bases/llama_nf4_double"
    found = asked(sql, "--base", base, code=3)
    assert "has no tokenizer" in found and "--tokenizer" in found
    assert asked(sql, "--base", base, "--tokenizer", llama)


def test_a_tokenizer_that_is_damaged_or_not_of_this_model_is_named(asked, llama, sql, tmp_path):
    damaged = copied(llama, tmp_path / "damaged", tokenizer_json="{")
    assert "tokenizer of" in asked(sql, "--base", damaged, code=5)
    data = json.loads((llama / "tokenizer.json").read_text())
    data["model"]["vocab"]["▁a"] = 300
    larger = copied(llama, tmp_path / "larger", tokenizer_json=data)
    found = asked(sql, "--base", larger, prompt="a", code=6)
    assert "makes the token 300" in found and "256 rows" in found


def test_a_vocabulary_that_adapters_enlarge_grows_when_asked(asked, fixtures, llama, sql, tmp_path):
    from safetensors.torch import load_file, save_file

    grown = copied(sql, tmp_path / "grown")
    tensors = load_file(sql / "adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.weight"] = torch.ones(264, 64)
    save_file(tensors, grown / "adapter_model.safetensors")
    assert "vocabulary" in asked(grown, "--base", llama, code=6)
    assert asked(grown, "--base", llama, "--resize").strip() == ""  # the likeliest is token 0, pad
    assert "base alone" in asked(grown, "--base", llama, "--resize", "--compare", code=2)


@pytest.mark.parametrize(
    ("source", "base", "more", "code", "words"),
    [
        ("cases/llama.lora_qv/adapter", "gpt2", (), 6, "does not belong"),
        ("cases/bert.lora_cls/adapter", "bert", (), 6, "is for the task SEQ_CLS"),
        ("cases/bert.bitfit_all/adapter", "bert", (), 6, "BertForSequenceClassification, which"),
        ("cases/llama.other_boft/none", "llama", (), 3, "does not exist"),
        ("cases/llama.lora_qv/adapter", "nothing", (), 3, "is not the folder of a base model"),
        ("cases/llama.lora_qv/adapter=1e38", "llama", (), 1, "NaN or infinity"),
        ("cases/llama.lora_qv/adapter", "llama_int8", ("--quantization", "nf4"), 2, "in int8"),
        ("cases/llama.lora_qv/adapter", "llama", ("--device", "cuda:99"), 2, "device cuda:99"),
        ("cases/llama.lora_qv/adapter", "llama", ("--device", "meta"), 2, "device meta"),
        ("cases/llama.lora_qv/adapter", "llama", ("--temperature", "nan"), 2, "temperature is nan"),
        ("cases/llama.lora_qv/adapter", "llama", ("--top-p", "0.5"), 2, "a temperature draws"),
        ("cases/llama.lora_qv/adapter", "llama", ("--seed", "-1"), 2, "seed is -1"),
        ("cases/llama.lora_qv/adapter", "llama", ("--strict",), 6, "base-not-recorded"),
        ("cases/llama.ptuning_v1_thudm_mlp/adapter", "llama", (), 2, "block_flag"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_said(asked, fixtures, source, base, more, code, words):
    assert words in asked(fixtures / source, "--base", fixtures / "bases" / base, *more, code=code)


def test_a_prompt_of_nothing_is_refused(asked, llama, sql):
    assert "has no tokens" in asked(sql, "--base", llama, prompt="", code=2)


def test_nothing_but_the_text_is_printed_when_quiet(run, llama, sql):
    """The bars of transformers are for terminals, warnings are not for those who want none."""
    done = run("-q", "run", sql, "--base", llama, "--prompt", PROMPT, "--max-new-tokens", 2)
    assert done.stderr == "" and done.stdout
    detailed = run("-v", "run", sql, "--base", llama, "--prompt", "x", "--max-new-tokens", 1)
    assert "Note: " in detailed.stderr and "1 token, all" in detailed.stderr
