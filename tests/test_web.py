"""What the web demo does, without a page: races, trees, chats, pairs by name, benchmark runs."""

import asyncio
import errno
import importlib
import itertools
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from families import make_draft, make_model

from demo import html, room
from demo.bench import FIRST_ROUTES, HEADINGS, BenchJob, prompt_file, prompt_sets, remarks, rows
from demo.chat import MOST_CACHES, Chat, ChatTurn
from demo.job import DEVICE, DOWNLOADS, Job, Stopped, Ticket, stop_jobs
from demo.pairs import FOLDER, HUB, KINDS, MOST_LOADED, SMOLLM2, PairName, PairShelf
from demo.race import Lane, Node, Race, Round
from demo.sentences import in_words
from demo.settings import BOTH, DRAFT, LOOKUP, Settings, encoded_prompt
from demo.visitor import MEMORIES, MOST_MEMORIES, Visitor
from pard_hf import load_pair
from pard_hf.locate import SECONDS

CODE = "def is_even(n):\n"
QUESTION = "A shop sells apples for $2 each. Anna buys 5 apples. How much does she pay in total?\n"


@pytest.fixture(scope="module")
def pair():
    return load_pair(dtype="float32", device="cpu")


def run(job, is_reached=lambda: False):
    """Watch a job to its end, and stop it where something is reached."""

    async def watch():
        async for _ in job.watch():
            if is_reached():
                job.stop()

    asyncio.run(watch())
    return job


def endless(pair):
    return Race(pair, CODE, Settings(4, 1000, temperature=2.0))


class Waiting(Job):
    """Work that goes on until it is told to end."""

    def __init__(self, ticket=None):
        super().__init__(ticket)
        self.told = threading.Event()

    def work(self):
        self.told.wait(60)


def plain(pair, ids, settings):
    torch.manual_seed(settings.seed)
    output = pair.target.generate(torch.tensor([ids]), **settings.arguments())
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(8, tree_size=16, proposer=DRAFT),
        Settings(proposer=LOOKUP),
        Settings(4, 60, 0.8, 0.9, 3),
        Settings(8, 30, 0.8, 0.9, 3, proposer=DRAFT),
        Settings(max_new_tokens=1),
    ],
)
@pytest.mark.parametrize("prompt", [CODE, QUESTION])
def test_both_routes_say_what_plain_generate_says_alone(pair, prompt, settings):
    race = run(Race(pair, prompt, settings))

    assert race.is_done
    assert race.plain.tokens == race.ours.tokens == plain(pair, encoded_prompt(pair, prompt, settings), settings)
    stats = race.ours.stats
    assert (stats.num_rounds, stats.num_tokens) == (len(race.ours.rounds), len(race.ours.tokens))
    assert race.ours.acceptance_length == stats.acceptance_length
    for lane in (race.plain, race.ours):
        clocks = [lane.clock(round_) for round_ in lane.rounds]
        assert clocks == sorted(clocks)
        assert 0 < clocks[0]
        assert clocks[-1] == lane.seconds


def test_routes_run_one_after_the_other(pair):
    race = Race(pair, CODE, Settings())
    seen = []

    run(race, lambda: seen.append((race.plain.seconds, bool(race.ours.rounds))))

    assert all(seconds == race.plain.seconds for seconds, has_begun in seen if has_begun)
    assert race.ours.start >= race.plain.start + race.plain.seconds


def test_a_stopped_race_keeps_what_was_said(pair):
    race = endless(pair)

    with pytest.raises(Stopped):
        run(race, lambda: race.plain.rounds)

    assert not race.is_done
    assert 0 < len(race.plain.tokens) < 1000
    assert "Stopped" in html.race(race)
    assert "data-replay" not in html.race(race)


def test_who_stops_listening_stops_the_race(pair):
    race = endless(pair)

    async def leave():
        steps = race.watch()
        async for _ in steps:
            if race.plain.rounds:
                break
        await steps.aclose()
        await race.goes_on(60)

    asyncio.run(leave())
    assert race.is_over
    assert DEVICE.tickets == []


def verdict_of(pair, plain_seconds, our_seconds, our_token=5):
    """What is said of a race of one token, ended after so many seconds."""
    race = Race(pair, CODE, Settings())
    race.plain.rounds = [Round((), 5, (), plain_seconds)]
    race.ours.rounds = [Round((), our_token, (), our_seconds)]
    race.is_over = race.is_done = True
    return html.verdict(race)


