import csv
import json
from collections.abc import Iterator

import pytest

from comeba_ext.data import place_of, read_requests, read_texts
from comeba_ext.errors import RequestError, StorageError
from comeba_ext.text.request import EditRequest, as_requests

OWN = {"prompt": "{} speaks", "subject": "Ann", "target_new": "Latin", "request_id": "a"}
EASYEDIT = {
    "case_id": 7,
    "prompt": "The mother tongue of Ann is",
    "subject": "Ann",
    "target_new": "Latin",
    "ground_truth": "French",
    "rephrase_prompt": "Ann speaks",
    "locality_prompt": "Bob speaks",
    "locality_ground_truth": "Greek",
}
COUNTERFACT = {
    "case_id": 8,
    "requested_rewrite": {
        "prompt": "{} is in",
        "subject": "Oslo",
        "target_new": {"str": "Peru"},
        "target_true": {"str": "Norway"},
    },
    "paraphrase_prompts": ["Where is Oslo? In"],
    "neighborhood_prompts": ["Bergen is in", "Narvik is in"],
}
ZSRE = {
    "subject": "Ann",
    "src": "What does Ann speak?",
    "rephrase": "Which tongue has Ann?",
    "alt": "Latin",
    "answers": ["French"],
    "loc": "nq question: who",
    "loc_ans": "me",
    "portability": {"New Question": "What do Ann's texts use?", "New Answer": "the Latin script"},
}
UNUSABLE = {"prompt": "no subject here", "subject": "Ann", "target_new": "x"}


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def lines(records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def texts(path) -> list[str]:
    return list(read_texts(path))


# ---------------------------------------------------------------- records


def test_every_record_form_is_mapped(tmp_path):
    path = write(tmp_path / "all.json", json.dumps([OWN, EASYEDIT, COUNTERFACT, ZSRE]))
    own, easyedit, counterfact, zsre = read_requests(path).requests
    assert (own.text, own.target_new, own.request_id) == ("Ann speaks", "Latin", "a")
    assert easyedit.prompt == "The mother tongue of {} is"
    assert easyedit.rephrase_prompts == ("Ann speaks",)
    assert easyedit.locality_prompts == (("Bob speaks", "Greek"),)
    assert easyedit.request_id == "7"
    assert (counterfact.target_new, counterfact.ground_truth) == ("Peru", "Norway")
    assert counterfact.locality_prompts == (("Bergen is in", "Norway"), ("Narvik is in", "Norway"))
    assert zsre.prompt == "What does {} speak?"
    assert zsre.portability_prompts == (("What do Ann's texts use?", "the Latin script"),)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps([OWN, EASYEDIT])),
        ("a.json", json.dumps({"version": 1, "records": [OWN, EASYEDIT]}, indent=1)),
        ("a.jsonl", lines([OWN, EASYEDIT])),
        ("a.jsonl", "\n" + json.dumps(OWN) + "\r\n\n   \n" + json.dumps(EASYEDIT)),
        ("a.json", lines([OWN, EASYEDIT])),  # JSONL under another name
        ("a.json", "\ufeff" + json.dumps([OWN, EASYEDIT])),
    ],
    ids=["list", "object", "jsonl", "jsonl-blank-lines", "jsonl-named-json", "byte-order-mark"],
)
def test_containers(tmp_path, name, text):
    result = read_requests(write(tmp_path / name, text))
    assert [request.target_new for request in result.requests] == ["Latin", "Latin"]
    assert [request.request_id for request in result.requests] == ["a", "7"]
    assert (result.read, result.skipped) == (2, [])


