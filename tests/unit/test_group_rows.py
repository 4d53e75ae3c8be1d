"""Groups through the house: from scored samples to tokens, log-probs and steps; and that pairs stay what they are."""

import pyarrow as pa
import pytest
import torch

from rdpo.config import Job, Pairs
from rdpo.errors import InputError
from rdpo.modeling.layout import packed_batch, padded_batch
from rdpo.modeling.model import ForwardSettings, load_policy
from rdpo.modeling.packing import PairSize, batch_tokens, micro_batches
from rdpo.preference.agreement import count_answers
from rdpo.preference.known_logps import known_logps, recalled
from rdpo.preference.pairs import answers_of, exchanged, pair_row, pairs_table, sound
from rdpo.preference.reference import Reference
from rdpo.records import ID_COLUMN, others_of, table_of
from rdpo.stages.training import check_room
from rdpo.training.loop import PairTable
from tests.support.jobs import valid_job
from tests.support.pairs import trainer_of
from tests.support.plain_backend import PlainBackend

SAMPLES = {"response_1": 0.5, "response_2": 2.0, "response_3": -1.0, "response_4": 1.0}
BEST_AND_REST = Pairs(chosen="best", rejected="worst", others="rest")


def scored(scores=None, **changes):
    row = {ID_COLUMN: "p", "prompt": [{"role": "user", "content": "why?"}]}
    for name, score in (scores or SAMPLES).items():
        row |= {name: f"text of {name}", f"{name}_score": score, f"{name}_scores": {"r": score, "other": -score}}
        row[f"{name}_finish_reason"] = "stop"
    return {**row, **changes}


def order_of(pair):
    return [pair["chosen_from"], *pair["others_from"], pair["rejected_from"]]


def test_the_rest_of_the_samples_stand_between_the_best_and_the_worst_in_the_order_of_their_scores():
    pair = pair_row(scored(), BEST_AND_REST)
    assert order_of(pair) == ["response_2", "response_4", "response_1", "response_3"]
    assert pair["score_others"] == [1.0, 0.5]
    assert pair["gap_others"] == [1.0, 1.5]
    assert pair["reward_gap"] == 3.0
    assert pair["others"] == [[{"role": "assistant", "content": f"text of response_{n}"}] for n in (4, 1)]
    assert pair["others_scores"] == [{"r": 1.0, "other": -1.0}, {"r": 0.5, "other": -0.5}]


def test_what_a_character_costs_counts_for_the_whole_order():
    pair = pair_row(scored(response_4="x" * 100), BEST_AND_REST, length_coef=0.01)
    assert order_of(pair) == ["response_2", "response_1", "response_4", "response_3"]
    # In the loss the scores count as they are.
    assert pair["gap_others"] == [1.5, 1.0]


def test_turns_stand_in_the_order_in_which_they_are_named_or_in_that_of_their_scores():
    named = {"chosen": "response_1", "rejected": "response_4", "others": ["response_3", "response_2"]}
    assert order_of(pair_row(scored(), Pairs(**named))) == ["response_1", "response_3", "response_2", "response_4"]
    by_reward = pair_row(scored(), Pairs(**named, direction="reward"))
    assert order_of(by_reward) == ["response_2", "response_4", "response_1", "response_3"]
    assert (by_reward["reward_gap"], by_reward["gap_others"]) == (3.0, [1.0, 1.5])


def test_an_answer_of_no_use_is_left_out_of_its_group():
    row = scored(response_1="text of response_2 ", response_4_finish_reason="length")
    strict = BEST_AND_REST.model_copy(update={"drop_truncated": "any"})
    assert order_of(pair_row(row, BEST_AND_REST)) == ["response_2", "response_4", "response_3"]
    pair = pair_row(row, strict)
    assert order_of(pair) == ["response_2", "response_3"]
    assert (pair["others"], pair["gap_others"]) == ([], [])


def test_a_group_whose_scores_are_all_the_same_is_dropped():
    pair = sound(pair_row(scored(dict.fromkeys(SAMPLES, 1.0)), BEST_AND_REST), BEST_AND_REST)
    assert pair["dropped"] == "all answers of the group have the same score"