def test_only_what_is_faster_is_green(pair):
    assert "2.00x: faster, in float32 on this CPU; same text." in verdict_of(pair, 2, 1)
    assert "pard-good" in verdict_of(pair, 2, 1)
    assert "0.50x: slower here, in float32 on this CPU; same text." in verdict_of(pair, 1, 2)
    assert "1.00x: as fast, in float32 on this CPU; same text." in verdict_of(pair, 1, 1.001)
    for seconds in (2, 1.001):
        assert "pard-note" in verdict_of(pair, 1, seconds)
    assert "pard-error" in verdict_of(pair, 2, 1, our_token=6)
    assert "please report" in verdict_of(pair, 2, 1, our_token=6)


def test_a_transcript_counts_rounds_of_every_loop():
    ours, stock = Lane(), Lane()
    for lane in (ours, stock):
        lane.put(torch.tensor([[1, 2, 3]]))  # The prompt.
    ours.put_accepted(torch.tensor([4]))
    ours.put_accepted(torch.tensor([5]))
    ours.put(torch.tensor([6]))
    ours.put(torch.tensor([7]))
    ours.put_accepted(torch.tensor([8]))
    ours.end()
    stock.put(torch.tensor([4, 5, 6]))
    stock.put(torch.tensor([7]))

    said = [(round_.accepted, round_.bonus, round_.sources) for round_ in ours.rounds]
    assert said == [((4, 5), 6, ("draft", "draft")), ((), 7, ()), ((), 8, ())]
    assert ours.tokens == [4, 5, 6, 7, 8]
    assert [(round_.accepted, round_.bonus, round_.sources) for round_ in stock.rounds] == said[:2]


def test_a_round_tells_the_source_of_each_token():
    lane = Lane()
    lane.put(torch.tensor([[1, 2, 3]]))
    for token, source in ((4, "copy"), (5, "copy"), (6, "successors"), (7, "draft")):
        lane.put_accepted(torch.tensor([token]), source=source)
    lane.put(torch.tensor([8]))

    assert lane.rounds[0].runs == [("copy", (4, 5)), ("successors", (6,)), ("draft", (7,))]


@pytest.mark.parametrize("proposer", [LOOKUP, BOTH, DRAFT])
def test_accepted_tokens_have_the_colour_of_their_source(pair, proposer):
    race = run(Race(pair, CODE, Settings(proposer=proposer)))

    shown = html.race(race)

    counts = race.ours.stats.accepted_by_source or {"draft": 1}
    sources = {source for round_ in race.ours.rounds for source in round_.sources}
    assert sources == {source for source, count in counts.items() if count}
    for source in ("draft", "copy", "successors"):
        assert (f'class="pard-accepted pard-{source} ' in shown) == (source in sources)
    assert shown.count('data-n="') == sum(len(r.runs) + 1 for lane in (race.plain, race.ours) for r in lane.rounds)


@pytest.mark.parametrize(
    "settings", [Settings(), Settings(8, 60, 0.8, 0.9, 3), Settings(tree_size=24, proposer=DRAFT)]
)
def test_a_round_is_shown_as_the_tree_it_was(pair, settings):
    lane = run(Race(pair, QUESTION, settings)).ours
    assert len(lane.trees) == len(lane.rounds)
    assert any(round_.accepted for round_ in lane.rounds)

    for number, round_ in enumerate(lane.rounds, start=1):
        nodes = lane.nodes(number)
        path = html.accepted_path(nodes, round_)
        assert len(nodes) in (0, settings.tree_size)
        assert tuple(nodes[column].token for column in path) == round_.accepted
        assert tuple(nodes[column].source for column in path) == round_.sources
        for column, node in enumerate(nodes):
            assert -1 <= node.parent < column
            assert node.parent < 0 or 0 <= node.probability <= nodes[node.parent].probability + 1e-6
        shown = html.tree(pair.tokenizer, lane, number)
        assert shown.count("<li>") == sum(node.token >= 0 for node in nodes)
        assert shown.count(", accepted") == len(path)


def test_a_tree_lights_one_path():
    nodes = [Node(5, -1, 0.6, "draft"), Node(6, -1, 0.3, "copy"), Node(7, 0, 0.2, "copy"), Node(7, 1, 0.1, "draft")]

    assert html.accepted_path(nodes, Round((6, 7), 9, ("copy", "draft"))) == [1, 3]