def test_lone_record_is_not_mistaken_for_a_container(tmp_path):
    path = write(tmp_path / "one.json", json.dumps({**OWN, "rephrase_prompts": ["Ann says"]}))
    result = read_requests(path)
    assert [request.rephrase_prompts for request in result.requests] == [("Ann says",)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_unusable_records_are_counted_with_index_and_reason(tmp_path, suffix):
    broken = [UNUSABLE, 5, {"prompt": "Ann", "subject": "Ann"}]
    broken += [{**OWN, "rephrase_prompts": 5}, {**OWN, "target_new": " "}]
    records = [OWN, *broken, ZSRE]
    text = json.dumps(records) if suffix == ".json" else lines(records)
    result = read_requests(write(tmp_path / f"a{suffix}", text))
    assert result.read == 7
    assert len(result.requests) == 2
    assert [entry["index"] for entry in result.skipped] == [1, 2, 3, 4, 5]
    reasons = [entry["reason"] for entry in result.skipped]
    assert "subject 'Ann' is not in the prompt" in reasons[0]
    assert "int" in reasons[1]
    assert "target_new" in reasons[2]
    assert all(reasons) and not any("record" in reason for reason in reasons)  # where it stands is said once
    if suffix == ".json":
        assert place_of(result.skipped[0]) == "record 2" and "line" not in result.skipped[0]
    else:
        assert place_of(result.skipped[0]) == "record 2 (line 2)"


def test_limit_counts_records_read_not_kept(tmp_path):
    records = [UNUSABLE, OWN, UNUSABLE, EASYEDIT]
    for name, text in (("a.json", json.dumps(records)), ("a.jsonl", lines(records))):
        result = read_requests(write(tmp_path / name, text), limit=3)
        assert result.read == 3
        assert [request.request_id for request in result.requests] == ["a"]
        assert [entry["index"] for entry in result.skipped] == [0, 2]
    assert read_requests(tmp_path / "a.json", limit=100).read == 4
    with pytest.raises(ValueError, match="limit"):
        read_requests(tmp_path / "a.json", limit=0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", json.dumps([OWN, EASYEDIT])[:-20], "line 1.*truncated"),
        ("a.json", json.dumps([OWN, EASYEDIT], indent=1)[:-20], "not valid JSON.*truncated"),
        ("a.jsonl", lines([OWN, OWN]) + "\n" + json.dumps(EASYEDIT)[:-9], "line 4"),
        ("a.json", lines([OWN, EASYEDIT])[:-9], "line 2"),
        ("a.json", "", "no records"),
        ("a.jsonl", "\n \n", "no records"),
        ("a.json", "[]", "no records"),
        ("a.json", '{"records": []}', "no records"),
        ("a.json", '{"a": [], "b": []}', "2 lists"),
        ("a.json", '{"a": 1}', "0 lists"),
        ("a.json", "3", "int"),
    ],
)
def test_broken_record_files_name_path_and_place(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(StorageError, match=message) as error:
        read_requests(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("name", "comma"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t"), ("a.CSV", "\t")])
def test_tables_of_facts(tmp_path, name, comma):
    with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file, delimiter=comma)
        rows.writerow(["prompt", " subject", "target_new", "ground_truth", "rephrase_prompts", "locality_prompts", "request_id", ""])
        rows.writerow(["{} speaks", "Ann", "Latin", "French", "{} says | Who is, {}; speaking?", "Bob speaks", "a", ""])
        rows.writerow(["{} was\nborn in", "Ann", "1901"])
        rows.writerow([])
        rows.writerow(["", "", ""])
        rows.writerow(["{} is", "Bob"])
        rows.writerow(["{} is", "Bob", "a", "", "", "", "", "", "b"])
        rows.writerow(["{} writes", "x" * 140_000, "Greek"])
    read = read_requests(tmp_path / name)
    first = EditRequest(
        "{} speaks", "Ann", "Latin", "French", ("Ann says", "Who is, Ann; speaking?"), (("Bob speaks", None),), request_id="a"
    )
    assert read.requests[0] == first and read.requests[1] == EditRequest("{} was\nborn in", "Ann", "1901")
    assert len(read.requests[2].subject) == 140_000 and read.read == 5
    assert [(place_of(skip), skip["index"]) for skip in read.skipped] == [("record 3 (line 7)", 2), ("record 4 (line 8)", 3)]
    assert "'target_new'" in read.skipped[0]["reason"] and "9 cells under 8 columns" in read.skipped[1]["reason"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no column 'prompt', 'subject', 'target_new' in the first line, which has .*'a', 'b'.*ground_truth"),
        ("prompt,subject,target\n{} is,Ann,x\n", "no column 'target_new'"),
        ("prompt,subject,target_new,wordings,wordings\n", "'wordings' is there twice"),
        ("prompt,subject,target_new,questions\n", "'questions' holds more than texts.*JSON"),
        ('prompt,subject,target_new\n"{} is,Ann,x\n', "line 2 is not valid CSV"),
        ("prompt,subject,target_new\n", "holds no records"),
        ("", "holds no records"),
    ],
)
def test_tables_without_facts(tmp_path, text, message):
    with pytest.raises(StorageError, match=message) as error:
        read_requests(write(tmp_path / "a.csv", text))
    assert str(tmp_path / "a.csv") in str(error.value)


def test_unknown_columns_are_said(tmp_path, caplog):
    read_requests(write(tmp_path / "a.csv", "prompt,subject,target_new,rephrase\n{} is,Ann,x,{} was\n{} is,Bob,y,\n"))
    assert "'rephrase' (1 record) is unknown and not read; is 'rephrase_prompt" in caplog.text


def test_missing_folder_and_binary_paths(tmp_path):
    with pytest.raises(StorageError, match="missing.json: no such file"):
        read_requests(tmp_path / "missing.json")
    with pytest.raises(StorageError, match="folder"):
        read_requests(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'[{"prompt": "\xe9"}]')
    with pytest.raises(StorageError, match="latin.json: not UTF-8"):
        read_requests(tmp_path / "latin.json")


# ---------------------------------------------------------------- texts


def test_txt_paragraphs_or_lines(tmp_path):
    assert texts(write(tmp_path / "p.txt", "\ufeff\n\none\ntwo\n \n\nthree\n")) == ["one\ntwo", "three"]
    assert texts(write(tmp_path / "l.txt", "\none\ntwo\n\n \n")) == ["one", "two"]  # outer blank lines separate nothing


def test_csv_needs_a_text_column_and_takes_long_and_multiline_fields(tmp_path):
    long = "word " * 40_000  # longer than the csv module's default limit of 131,072 characters
    limit = csv.field_size_limit()
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "text"], [1, 'two\n\nlines, "quoted"'], [2, "  "], [3, long]])
    assert texts(tmp_path / "a.csv") == ['two\n\nlines, "quoted"', long.strip()]
    assert csv.field_size_limit() == limit
    with pytest.raises(StorageError, match="b.csv: no 'text' column among \\['id', 'body'\\]"):
        texts(write(tmp_path / "b.csv", "id,body\n1,x\n"))
    with pytest.raises(StorageError, match="c.csv: line 3 has no 'text'"):
        texts(write(tmp_path / "c.csv", "id,text\n1,x\n2\n"))
    with pytest.raises(StorageError, match="d.csv: line 3 is not valid CSV"):
        texts(write(tmp_path / "d.csv", 'id,text\n1,x\n2,"cut off'))


