"""What the web demo shows, without a page: races, rounds looked into, chats, pairs by name, benchmark runs."""

import errno
import itertools
import threading

import pytest
import torch
from families import make_draft, make_model

from demo import html, room
from demo.baton import Baton
from demo.bench import FIRST_ROUTES, BenchJob, prompt_file, prompt_sets, report
from demo.chat import MOST_CACHES, Chat, ChatTurn
from demo.inside import look_at_tree, look_inside
from demo.job import DEVICE, Job, Stopped
from demo.pairs import FOLDER, HUB, KINDS, MOST_LOADED, SMOLLM2, PairName, PairShelf
from demo.race import Race
from demo.running import MOST_JOBS, RunningJobs
from demo.sentences import in_words
from demo.settings import BOTH, LOOKUP, Settings, encoded_prompt
from demo.transcript import Round, Transcript
from demo.visitor import MEMORIES, MOST_MEMORIES, Visitor
from pard_hf import load_pair

CODE = "def is_even(n):\n"
QUESTION = "A shop sells apples for $2 each. Anna buys 5 apples. How much does she pay in total?\n"


@pytest.fixture(scope="module")
def pair():
    return load_pair(dtype="float32", device="cpu")


def run(job):
    for _ in job.watch():
        pass
    return job


def stop_where(job, is_reached):
    for _ in job.watch():
        if is_reached():
            job.stop()


def plain(pair, ids, settings):
    torch.manual_seed(settings.seed)
    output = pair.target.generate(torch.tensor([ids]), **settings.arguments())
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(tree_size=16),
        Settings(proposer=LOOKUP),
        Settings(proposer=BOTH),
        Settings(4, 60, 0.8, 0.9, 3, tree_size=8, proposer=BOTH),
        Settings(1),
        Settings(16, 40),
        Settings(8, 30, 0.8, 0.9, 3),
        Settings(max_new_tokens=1),
    ],
)
@pytest.mark.parametrize("prompt", [CODE, QUESTION])
def test_both_lanes_of_a_race_say_what_plain_generate_says_alone(pair, prompt, settings):
    ids = encoded_prompt(pair, prompt, settings)

    view = run(Race(pair, ids, settings)).view()

    assert view.is_done
    assert view.plain.tokens == view.pard.tokens == plain(pair, ids, settings)
    assert view.stats.num_rounds == len(view.pard.rounds)
    assert view.stats.num_tokens == len(view.pard.tokens)
    assert view.acceptance_length == view.stats.acceptance_length
    assert min(view.plain.seconds, view.pard.seconds, view.speedup) > 0


def test_a_race_is_watched_while_it_runs(pair):
    settings = Settings(4, 200, temperature=2.0)
    race = Race(pair, encoded_prompt(pair, CODE, settings), settings)

    lengths = []
    for _ in race.watch():
        view = race.view()
        lengths.append((len(view.plain.tokens), len(view.pard.tokens)))

    assert any(0 < p < lengths[-1][0] and 0 < d for p, d in lengths), lengths
    assert lengths == sorted(lengths)


def test_a_stopped_race_keeps_what_was_said(pair):
    settings = Settings(4, 1000, temperature=2.0)
    race = Race(pair, encoded_prompt(pair, CODE, settings), settings)

    with pytest.raises(Stopped):
        stop_where(race, lambda: race.view().pard.rounds)
    view = race.view()

    assert view.is_stopped
    assert not view.is_done
    assert 0 < len(view.pard.tokens) < 1000
    assert "Stopped" in html.banner(view, True)


def test_who_stops_listening_stops_the_race(pair):
    settings = Settings(4, 1000, temperature=2.0)
    race = Race(pair, encoded_prompt(pair, CODE, settings), settings)

    steps = race.watch()
    next(steps)
    steps.close()
    race.wait(60)

    assert race.is_over
    assert not DEVICE.locked()


def test_closing_waits_for_nothing():
    goes_on = threading.Event()
    job = Job(lambda: goes_on.wait(60))
    steps = job.watch()
    next(steps)
    steps.close()

    assert not job.is_over
    assert DEVICE.locked()
    goes_on.set()
    job.wait(60)
    assert not DEVICE.locked()


@pytest.mark.parametrize("ending", [ValueError("boom"), Stopped()])
def test_what_ends_a_job_is_told_also_to_who_was_busy(ending):
    goes_on = threading.Event()

    def work():
        goes_on.wait(60)
        raise ending

    job = Job(work)
    steps = job.watch()
    next(steps)
    job.is_stopped = isinstance(ending, Stopped)
    goes_on.set()
    job.threads[0].join(60)

    with pytest.raises(type(ending)):
        list(steps)


def test_what_ends_one_lane_ends_the_race(pair):
    race = Race(pair, [10**6], Settings())

    with pytest.raises(IndexError):
        run(race)

    assert race.is_over
    assert not DEVICE.locked()