def test_a_visitor_is_remembered_and_alone(pair):
    settings = Settings(max_new_tokens=60, proposer=LOOKUP)
    visitor, other = Visitor(), Visitor()
    turns = [run(ChatTurn(pair, Chat(), CODE, settings, who)) for who in (visitor, visitor, other)]
    races = [run(Race(pair, CODE, settings)) for _ in range(2)]

    lengths = [turn.lane.acceptance_length for turn in turns]
    assert lengths[1] > lengths[0] == lengths[2]
    assert [race.ours.acceptance_length for race in races] == [lengths[0]] * 2
    assert visitor.memory is not other.memory
    assert visitor.memory_of(load_pair(dtype="float32", device="cpu").target) is visitor.memory
    kept = visitor.memory
    assert visitor.memory_of(make_model("llama")) is not kept
    run(ChatTurn(pair, Chat(), CODE, Settings(max_new_tokens=4, proposer=DRAFT), third := Visitor()))
    assert third.memory is None


def test_few_memories_are_kept(pair):
    visitors = [Visitor() for _ in range(MOST_MEMORIES + 1)]
    for visitor in visitors:
        visitor.memory_of(pair.target)

    assert [visitor.memory is None for visitor in visitors] == [True] + [False] * MOST_MEMORIES
    assert len(MEMORIES.owners) == MOST_MEMORIES


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ((None, 128, 0, 1, 0), "Expected a number in the field K, got nothing. Type one from 1 to 16."),
        ((0, 128, 0, 1, 0), "Expected K from 1 to 16, got 0. Choose one in this range."),
        ((99, 128, 0, 1, 0), "Expected K from 1 to 16, got 99. Choose one in this range."),
        ((2.5, 128, 0, 1, 0), "Expected a whole number in the field K, got 2.5. Drop the fraction."),
        ((8, 0, 0, 1, 0), "Expected Max new tokens from 1 to 1024"),
        ((8, float("nan"), 0, 1, 0), "Expected a number in the field Max new tokens, got nan"),
        ((8, 128, float("inf"), 1, 0), "Expected a number in the field Temperature, got inf"),
        ((8, 128, -1, 1, 0), "Expected Temperature from 0 to 2, got -1"),
        ((8, 128, 1, 0, 0), "Expected Top-p from 0.01 to 1, got 0"),
        ((8, 128, 1, 1, -1), "Expected Seed from 0"),
        ((8, 128, 1, 1, "seven"), "Expected a number in the field Seed, got 'seven'"),
        ((8, 128, 0, 1, 0, 65), "Expected Tree from 2 to 64, got 65"),
        ((8, 128, 0, 1, 0, 0, "a guess"), "Expected proposals from one of the draft; the text, no draft; the draft"),
        ((True, 128, 1, 1, 1), "Expected a number in the field K, got True"),
        ((8, 128, 1, 1, 10**400), "Expected Seed from 0 to 4294967295, got one of hundreds of digits"),
    ],
)
def test_fields_are_refused_in_words(values, sentence):
    with pytest.raises(ValueError, match="Expected") as refusal:
        Settings.checked(*values)

    assert str(refusal.value).startswith(sentence)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "Expected a prompt, got nothing but white space"),
        (" \n\t", "Expected a prompt, got nothing but white space"),
        (None, "Expected text as a prompt, got nothing"),
        ({"a": 1}, "Expected text as a prompt, got {'a': 1}"),
        ("cut \ud83d", "Expected text as a prompt, but it has half of a character, the surrogate"),
        ("word " * 4001, "Expected at most 20000 characters, got 20005"),
        ("word " * 3000, "Expected a prompt of at most 1856 tokens, 2048 positions less 192 new tokens, got"),
    ],
)
def test_prompts_are_refused_in_words(pair, prompt, sentence):
    with pytest.raises(ValueError, match="Expected") as refusal:
        encoded_prompt(pair, prompt, Settings())

    assert str(refusal.value).startswith(sentence)