def test_jsonl_texts(tmp_path):
    assert texts(write(tmp_path / "a.jsonl", '{"text": "one"}\n\n{"text": "two", "id": 1}\n')) == ["one", "two"]
    tails = (('{"body": "x"}', "line 2 has no 'text'"), ("[1]", "line 2 has no 'text'"), ('{"te', "line 2 is not"))
    for tail, message in tails:
        with pytest.raises(StorageError, match=message):
            texts(write(tmp_path / "b.jsonl", '{"text": "one"}\n' + tail))


def test_folder_is_read_in_name_order(tmp_path):
    write(tmp_path / "c.txt", "last")
    write(tmp_path / "a.jsonl", '{"text": "first"}')
    write(tmp_path / "b.csv", "text\nsecond")
    write(tmp_path / "README.md", "not a text")
    assert texts(tmp_path) == ["first", "second", "last"]


def test_unreadable_text_sources(tmp_path):
    for path, message in (
        (tmp_path / "none.txt", "no such file"),
        (write(tmp_path / "a.pdf", "x"), ".pdf"),
        (tmp_path, "holds no .txt, .csv, .jsonl file"),
    ):
        with pytest.raises(StorageError, match=message):  # at once, before anything is read
            read_texts(path)
    with pytest.raises(StorageError, match="empty.txt: holds no text"):
        texts(write(tmp_path / "empty.txt", "\n\n"))


def test_texts_are_streamed(tmp_path):
    """The first text is there although a later line of the file is broken."""
    stream = read_texts(write(tmp_path / "a.jsonl", '{"text": "one"}\nbroken'))
    assert isinstance(stream, Iterator)
    assert next(stream) == "one"
    with pytest.raises(StorageError, match="line 2"):
        next(stream)


