"""Tokens that weigh more or less: which ones, in policy and reference alike, and never where nothing is compared."""

import pytest
import torch

from rdpo.config import Job, TokenWeights
from rdpo.modeling.masking import masked
from rdpo.modeling.readers import PolicyReader
from rdpo.modeling.student import frozen_student, student_forward
from rdpo.modeling.token_weights import pair_weights
from rdpo.stages import reference
from tests.support.jobs import valid_job

DDPO, LD = TokenWeights(kind="ddpo", weight=5.0), TokenWeights(kind="ld_dpo", weight=0.25)
PROMPTS = [[1, 2, 3], [4, 5]]
CHOSEN, REJECTED = [[10, 11, 12, 13], [20, 21]], [[10, 15, 12], [20, 21, 22, 23]]


def test_ddpo_weighs_what_a_revision_has_changed():
    assert pair_weights([10, 11, 12, 13], [10, 15, 12], DDPO) == ([1.0, 5.0, 1.0, 5.0], [1.0, 5.0, 1.0])
    assert pair_weights([1, 2], [1, 2], DDPO) == ([1.0, 1.0], [1.0, 1.0])
    assert pair_weights([1, 2], [3], DDPO) == ([5.0, 5.0], [5.0])


def test_ddpo_looks_at_long_answers_token_by_token():
    # difflib by itself takes frequent elements of long sequences for junk.
    common = [7] * 300
    assert pair_weights([*common, 1], [*common, 2], DDPO) == ([*[1.0] * 300, 5.0], [*[1.0] * 300, 5.0])


def test_ld_dpo_weighs_what_the_longer_answer_has_more():
    assert pair_weights([1, 2, 3, 4], [5, 6], LD) == ([1.0, 1.0, 0.25, 0.25], [1.0, 1.0])
    assert pair_weights([1], [5, 6], LD) == ([1.0], [1.0, 0.25])


def test_tokens_that_do_not_count_have_no_weight():
    assert pair_weights([*masked([9, 9]), 1, 2], [*masked([9]), 1, 3], DDPO) == ([1.0, 5.0], [1.0, 5.0])


def job_with(tiny_model, tmp_path, weights):
    table = valid_job(tiny_model, tmp_path)
    table["training"] |= {"token_weights": weights.model_dump()} if weights else {}
    return Job.model_validate(table)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("weights", [DDPO, LD])
def test_a_log_prob_is_the_weighted_sum_of_its_tokens(tiny_model, tmp_path, layout, weights):
    job = job_with(tiny_model, tmp_path, weights)
    job = job.model_copy(update={"training": job.training.model_copy(update={"layout": layout})})
    policy = student_forward(job).eval()
    batch = policy.batch(PROMPTS, CHOSEN, REJECTED)
    single = policy.token_logps(batch)
    expected = []
    for column, answers in enumerate((CHOSEN, REJECTED)):
        for place, ids in enumerate(answers):
            own = pair_weights(CHOSEN[place], REJECTED[place], weights)[column]
            logps = single[batch.sequence == 2 * column + place]
            expected.append(sum(w * logp for w, logp in zip(own, logps.tolist(), strict=True)))
            assert len(ids) == len(own)
    assert policy(batch).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_reference_weighs_as_training_does_and_is_compared_with_its_logits_before(tiny_model, tmp_path):
    job = job_with(tiny_model, tmp_path, DDPO)
    policy, read_as = frozen_student(job).open("cpu")
    assert read_as.packable
    reader = PolicyReader(policy, read_as, "cpu", 1024)
    found = reader(PROMPTS, CHOSEN, REJECTED)
    trained = student_forward(job, to_train=True).eval()
    with torch.no_grad():
        logps = trained(trained.batch(PROMPTS, CHOSEN, REJECTED)).chunk(2)
    torch.testing.assert_close(torch.tensor(found), torch.stack(logps), atol=1e-4, rtol=1e-4)
    plain = PolicyReader(frozen_student(job_with(tiny_model, tmp_path, None)).open("cpu")[0], read_as, "cpu", 1024)
    assert found != plain(PROMPTS, CHOSEN, REJECTED)
    # A lone answer, as of KL, has nothing that it could be compared with.
    assert reader(PROMPTS, CHOSEN) == plain(PROMPTS, CHOSEN)


def test_the_reference_is_made_again_for_other_weights_and_not_for_none(tiny_model, tmp_path):
    plain, first, second = (
        reference.settings(job_with(tiny_model, tmp_path, weights))
        for weights in (None, DDPO, DDPO.model_copy(update={"weight": 2.0}))
    )
    assert "token_weights" not in plain
    assert first != second


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("training", "token_weights", DDPO.model_dump()), ("pairs", "others", "rest")],
)
def test_the_policys_weight_of_pairs_is_refused_where_it_is_not_defined(tiny_model, tmp_path, section, field, value):
    table = valid_job(tiny_model, tmp_path)
    table["pairs"] = {"chosen": "best", "rejected": "worst"}
    table["training"]["policy_weight"] = "wpo"
    Job.model_validate(table)
    table[section][field] = value
    with pytest.raises(ValueError, match="policy_weight weighs pairs whose tokens all count alike"):
        Job.model_validate(table)


def test_weights_and_groups_are_refused_together(tiny_model, tmp_path):
    table = valid_job(tiny_model, tmp_path)
    table["training"]["token_weights"] = {"kind": "ddpo", "weight": 5.0}
    table["pairs"] = {"chosen": "best", "rejected": "worst", "others": "rest"}
    with pytest.raises(ValueError, match="token_weights compare the two answers of a pair"):
        Job.model_validate(table)