def test_turns_of_a_chat_are_what_plain_generate_says_without_a_cache(pair):
    chat, reused = Chat(), []
    for text in (QUESTION, "And 7 apples?", CODE):
        turn = run(ChatTurn(pair, chat, text, Settings(8, 40)))
        reused.append(turn.num_reused)
        assert turn.lane.tokens == plain(pair, turn.ids, Settings(8, 40))
        assert chat.messages[-1] == {
            "role": "assistant",
            "content": pair.tokenizer.decode(turn.lane.tokens, skip_special_tokens=True),
        }

    assert [m["content"] for m in chat.messages[::2]] == [QUESTION, "And 7 apples?", CODE]
    assert [who for who, _ in chat.shown] == ["user", "assistant"] * 3
    assert "pard-bonus" in chat.shown[1][1]
    assert reused[0] == 0
    assert 0 < reused[1] < reused[2]


def test_a_stopped_answer_stays_and_the_chat_goes_on(pair):
    chat = Chat()
    turn = ChatTurn(pair, chat, CODE, Settings(4, 1000, temperature=2.0))
    with pytest.raises(Stopped):
        run(turn, lambda: turn.lane.rounds)
    said = turn.lane.tokens

    following = run(ChatTurn(pair, chat, QUESTION, Settings(8, 30)))

    assert 0 < len(said) < 1000
    assert chat.messages[1]["content"] == pair.tokenizer.decode(said, skip_special_tokens=True)
    assert following.lane.tokens == plain(pair, following.ids, Settings(8, 30))


def test_a_refused_message_changes_nothing(pair):
    chat = Chat()
    run(ChatTurn(pair, chat, CODE, Settings(8, 10)))
    before = list(chat.messages)

    for text in ("", "word " * 3000):
        with pytest.raises(ValueError, match="Expected a"):
            run(ChatTurn(pair, chat, text, Settings()))

    assert chat.messages == before


def test_another_pair_reads_the_conversation_anew(pair):
    chat = Chat()
    run(ChatTurn(pair, chat, CODE, Settings(8, 10)))
    other = load_pair(dtype="float32", device="cpu")

    assert run(ChatTurn(other, chat, QUESTION, Settings(8, 4))).num_reused == 0
    assert run(ChatTurn(other, chat, QUESTION, Settings(8, 4))).num_reused > 0


def test_few_caches_are_kept(pair):
    chats = [Chat() for _ in range(MOST_CACHES + 2)]
    for chat in chats:
        run(ChatTurn(pair, chat, CODE, Settings(8, 4)))

    assert [chat.said.cache is not None for chat in chats] == [False] * 2 + [True] * MOST_CACHES
    assert run(ChatTurn(pair, chats[0], QUESTION, Settings(8, 4))).num_reused == 0


@pytest.fixture
def folder(tmp_path, tokenizer):
    root = tmp_path / "models"
    for name, make in (("target", make_model), ("draft", lambda family: make_draft(make_model(family), 4))):
        make("llama").save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    make_model("llama").save_pretrained(tmp_path / "secret")
    (root / "link").symlink_to(tmp_path / "secret")
    return root


def test_folders_below_the_start_folder_are_loaded(folder):
    said = []
    shelf = PairShelf(folder, "cpu")

    pair = shelf.load(PairName(FOLDER, "target", "draft"), said.append)

    assert pair.draft.num_assistant_tokens == 4
    assert shelf.load(PairName(FOLDER, "target", "draft")) is pair
    assert said == ["Looking for target …", "Loading the models …", "Trying the models …"]


@pytest.mark.parametrize("name", ["../secret", "link", "missing", "/etc", "", "~"])
def test_nothing_else_on_the_disk_is_told_of(folder, name):
    paths = {"absolute": str(folder.parent / "secret")}
    shelf = PairShelf(folder, "cpu")
    for tried in (name, *paths.values()):
        with pytest.raises(ValueError, match="Expected a model below the folder the demo was started with, got"):
            shelf.local_path(tried)


def test_without_a_start_folder_there_are_no_local_models(folder):
    with pytest.raises(ValueError, match="Start it with `--folder`"):
        PairShelf().load(PairName(FOLDER, str(folder / "target"), str(folder / "draft")))


@pytest.mark.parametrize("name", ["a/b/c", "../x", "./x", "", "with space", "a//b", "/tmp/x", "org/.."])
def test_only_hub_ids_are_asked_for(name):
    with pytest.raises(ValueError, match="Expected a Hub id such as"):
        PairShelf().hub_path(name, print)