# ---------------------------------------------------------------- real files


@pytest.mark.parametrize(
    ("name", "count", "index", "known"),
    [
        (
            "zsre/zsre_mend_eval_portability_gpt4.json",
            1037,
            0,
            {
                "prompt": "When was the inception of {}?",
                "subject": "IAAF Combined Events Challenge",
                "target_new": "2006",
                "ground_truth": "1998",
                "rephrase_prompts": ("When was the IAAF Combined Events Challenge launched?",),
                "locality_prompts": (("nq question: what is the name of the last episode of spongebob", "The String"),),
                "portability_prompts": (
                    (
                        "What type of sports event is the IAAF Combined Events Challenge, which was established in 2006?",
                        "Athletics",
                    ),
                ),
                "request_id": None,
            },
        ),
        (
            "counterfact/counterfact-edit.json",
            10_000,
            0,
            {
                "prompt": "The mother tongue of {} is",
                "subject": "Danielle Darrieux",
                "target_new": "English",
                "ground_truth": "French",
                "rephrase_prompts": ("Where Danielle Darrieux is from, people speak the language of",),
                "locality_prompts": (("Michel Rocard is a native speaker of", "French"),),
                "portability_prompts": (),
                "request_id": "0",
            },
        ),
        (
            "counterfact/counterfact-train.json",
            10_000,
            0,
            {
                "prompt": "{}, the",
                "subject": "Toko Yasuda",
                "target_new": "piano",
                "ground_truth": "guitar",
                "rephrase_prompts": ("Toko Yasuda is incredible at",),
                "locality_prompts": (("John Lennon performs on the", "guitar"),),
                "request_id": "2",
            },
        ),
        (
            "counterfact/counterfact_500.json",
            500,
            0,
            {
                "prompt": "{} is located in",
                "subject": "Angola",
                "target_new": "Antarctica",
                "ground_truth": "Africa",
                "request_id": "20952",
            },
        ),
    ],
)
def test_real_files(shared_data, name, count, index, known):
    result = read_requests(shared_data / name)
    assert (result.read, len(result.requests), result.skipped) == (count, count, [])
    request = result.requests[index]
    assert {field: getattr(request, field) for field in known} == known
    # Filled in again, each request says what its record says.
    with (shared_data / name).open(encoding="utf-8") as file:
        for record, request in zip(json.load(file), result.requests, strict=True):
            rewrite = record.get("requested_rewrite")
            if rewrite:
                assert request.text == rewrite["prompt"].format(rewrite["subject"])
                assert len(request.rephrase_prompts) == len(record["paraphrase_prompts"]) == 2
                assert [p for p, _ in request.locality_prompts] == record["neighborhood_prompts"]
            else:
                prompt, target = ("src", "alt") if "src" in record else ("prompt", "target_new")
                assert request.text == record[prompt].rstrip()
                assert request.target_new == record[target].strip()


def test_real_texts(shared_data):
    articles = texts(shared_data / "text" / "wikipedia_test_500.csv")
    assert len(articles) == 500
    assert articles[0].startswith("Danae Suzanna Sweetapple is an Australian Paralympic swimmer.")
    assert "\n\nShe took up swimming in 1990." in articles[0]
    words = texts(shared_data / "text" / "valid.txt")
    assert words[0] == "= Homarus gammarus ="
    assert sum(len(text.split()) for text in words) == len((shared_data / "text" / "valid.txt").read_text().split())


def test_wordings_name_their_subject():
    request = EditRequest("The capital of {} is", "Peru", "Oslo", wordings=["What is the capital of {}?", "Peru has the capital"])
    assert request.wordings == ("What is the capital of Peru?", "Peru has the capital")
    assert EditRequest.from_record(request.to_record()) == request
    with pytest.raises(RequestError, match="wording 'What is it' does not name the subject 'Peru'"):
        EditRequest("The capital of {} is", "Peru", "Oslo", wordings=["What is it"])
    with pytest.raises(RequestError, match="wordings must be texts"):
        EditRequest("The capital of {} is", "Peru", "Oslo", wordings=[3])