def test_the_baton_goes_to_the_runner_that_has_run_less():
    baton = Baton(2, turn_seconds=0)
    order = []

    def work(runner, weight):
        baton.take(runner)
        for _ in range(6):
            order.append(runner)
            baton.since -= weight  # As if so many seconds had passed.
            baton.pause(runner)
        baton.release(runner, has_finished=True)

    threads = [threading.Thread(target=work, args=(runner, weight)) for runner, weight in ((0, 1.0), (1, 3.5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert order[:8] == [0, 1, 0, 0, 0, 1, 0, 0]
    assert [round(clock) for clock in baton.clocks] == [6, 21]


def test_runners_draw_as_if_alone():
    baton, drawn = Baton(2, turn_seconds=0), [[], []]

    def work(runner):
        baton.take(runner)
        torch.manual_seed(runner)
        for _ in range(5):
            drawn[runner].append(float(torch.rand(())))
            baton.pause(runner)
        baton.release(runner, has_finished=True)

    threads = [threading.Thread(target=work, args=(runner,)) for runner in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    for runner in (0, 1):
        torch.manual_seed(runner)
        assert drawn[runner] == [float(torch.rand(())) for _ in range(5)]


def test_a_transcript_counts_rounds_of_every_loop():
    ours, stock = Transcript(), Transcript()
    for transcript in (ours, stock):
        transcript.put(torch.tensor([[1, 2, 3]]))  # The prompt.
    ours.put_accepted(torch.tensor([4]))
    ours.put_accepted(torch.tensor([5]))
    ours.put(torch.tensor([6]))
    ours.put(torch.tensor([7]))
    ours.put_accepted(torch.tensor([8]))
    ours.end()
    stock.put(torch.tensor([4, 5, 6]))
    stock.put(torch.tensor([7]))

    draft = ("draft", "draft")
    assert ours.rounds == [Round((4, 5), 6, draft), Round((), 7, ()), Round((), 8, ())]
    assert ours.tokens == [4, 5, 6, 7, 8]
    assert stock.rounds == ours.rounds[:2]


def test_a_round_tells_the_source_of_each_token():
    transcript = Transcript()
    transcript.put(torch.tensor([[1, 2, 3]]))
    for token, source in ((4, "copy"), (5, "copy"), (6, "successors"), (7, "draft")):
        transcript.put_accepted(torch.tensor([token]), source=source)
    transcript.put(torch.tensor([8]))
    transcript.put_accepted(torch.tensor([9]), source="copy")
    transcript.end()

    first, last = transcript.rounds
    assert first.runs == [("copy", (4, 5)), ("successors", (6,)), ("draft", (7,))]
    assert last == Round((), 9, ())


@pytest.mark.parametrize("proposer", [LOOKUP, BOTH])
def test_accepted_tokens_have_the_colour_of_their_source(pair, proposer):
    settings = Settings(proposer=proposer)
    race = run(Race(pair, encoded_prompt(pair, CODE, settings), settings))
    view = race.view()

    shown = html.tinted_text(pair.tokenizer, view.pard, settings.proposals)

    counts = view.stats.accepted_by_source
    sources = {source for round_ in view.pard.rounds for source in round_.sources}
    assert sources == {source for source, count in counts.items() if count}
    assert ("draft" in sources) == (proposer == BOTH)
    for source in counts:
        assert (f'class="pard-accepted pard-{source} ' in shown) == (source in sources)
    assert "of 16 nodes accepted" in shown
    assert "Accepted tokens by what proposed them" in html.stats_bars(view.stats)
    number, round_ = max(enumerate(view.pard.rounds, start=1), key=lambda item: len(item[1].accepted))
    inside = html.accepted_table(pair.tokenizer, round_, number, len(view.pard.rounds))
    assert inside.count('class="pard-accepted"') == len(round_.accepted) > 0


def test_a_visitor_is_remembered_and_alone(pair):
    settings = Settings(proposer=LOOKUP)
    ids = encoded_prompt(pair, CODE, settings)
    visitor, other = Visitor(), Visitor()

    lengths = [run(Race(pair, ids, settings, who)).view().acceptance_length for who in (visitor, visitor, other)]

    assert lengths[1] > lengths[0] == lengths[2]
    assert visitor.memory is not other.memory
    run(ChatTurn(pair, Chat(), CODE, Settings(8, 10, proposer=LOOKUP), visitor))
    kept = visitor.memory
    assert visitor.memory_of(load_pair(dtype="float32", device="cpu").target) is kept
    assert visitor.memory_of(make_model("llama")) is not kept
    assert run(Race(pair, ids, Settings(), third := Visitor())).is_over
    assert third.memory is None


def test_few_memories_are_kept(pair):
    visitors = [Visitor() for _ in range(MOST_MEMORIES + 1)]
    for visitor in visitors:
        visitor.memory_of(pair.target)

    assert [visitor.memory is None for visitor in visitors] == [True] + [False] * MOST_MEMORIES
    assert len(MEMORIES.owners) == MOST_MEMORIES


@pytest.mark.parametrize("settings", [Settings(), Settings(5, 60, 0.7, 0.95, 2)])
def test_looking_inside_shows_the_rounds_that_ran(pair, settings):
    ids = encoded_prompt(pair, QUESTION, settings)
    rounds = run(Race(pair, ids, settings)).view().pard.rounds
    assert len(rounds) > 2

    for number, round_ in enumerate(rounds, start=1):
        proposals = look_inside(pair, ids, rounds, number, settings)
        accepted = tuple(p.token for p in proposals if p.verdict == "accepted")
        rejected = [p for p in proposals if p.verdict == "rejected"]

        assert [p.position for p in proposals] == list(range(1, len(proposals) + 1))
        assert accepted == round_.accepted
        assert all(0 < p.probability <= 1 and 0 <= p.target_probability <= 1 for p in proposals)
        for p in rejected:
            assert p.target_token == round_.bonus != p.token

    with pytest.raises(ValueError, match=f"Expected a round from 1 to {len(rounds)}, got {len(rounds) + 1}"):
        look_inside(pair, ids, rounds, len(rounds) + 1, settings)


@pytest.mark.parametrize("tree_size", [4, 24])
def test_looking_inside_a_tree_lights_the_path_that_was_accepted(pair, tree_size):
    settings = Settings(8, 60, tree_size=tree_size)
    ids = encoded_prompt(pair, QUESTION, settings)
    rounds = run(Race(pair, ids, settings)).view().pard.rounds
    assert any(round_.accepted for round_ in rounds)

    for number, round_ in enumerate(rounds, start=1):
        nodes = look_at_tree(pair, ids, rounds, number, settings)
        said = []
        lit = [node for node in nodes if node.is_accepted]
        while lit:
            assert len(lit) == 1
            said.append(lit[0].token)
            assert all(child.probability <= lit[0].probability + 1e-6 for child in lit[0].children)
            children = lit[0].children
            lit = [child for child in children if child.is_accepted]

        assert tuple(said) == round_.accepted
        if nodes:
            assert html.count(nodes) == tree_size
            shown = html.tree_list(pair.tokenizer, nodes, number, len(rounds))
            assert shown.count("<li>") == tree_size
            assert shown.count("pard-lit") == len(said)
    with pytest.raises(ValueError, match="Expected a round"):
        look_at_tree(pair, ids, rounds, len(rounds) + 1, settings)


def test_a_round_without_room_had_no_proposals(pair):
    settings = Settings(8, 1)
    ids = encoded_prompt(pair, CODE, settings)
    rounds = run(Race(pair, ids, settings)).view().pard.rounds

    assert look_inside(pair, ids, rounds, 1, settings) == []
    assert look_at_tree(pair, ids, rounds, 1, settings) == []
    assert "nothing proposed" in html.tree_list(pair.tokenizer, [], 1, 1)


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
        ((8, 128, 0, 1, 0, 65), "Expected Tree from 0 to 64, got 65"),
        ((8, 128, 0, 1, 0, None), "Expected a number in the field Tree, got nothing"),
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
        ("word " * 3000, "Expected a prompt of at most 1920 tokens, 2048 positions less 128 new tokens, got"),
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
        assert turn.transcript.tokens == plain(pair, turn.ids, Settings(8, 40))
        assert chat.messages[-1] == {
            "role": "assistant",
            "content": pair.tokenizer.decode(turn.transcript.tokens, skip_special_tokens=True),
        }

    assert [m["content"] for m in chat.messages[::2]] == [QUESTION, "And 7 apples?", CODE]
    assert reused[0] == 0
    assert 0 < reused[1] < reused[2]


def test_a_stopped_answer_stays_and_the_chat_goes_on(pair):
    chat = Chat()
    turn = ChatTurn(pair, chat, CODE, Settings(4, 1000, temperature=2.0))
    with pytest.raises(Stopped):
        stop_where(turn, lambda: turn.transcript.rounds)
    said = turn.transcript.tokens

    following = run(ChatTurn(pair, chat, QUESTION, Settings(8, 30)))

    assert 0 < len(said) < 1000
    assert chat.messages[1]["content"] == pair.tokenizer.decode(said, skip_special_tokens=True)
    assert following.transcript.tokens == plain(pair, following.ids, Settings(8, 30))


def test_a_refused_message_changes_nothing(pair):
    chat = Chat()
    run(ChatTurn(pair, chat, CODE, Settings(8, 10)))
    before = list(chat.messages)

    for text in ("", "word " * 3000):
        with pytest.raises(ValueError, match="Expected a"):
            ChatTurn(pair, chat, text, Settings())

    assert chat.messages == before


def test_another_pair_reads_the_conversation_anew(pair):
    chat = Chat()
    run(ChatTurn(pair, chat, CODE, Settings(8, 10)))
    other = load_pair(dtype="float32", device="cpu")

    assert ChatTurn(other, chat, QUESTION, Settings()).num_reused == 0
    assert ChatTurn(pair, chat, QUESTION, Settings()).num_reused > 0


def test_few_caches_are_kept(pair):
    chats = [Chat() for _ in range(MOST_CACHES + 2)]
    for chat in chats:
        run(ChatTurn(pair, chat, CODE, Settings(8, 4)))

    assert [chat.cache is not None for chat in chats] == [False] * 2 + [True] * MOST_CACHES
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
    pair.tokenizer.save_pretrained(folder / "target")

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
    race = Race(pair, ids, Settings())
    race.transcripts[1].rounds = [
        Round(tuple(ids[:5]), ids[5], ("draft",) * 5),
        *(Round((), token, ()) for token in ids[6:]),
    ]
    race.transcripts[0].rounds = race.transcripts[1].rounds
    view = race.view()

    shown = html.tinted_text(pair.tokenizer, view.pard, "8 proposals") + html.plain_text(pair.tokenizer, view.plain)
    shown += (
        html.conversation([{"role": "user", "content": bad}])
        + html.message(bad)
        + html.verdict(bad, "note")
        + "".join(html.code(pair.tokenizer, i) for i in ids)
    )

    assert "<img" not in shown
    assert "<script" not in shown
    assert "&lt;img src=x" in shown


def test_a_text_that_repeats_itself_is_said_to(pair):
    lanes = {}
    for prompt in ("The fox was hungry. Tell its story.\n", QUESTION):
        race = run(Race(pair, encoded_prompt(pair, prompt, Settings(8, 60)), Settings(8, 60)))
        lanes[prompt] = html.banner(race.view(), True)

    assert ["repeats itself" in banner for banner in lanes.values()] == [True, False]


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
    return run(BenchJob(pair, PairName(), "demo", ("ar", "pld", "tier2"), 2, 1, Settings(4, 12)))


def test_a_benchmark_is_that_of_the_shell(measured):
    result = measured.result

    assert result["command"] == (
        "pard bench --prompts demo --limit 2 --repeats 1 --max-new-tokens 12 --num-assistant-tokens 4 "
        "--routes ar,pld,tier2"
    )
    assert [route["route"] for route in result["cells"][0]["routes"]] == ["ar", "pld", "tier2"]
    assert result["target"] == result["draft"] == "bundled"
    assert measured.share == pytest.approx(1)


def test_a_benchmark_is_shown_with_figures(measured):
    shown = report(measured)

    assert "PARD tier 2" in shown
    assert shown.count('src="data:image/svg+xml;base64,') == 2
    assert measured.conditions["command"] in shown


def test_a_benchmark_ends_where_it_is_stopped(pair):
    job = BenchJob(pair, PairName(), "demo", FIRST_ROUTES, 6, 5, Settings())

    with pytest.raises(Stopped):
        stop_where(job, lambda: True)

    assert job.is_over
    assert job.cells == []
    assert not DEVICE.locked()


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


def test_a_stop_button_stops_its_own_job():
    running, race, load = RunningJobs(), Job(lambda: None), Job(lambda: None)

    with running.keep(race, "race", "me"), running.keep(load, "load", "me"), running.keep(Job(), "race", "you"):
        assert running.stop("load", "me") is load
        assert running.stop("load", "me") is None
        running.leave("me")
        assert list(running.jobs) == [("you", "race")]
    assert (race.is_stopped, load.is_stopped) == (True, True)
    assert running.jobs == {}


def test_jobs_that_nobody_asks_for_are_forgotten():
    running = RunningJobs()
    for session in range(MOST_JOBS + 5):
        keeping = running.keep(Job(), "race", str(session))
        with pytest.raises(Stopped), keeping:
            raise Stopped
    with pytest.raises(ValueError, match="failed"), running.keep(Job(), "race", "another"):
        raise ValueError("failed")

    assert len(running.jobs) == MOST_JOBS - 1
    assert ("another", "race") not in running.jobs


def test_jobs_run_one_at_a_time():
    order, goes_on = [], threading.Event()
    first = Job(lambda: (goes_on.wait(30), order.append("first")))
    second = Job(lambda: order.append("second"))
    steps = first.watch()
    next(steps)
    waiting = second.watch()
    next(waiting)

    assert order == []
    goes_on.set()
    list(steps)
    list(waiting)
    assert order == ["first", "second"]


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