def test_hub_that_does_not_answer_is_said_soon(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()

    with pytest.raises(OSError, match="Expected the Hub to answer for `org/none`"):
        PairShelf().hub_path("org/none", print)

    assert time.monotonic() - start < 2 * SECONDS


def test_memory_is_what_the_system_says():
    assert 10**8 < room.available_memory("cpu") < 10**14


def test_a_folder_has_one_name(folder):
    shelf = PairShelf(folder, "cpu")

    assert shelf.settled(PairName(FOLDER, "-x/../target/", "./draft")) == PairName(FOLDER, "target", "draft")


def test_the_last_pairs_stay_loaded(folder):
    shelf = PairShelf(folder, "cpu")
    names = [PairName(FOLDER, "target", "draft"), PairName(FOLDER, "./target", "draft"), PairName()]
    pairs = [shelf.load(name) for name in names]

    assert len(shelf.pairs) == MOST_LOADED
    assert shelf.load(names[2]) is pairs[2]
    assert shelf.load(names[0]) is not pairs[0]


def test_a_failed_load_changes_nothing(folder):
    shelf = PairShelf(folder, "cpu")
    before = shelf.load(PairName())

    shelf.load(PairName(FOLDER, "target", "draft"))
    assert len(shelf.pairs) == MOST_LOADED
    with pytest.raises(ValueError, match="the config of `target` has no `pard_token`"):
        shelf.load(PairName(FOLDER, "target", "target"))

    def stop(text):
        raise Stopped

    with pytest.raises(Stopped):
        shelf.load(PairName(FOLDER, "draft", "draft"), stop)
    assert list(shelf.pairs) == [PairName(), PairName(FOLDER, "target", "draft")]
    assert shelf.load(PairName()) is before


def test_a_loaded_pair_is_there_while_another_is_looked_for(folder):
    shelf, goes_on, begun = PairShelf(folder, "cpu"), threading.Event(), threading.Event()
    shelf.load(PairName())

    def wait(text):
        begun.set()
        goes_on.wait(30)

    other = threading.Thread(target=shelf.load, args=(PairName(FOLDER, "target", "draft"), wait))
    other.start()
    begun.wait(30)

    assert shelf.load(PairName()) is shelf.get(PairName())
    goes_on.set()
    other.join(60)
    assert shelf.get(PairName(FOLDER, "target", "draft")) is not None


def test_a_tokenizer_of_another_model_is_refused(folder, pair):
    for name in ("target", "draft"):
        pair.tokenizer.save_pretrained(folder / name)

    with pytest.raises(ValueError, match="Expected a tokenizer of at most 100 tokens, the rows of the target's"):
        PairShelf(folder, "cpu").load(PairName(FOLDER, "target", "draft"))


def test_models_of_two_families_are_refused(folder, pair):
    pair.draft.save_pretrained(folder / "other")
    pair.tokenizer.save_pretrained(folder / "other")

    with pytest.raises(ValueError, match="Expected draft and target to share a tokenizer"):
        PairShelf(folder, "cpu").load(PairName(FOLDER, "target", "other"))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            ("the moon", "a", "b"),
            "Expected models from one of bundled pair, SmolLM2, local folder, Hub id, got 'the moon'",
        ),
        ((FOLDER, "", "b"), "Expected the local folder of a target, got nothing"),
        ((FOLDER, "a", " "), "Expected the local folder of a draft, got nothing"),
        ((HUB, None, None), "Expected the Hub id of a target, got nothing"),
        ((HUB, "a" * 300, "b"), "Expected a name of at most 200 characters on one line, got 300"),
        ((HUB, "a\0b", "b"), "Expected a name of at most 200 characters on one line, got 3"),
    ],
)
def test_names_are_refused_in_words(values, sentence):
    with pytest.raises(ValueError, match="Expected") as refusal:
        PairName.checked(*values)

    assert str(refusal.value).startswith(sentence)


def test_names_are_trimmed():
    assert PairName.checked(KINDS[0], "ignored", "too") == PairName()
    assert PairName.checked(SMOLLM2, "ignored", "too") == PairName(SMOLLM2)
    assert str(PairName(SMOLLM2)) == "SmolLM2"
    assert PairName.checked(HUB, " a/b ", "") == PairName(HUB, "a/b", "")