def test_noise_turns_a_whole_order_round():
    pair = exchanged(pair_row(scored(), BEST_AND_REST))
    assert order_of(pair) == ["response_3", "response_1", "response_4", "response_2"]
    assert (pair["reward_gap"], pair["gap_others"]) == (-3.0, [-1.5, -2.0])
    assert exchanged(pair) == pair_row(scored(), BEST_AND_REST)


def test_rows_without_others_have_no_column_of_a_group():
    assert not [name for name in pair_row(scored(), Pairs(chosen="best", rejected="worst")) if "others" in name]


def test_all_answers_of_a_group_are_scored():
    from rdpo.config.task import Turn

    turns = [Turn(name="response", samples=3), Turn(name="draft"), Turn(name="revision", after="draft", user="x")]
    wanted = answers_of(Pairs(chosen="revision", rejected="draft", others="rest"), turns)
    assert wanted == ["revision", "draft", "response_1", "response_2", "response_3"]
    with pytest.raises(InputError, match="there is no answer `nothing`"):
        answers_of(Pairs(chosen="revision", rejected="draft", others=["nothing"]), turns)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"others": "rest", "also": [{"chosen": "a", "rejected": "b"}]}, "remove one of the two"),
        ({"others": []}, "names no answer"),
        ({"others": ["revision"]}, "each answer of a group is named once"),
    ],
)
def test_groups_that_cannot_be_are_refused(table, said):
    with pytest.raises(ValueError, match=said):
        Pairs(**table)


def test_how_large_groups_are_is_counted():
    rows = [pair_row(scored(), BEST_AND_REST), pair_row(scored({"response_1": 1.0, "response_2": 0.0}), BEST_AND_REST)]
    assert count_answers([table_of(rows), pa.table({"prompt": ["x"]})]) == {"2": 1, "4": 1}


PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8]]
SIDES = [[[5, 6], [7, 8, 9], [10], [3, 4, 5, 6]], [[10], [11, 12], [13, 14, 15], [9]]]
OTHERS = [[[20, 21], [22]], [], [[23, 24, 25]], [[26], [27, 28], [29, 30, 31]]]


def test_a_packed_row_holds_a_prompt_once_for_any_number_of_answers():
    batch = packed_batch(PROMPTS[:2], [side[:2] for side in SIDES], OTHERS[:2])
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 6, 10, 20, 21, 22, 4, 7, 8, 9, 11, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 3, 4, 3, 0, 1, 2, 3, 1, 2]]
    assert batch.labels.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 20, 21, 22]
    assert batch.lengths.tolist() == [2, 3, 1, 2, 2, 1]


def test_sequences_of_groups_do_not_depend_on_the_layout():
    packed, padded = (make(PROMPTS, SIDES, OTHERS) for make in (packed_batch, padded_batch))
    for name in ("labels", "sequence", "lengths"):
        assert torch.equal(getattr(packed, name), getattr(padded, name)), name
    assert len(padded.input_ids) == 2 * 4 + 6


def test_without_others_a_batch_is_that_of_pairs():
    for make in (packed_batch, padded_batch):
        pairs, groups = make(PROMPTS, SIDES), make(PROMPTS, SIDES, [[]] * 4)
        assert torch.equal(pairs.input_ids, groups.input_ids)
        assert torch.equal(pairs.predict_at, groups.predict_at)