def test_the_subject_stands_for_the_slot_in_all_that_is_asked():
    record = {
        "prompt": "The mother tongue of {} is",
        "subject": "Danielle Darrieux",
        "target_new": "English",
        "rephrase_prompts": ["Which language did {} grow up with?"],
        "locality_prompts": ["{} was born in", ["{} is a", "actress"]],
        "portability_prompts": [["Where the mother tongue of {} is spoken: in", "London"]],
        "questions": [{"criterion": "multi-hop", "probes": [["Where is {} read?", ["London"]]], "conditions": [["{} is a", ["woman"]]]}],
        "wordings": ["{} thinks in {}"],
    }
    (request,) = EditRequest.all_from_record(record)
    name = "Danielle Darrieux"
    assert request.rephrase_prompts == (f"Which language did {name} grow up with?",)
    assert request.locality_prompts == ((f"{name} was born in", None), (f"{name} is a", "actress"))
    assert request.portability_prompts == ((f"Where the mother tongue of {name} is spoken: in", "London"),)
    assert [(own.prompt, *own.answers) for own in request.questions[0].probes] == [(f"Where is {name} read?", "London")]
    assert [(own.prompt, *own.answers) for own in request.questions[0].conditions] == [(f"{name} is a", "woman")]
    slots = {**record, "locality_prompts": ["{} in {}"], "portability_prompts": [["{} and {}", "x"]], "questions": []}
    for own in (record, slots, slots | {"questions": [{"criterion": "c", "probes": [["{} to {}", ["a"]]]}]}):  # a second one is text
        request = EditRequest.from_record(own)
        assert EditRequest.from_record(json.loads(json.dumps(request.to_record()))) == request


def test_no_slot_is_edited_as_it_is_written():
    asked = {"question": "{} became known as a", "answer": "chemist", "para_question": "{} worked as a", "sub_question": ["{} is a"]}
    asked["sub_answer"] = ["man"]
    request = EditRequest.from_record(asked | {"subject": "Werner Heisenberg"})
    assert request.text == "Werner Heisenberg became known as a" and request.place == len(request.text)
    assert request.rephrase_prompts == ("Werner Heisenberg worked as a",)
    assert request.portability_prompts == (("Werner Heisenberg is a", "man"),)
    with pytest.raises(RequestError, match="holds {}, which stands for the subject"):
        EditRequest.from_record(asked)
    with pytest.raises(RequestError, match="holds {}"):
        EditRequest("Who is {}", "{}", "x")


def test_numbers_are_taken_as_their_text():
    born = {"prompt": "{} was born in", "subject": "Ann", "target_new": 1901, "ground_truth": 1900.5}
    request = EditRequest.from_record(born)
    assert (request.target_new, request.ground_truth) == ("1901", "1900.5")
    assert EditRequest.from_record({**ZSRE, "alt": 7}).target_new == "7"
    with pytest.raises(RequestError, match="'target_new' must be non-empty text, got True"):
        EditRequest.from_record({**born, "target_new": True})


def test_misspelt_fields_are_said_once(tmp_path, caplog):
    typo = {**OWN, "request_id": None, "wording": ["x {}"], "rephrases": ["{} says"], "zzz": 1}
    read_requests(write(tmp_path / "a.json", json.dumps([OWN, typo, {**OWN, "wording": ["y {}"]}])))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and all(str(tmp_path / "a.json") in text for text in said)
    assert "'wording' (2 records) is unknown and not read; is 'wordings' meant?" in said[0]
    assert "'rephrases' (1 record) is unknown and not read; is 'rephrase_prompts' meant?" in said[1]
    assert "'zzz'" in said[2] and "meant" not in said[2]
    caplog.clear()
    as_requests([typo])
    assert len(caplog.records) == 3 and "is 'wordings' meant?" in caplog.text
    caplog.clear()  # published forms have much more than is read
    published = [{**form, "source": "x", "wording": "y"} for form in (EASYEDIT, COUNTERFACT, ZSRE)]
    read_requests(write(tmp_path / "b.json", json.dumps([*published, OWN])))
    assert not caplog.records


def test_qaedit_records(shared_data):
    read = read_requests(shared_data / "qaedit" / "qaedit_500.json")
    assert read.read == 500 and len(read.requests) > 450
    first = read.requests[0]
    assert (first.target_new, first.request_id, len(first.locality_prompts)) == ("Wilt Chamberlain", "1104", 5)
    assert first.rephrase_prompts and first.text.startswith("who has the most 70 point games")