def test_what_anybody_said_is_escaped(pair):
    bad = "<img src=x onerror=alert(1)> & <script>"
    ids = pair.tokenizer(bad)["input_ids"]
    race = Race(pair, bad, Settings())
    race.plain.rounds = race.ours.rounds = [
        Round(tuple(ids[:5]), ids[5], ("draft",) * 5, 0.5),
        *(Round((), token, (), 1.0) for token in ids[6:]),
    ]
    shown = html.race(race)
    race.is_over = race.is_done = True
    shown += html.race(race) + html.message(bad) + html.banner(bad, "note")
    shown += html.conversation(ChatTurn(pair, Chat(), bad, Settings()).conversation())
    shown += "".join(html.code(pair.tokenizer, i) for i in ids)

    assert "<img" not in shown
    assert "<script" not in shown
    assert "&lt;img src=x" in shown


def test_a_text_that_repeats_itself_is_said_to(pair):
    races = [
        run(Race(pair, prompt, Settings(8, 60))) for prompt in ("The fox was hungry. Tell its story.\n", QUESTION)
    ]

    assert ["repeats itself" in html.verdict(race) for race in races] == [True, False]


def test_pieces_are_the_whole_text(pair):
    text = "a = 'é – ß'\n\n# naïve ☃\n    return  x\n"
    whole = pair.tokenizer(text, add_special_tokens=False)["input_ids"]
    cut = pair.tokenizer("a é 日本", add_special_tokens=False)["input_ids"][:-1]

    for ids, size in itertools.product((whole, cut), (1, 2, 3)):
        groups = [ids[i : i + size] for i in range(0, len(ids), size)]
        pieces = html.pieces(pair.tokenizer, groups)
        assert len(pieces) == len(groups)
        assert "".join(pieces) == pair.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def measured(pair):
    return run(BenchJob(pair, PairName(), "demo", ("ar", "pld", "tier2"), 2, 1, Settings(4, 12, tree_size=16)))


def test_a_benchmark_is_that_of_the_shell(measured):
    result = measured.result

    assert result["command"] == (
        "pard bench --prompts demo --limit 2 --repeats 1 --max-new-tokens 12 --num-assistant-tokens 4 "
        "--assistant-tree-size 16 --routes ar,pld,tier2"
    )
    assert [route["route"] for route in result["cells"][0]["routes"]] == ["ar", "pld", "tier2"]
    assert result["target"] == result["draft"] == "bundled"
    assert measured.share == pytest.approx(1)


def test_a_benchmark_is_shown(measured):
    shown = rows(measured.result)

    assert [row[0] for row in shown] == ["AR", "PLD", "PARD tier 2"]
    assert {len(row) for row in shown} == {len(HEADINGS)}
    assert measured.conditions["command"] in remarks(measured.result)


def test_a_benchmark_ends_where_it_is_stopped(pair):
    job = BenchJob(pair, PairName(), "demo", FIRST_ROUTES, 6, 5, Settings())

    with pytest.raises(Stopped):
        run(job, lambda: True)

    asyncio.run(job.goes_on(60))
    assert job.cells == []
    assert DEVICE.tickets == []


def test_a_benchmark_needs_a_route(pair):
    with pytest.raises(ValueError, match="Expected routes among ar, .* got 'no route'"):
        BenchJob(pair, PairName(), "demo", (), 1, 1, Settings())


def test_a_named_pair_is_named_in_the_command(pair):
    result = BenchJob(pair, PairName(SMOLLM2), "demo", ("ar",), 1, 1, Settings()).result

    assert (result["target"], result["draft"]) == ("smollm2", "smollm2")
    assert result["command"].endswith("--pair=smollm2")


def test_names_are_no_flags(pair):
    job = BenchJob(pair, PairName(FOLDER, "-x", "--output"), "demo", ("ar",), 1, 1, Settings())

    assert "--target=-x --draft=--output" in job.conditions["command"]


def test_routes_are_no_flags(pair):
    with pytest.raises(ValueError, match="Expected routes among ar, .* got '--output'"):
        BenchJob(pair, PairName(), "demo", ("ar", "--output", "elsewhere"), 1, 1, Settings())