def test_packed_groups_are_padded_groups_in_value_and_gradient(tiny_model):
    found = {}
    for layout in ("packed", "padded"):
        policy = load_policy(tiny_model, ForwardSettings(dtype="float32", chunk=16, layout=layout))
        logps = policy(policy.batch(PROMPTS, *SIDES, others=OTHERS))
        (logps * torch.arange(1, len(logps) + 1)).sum().backward()
        found[layout] = logps.detach(), [weight.grad for weight in policy.parameters()]
    torch.testing.assert_close(found["packed"][0], found["padded"][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["packed"][1], found["padded"][1], atol=1e-4, rtol=1e-3)


def test_the_sizes_of_a_group_count_its_prompt_once():
    size = PairSize(600, 100, 90, (80, 70))
    assert (size.packed, size.tokens, size.longest) == (940, 940 + 3 * 600, 700)
    assert batch_tokens([size], packed=True) == 940
    assert batch_tokens([size, PairSize(10, 5, 5)], packed=False) == 6 * 700
    batches = micro_batches([0, 1], [size, PairSize(10, 5, 5)], 950, packed=True)
    assert [batch.pairs for batch in batches] == [(0,), (1,)]


def rows_of_reference(count=4, others=(0, 1, 3, 0)):
    rows = []
    for index in range(count):
        between = [[90 + place, 40 + index] for place in range(others[index])]
        rows.append(
            {
                ID_COLUMN: f"p{index}",
                "prompt_ids": [10 + index, 20, 30],
                "chosen_ids": [40, 50 + index],
                "rejected_ids": [60, 70, 80 + index],
                "reference_chosen_logps": -11.0,
                "reference_rejected_logps": -16.0,
                "reward_gap": 0.5,
                "others_ids": between,
                "reference_others_logps": [-12.0 - place for place in range(others[index])],
                "gap_others": [0.1 * (place + 1) for place in range(others[index])],
            }
        )
    return pa.Table.from_pylist(rows)


@pytest.mark.usefixtures("process_group")
class TestSteps:
    def test_groups_of_two_train_as_pairs_to_the_last_bit(self, tiny_model, tmp_path):
        groups = rows_of_reference(others=(0, 0, 0, 0))
        pairs = groups.drop_columns(["others_ids", "reference_others_logps", "gap_others"])
        trainers = [trainer_of(tiny_model, tmp_path, PairTable.of(rows), PlainBackend) for rows in (groups, pairs)]
        histories = [[one.step(index, 9, [0, 1, 2, 3]) for index in range(3)] for one in trainers]
        ignored = {"seconds", "tokens_per_second", "tflops_per_worker", "peak_memory_gib"}
        kept = [[{k: v for k, v in step.items() if k not in ignored} for step in steps] for steps in histories]
        assert kept[0] == kept[1]
        states = [one.engine.gathered_state() for one in trainers]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    @pytest.mark.parametrize("loss", ["dpo", "plackett_luce", "infonca", "nca"])
    def test_small_micro_batches_and_padded_rows_give_the_large_packed_batch(self, tiny_model, tmp_path, loss):
        def losses(**settings):
            data = PairTable.of(rows_of_reference())
            trainer = trainer_of(tiny_model, tmp_path, data, PlainBackend, loss=loss, **settings)
            return [trainer.step(index, 9, [0, 1, 2, 3])["loss"] for index in range(3)]

        large = losses()
        assert losses(tokens_per_batch=128, layout="padded") == pytest.approx(large, rel=1e-4)
        assert large[0] > 0

    def test_metrics_of_groups_are_there_and_those_of_pairs_are_not_changed(self, tiny_model, tmp_path):
        trainer = trainer_of(tiny_model, tmp_path, PairTable.of(rows_of_reference()), PlainBackend)
        metrics = trainer.step(0, 9, [0, 1, 2, 3])
        assert 0 <= metrics["groups/accuracies"] <= 1
        assert -1 <= metrics["groups/tau"] <= 1
        pairs = rows_of_reference().drop_columns(["others_ids", "reference_others_logps", "gap_others"])
        plain = trainer_of(tiny_model, tmp_path, PairTable.of(pairs), PlainBackend).step(0, 9, [0, 1, 2, 3])
        assert not [name for name in plain if name.startswith("groups/")]
        assert plain["rewards/margins"] == pytest.approx(metrics["rewards/margins"], rel=1e-5)

    def test_margins_of_held_out_groups_are_those_of_their_best_and_worst(self, tiny_model, tmp_path):
        groups = PairTable.of(rows_of_reference())
        pairs = rows_of_reference().drop_columns(["others_ids", "reference_others_logps", "gap_others"])
        trainer = trainer_of(tiny_model, tmp_path, groups, PlainBackend)
        found = {row[ID_COLUMN]: row["margin"] for row in trainer.margins(groups)}
        alone = {row[ID_COLUMN]: row["margin"] for row in trainer.margins(PairTable.of(pairs))}
        assert found == pytest.approx(alone, rel=1e-5)


def test_the_scale_of_gaps_is_that_of_all_answers():
    assert PairTable.of(rows_of_reference()).gaps == pytest.approx([0.5] * 4 + [0.1, 0.1, 0.2, 0.3])


def test_a_group_that_no_forward_holds_is_refused_before_training(job_table, tmp_path):
    job = Job.model_validate(job_table)
    data = PairTable.of(rows_of_reference())
    check_room(data, job)
    small = job.model_copy(update={"training": job.training.model_copy(update={"tokens_per_batch": 20})})
    with pytest.raises(InputError, match=r"tokens_per_batch = 20: the 5 answers of the group p2 have \d+ tokens"):
        check_room(data, small)


def tokenized(tiny_model, tmp_path, rows, **reference):
    table = valid_job(tiny_model, tmp_path)
    table["reference"] |= reference
    return Reference(Job.model_validate(table))(table_of(rows)).to_pylist()


def group(**changes):
    pair = pair_row(scored(), BEST_AND_REST)
    return {**pair, **changes}


def test_every_answer_of_a_group_has_its_tokens_and_log_prob(tiny_model, tmp_path):
    pair = pair_row(scored(), Pairs(chosen="best", rejected="worst"))
    between = ("response_4", "response_1")
    lone = {name: pair_row(scored(), Pairs(chosen=name, rejected="response_3")) for name in between}
    rows = tokenized(tiny_model, tmp_path, [group(), group(**{ID_COLUMN: "q", "others": []})])
    assert [row["dropped"] for row in rows] == [None, None]
    first, second = rows
    assert second["others_ids"] is None
    [expected] = tokenized(tiny_model, tmp_path, [pair])
    for side in ("chosen", "rejected"):
        assert first[f"{side}_ids"] == expected[f"{side}_ids"]
        assert first[f"reference_{side}_logps"] == pytest.approx(expected[f"reference_{side}_logps"], abs=1e-4)
    for place, name in enumerate(between):
        [single] = tokenized(tiny_model, tmp_path, [lone[name]])
        assert first["others_ids"][place] == single["chosen_ids"]
        assert first["reference_others_logps"][place] == pytest.approx(single["reference_chosen_logps"], abs=1e-4)
    assert "others_scores" not in first


@pytest.mark.parametrize(
    ("changes", "limit", "said"),
    [
        ({"others": [[{"role": "assistant", "content": "x" * 90}], []]}, 80, "longer than reference.max_length"),
        ({"others": [[{"role": "assistant", "content": "text of response_2"}]] * 2}, 256, "have the same tokens"),
    ],
)
def test_a_group_with_an_answer_that_cannot_be_trained_on_is_dropped(tiny_model, tmp_path, changes, limit, said):
    if changes["others"][1] == []:
        changes["others"][1] = [{"role": "assistant", "content": "y"}]
    [row] = tokenized(tiny_model, tmp_path, [group(**changes)], max_length=limit, tokens_per_batch=1024)
    assert said in row["dropped"]


def test_log_probs_of_a_group_are_taken_from_another_run_where_all_are_known(tiny_model, tmp_path):
    [row] = tokenized(tiny_model, tmp_path, [group()])
    known = known_logps([pa.Table.from_pylist([row])])
    assert len(known) == 4
    bare = {**row, "reference_chosen_logps": None, "reference_rejected_logps": None, "reference_others_logps": None}
    assert recalled(bare, known)["reference_others_logps"] == row["reference_others_logps"]
    del known[next(key for key, value in known.items() if value == row["reference_others_logps"][1])]
    assert recalled(bare, known)["reference_chosen_logps"] is None


def test_a_column_named_like_one_of_a_group_belongs_to_none():
    row = {"others": [["a"], ["b"]], "score_others": [1.0, 0.0], "nothers": [1], "others_from": None}
    assert others_of(row) == [{"others": ["a"], "score_others": 1.0}, {"others": ["b"], "score_others": 0.0}]
    assert others_of({"chosen": []}) == []


def test_groups_are_made_of_a_block_of_rows(job_table):
    made = {"chosen": "best", "rejected": "worst", "others": "rest", "drop_truncated": "any"}
    table = {**job_table, "pairs": made}
    task = job_table["synthesis"]["task"]
    table["synthesis"] = {**job_table["synthesis"], "task": None} if task else job_table["synthesis"]
    job = Job.model_validate(table)
    cut = {f"response_{number}_finish_reason": "length" for number in (1, 2, 3)}
    rows = pairs_table(table_of([scored(), scored(**cut, **{ID_COLUMN: "q"})]), job).to_pylist()
    assert rows[0]["dropped"] is None
    assert rows[1]["dropped"] == "fewer usable samples than pairs.min_samples"


@pytest.fixture
def run_with_groups(job_table, tmp_path):
    """A run whose pairs stage holds two groups and a pair."""
    from rdpo.execution.reader import JOB_FILE
    from rdpo.files.folder import Folder
    from tests.support.made_up import commit

    table = {**job_table, "pairs": {"chosen": "best", "rejected": "worst", "others": "rest"}}
    from rdpo.config import job_of, to_toml

    Folder(str(tmp_path / "run")).write_bytes(JOB_FILE, to_toml(job_of(table, "test")).encode())
    rows = [scored(**{ID_COLUMN: name}) for name in "ab"] + [scored({"response_1": 1.0, "response_2": 0.0})]
    commit(tmp_path / "run", "pairs", [pair_row(row, BEST_AND_REST) | {"heldout": False} for row in rows])
    return str(tmp_path / "run")


def test_groups_are_exported_as_pairs_of_the_best_with_each_other_one(run_with_groups, tmp_path):
    from datasets import load_dataset

    from rdpo.inspection.export import export

    export(run_with_groups, "pairs", str(tmp_path / "pairs"))
    rows = load_dataset(str(tmp_path / "pairs"), cache_dir=str(tmp_path / "cache"))["train"].to_list()
    first = [row for row in rows if row[ID_COLUMN].startswith("a")]
    assert len(rows) == 3 + 3 + 1
    assert [row["rejected_from"] for row in first] == ["response_3", "response_4", "response_1"]
    assert {row["chosen"][0]["content"] for row in first} == {"text of response_2"}
    assert [row["reward_gap"] for row in first] == [3.0, 1.0, 1.5]
    assert [row["score_rejected"] for row in first] == [-1.0, 1.0, 0.5]
    assert len({row[ID_COLUMN] for row in rows}) == 7
    assert "others" not in rows[0]


def test_groups_are_exported_as_they_are(run_with_groups, tmp_path):
    import pyarrow.parquet as pq

    from rdpo.inspection.export import export

    assert export(run_with_groups, "groups", str(tmp_path / "groups")) == [
        f"3 groups -> {tmp_path / 'groups' / 'train.parquet'}"
    ]
    rows = {row[ID_COLUMN]: row for row in pq.read_table(tmp_path / "groups" / "train.parquet").to_pylist()}
    assert rows["a"]["scores"] == [2.0, 1.0, 0.5, -1.0]
    assert [answer[0]["content"] for answer in rows["p"]["answers"]] == ["text of response_1", "text of response_2"]


def test_a_group_is_shown_answer_by_answer(run_with_groups, capsys):
    from rdpo.inspection.show import show_rows

    show_rows(run_with_groups, "pairs", "a", 1, False)
    shown = capsys.readouterr().out
    for name in SAMPLES:
        assert f"text of {name}" in shown


def test_pairs_are_not_exported_as_groups(job_table, tmp_path):
    from rdpo.inspection.export import export
    from tests.support.made_up import made_up_run

    with pytest.raises(InputError, match=r"holds pairs, no groups \(`pairs.others`\)"):
        export(made_up_run(tmp_path / "run", job_table), "groups", str(tmp_path / "groups"))