def test_prompt_sets_are_named_or_below_the_start_folder(tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "mine.jsonl").write_text('{"prompt": "x"}\n')
    shelf = PairShelf(tmp_path)

    assert prompt_sets(PairShelf()) == ["demo"]
    assert prompt_sets(shelf) == ["demo", "sets/mine.jsonl"]
    assert prompt_file(shelf, "sets/mine.jsonl", None) == str(tmp_path.resolve() / "sets" / "mine.jsonl")
    assert prompt_file(shelf, "demo", "/uploaded.jsonl") == "/uploaded.jsonl"
    for name in ("/etc/passwd", "../x.jsonl", "", None, "hub:org/name"):
        with pytest.raises(ValueError, match="Expected a prompt set of the list, got"):
            prompt_file(shelf, name, None)


def test_closing_waits_for_nothing():
    job = Waiting()

    async def close():
        steps = job.watch()
        await anext(steps)
        await steps.aclose()
        assert (job.is_over, DEVICE.tickets) == (False, [job.ticket])
        job.told.set()
        assert not await job.goes_on(60)

    asyncio.run(close())
    assert DEVICE.tickets == []


def test_a_stop_button_stops_its_own_kind_of_job():
    class Other(Waiting):
        queue = DOWNLOADS

    mine, other, yours = Waiting(ticket=Ticket("me")), Other(ticket=Ticket("me")), Waiting(ticket=Ticket("you"))

    assert stop_jobs("me", Other) == [other]
    assert [job.is_stopped for job in (mine, other, yours)] == [False, True, False]
    stop_jobs("me")
    assert [job.is_stopped for job in (mine, yours)] == [True, False]


class Visitors:
    """A page of the demo with models, and what its handlers show a visitor."""

    def __init__(self, pair):
        gradio = pytest.importorskip("gradio")
        shelf = PairShelf(None, "cpu")
        shelf.load(PairName())
        self.request = SimpleNamespace(session_hash="me", client=None)
        with gradio.Blocks():
            self.page = importlib.import_module("demo.page").Page(shelf, PairName().kind, "")

    async def last_shown(self, handler, is_reached, stop):
        """Run a handler, stop it where something is reached; return what it shows last."""
        is_stopped, shown = False, {}
        async for changes in handler:
            shown |= changes
            if not is_stopped and is_reached(shown):
                stop(self.request)
                is_stopped = True
        assert is_stopped
        return shown


@pytest.fixture(scope="module")
def visitors(pair):
    return Visitors(pair)


@pytest.mark.parametrize("is_waiting", [True, False])
def test_a_stopped_race_says_so_itself(visitors, is_waiting):
    """What another handler says may reach the page before the last that this one said."""
    page, others = visitors.page, Ticket("others")
    if is_waiting:
        DEVICE.join(others)
    handler = page.race(None, CODE, visitors.request, 4, 1000, 2.0, 1, 0, 8, BOTH)

    def is_reached(shown):
        return "In the queue" in shown[page.status] if is_waiting else "pard-text" in shown.get(page.lanes, "")

    shown = asyncio.run(visitors.last_shown(handler, is_reached, lambda request: stop_jobs("me", Race)))
    DEVICE.leave(others)

    assert "Stopped." in shown[page.status]
    assert is_waiting or "Stopped" in shown[page.lanes]


def test_an_answer_of_a_conversation_that_was_left_is_not_shown(visitors):
    page, chat = visitors.page, Chat()
    handler = page.answer(None, Visitor(), chat, CODE, visitors.request, 4, 1000, 2.0, 1, 0, 8, BOTH)

    shown = asyncio.run(visitors.last_shown(handler, lambda shown: CODE in shown.get(page.dialog, ""), page.forget))

    assert CODE not in shown[page.dialog]


def test_errors_become_sentences(caplog):
    assert in_words(OSError(errno.ENOSPC, "No space left on device")).startswith("The disk of the machine is full.")
    assert in_words(ValueError("Expected a, got b.")) == "Expected a, got b."
    assert in_words(ValueError("Expected JSON in line 1 of `/srv/up/x.jsonl`, got y. See https://a.b/c/d.")) == (
        "Expected JSON in line 1 of `x.jsonl`, got y. See https://a.b/c/d."
    )
    assert "code of its own" in in_words(ValueError("Please pass the argument `trust_remote_code=True`"))
    assert "/srv" not in in_words(PermissionError(errno.EACCES, "Permission denied", "/srv/models/config.json"))
    assert "no memory left" in in_words(torch.OutOfMemoryError("CUDA out of memory"))
    assert not caplog.records
    assert in_words(KeyError("x")) == "An unexpected error (KeyError): the server's log says more. Try other settings."
    assert caplog.records[0].exc_info
