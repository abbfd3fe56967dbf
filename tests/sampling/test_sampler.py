"""The sampler against exact distributions, against transformers' logits processors, and against itself in other batches."""

import numpy as np
import pytest
import torch

from quire.sampling import Sampler, SamplingState
from quire.sampling.logprobs import prompt_logprobs
from quire.sampling_params import SamplingParams

MAX_LEN = 64
EOS = 2


def sample(logits, params_list, *, seeds=None, prompt_len=4, positions=None, known=None, bad_words=(), order=None):
    """One entry for each of params_list; logits [M, V]. Rows are spread over a larger state, to tell rows from entries."""
    num, vocab_size = logits.shape
    state = SamplingState(3 * num + 1, vocab_size)
    token_ids = torch.full((3 * num + 1, MAX_LEN), vocab_size - 1, dtype=torch.int32)
    rows = np.arange(num) * 3 + 1
    positions = np.full(num, 8) if positions is None else np.asarray(positions)
    for i, params in enumerate(params_list):
        seed = i if seeds is None else seeds[i]
        state.set_row(
            int(rows[i]),
            params,
            seed,
            branch=0,
            prompt_len=prompt_len,
            eos_token_ids=[EOS],
            bad_words_token_ids=bad_words,
        )
        if known is not None:
            token_ids[rows[i], : len(known[i])] = torch.as_tensor(known[i], dtype=torch.int32)
    order = np.arange(num) if order is None else np.asarray(order)
    before = logits.clone()
    output = Sampler().sample(logits[order], state, rows[order], positions[order], token_ids)
    assert torch.equal(before.nan_to_num(7.0), logits.nan_to_num(7.0))
    return output


def chi_square_ok(tokens, probs):
    """Five sigma around the mean of chi-square, tokens expected fewer than five times lumped together."""
    expected = probs * len(tokens)
    count = np.bincount(tokens, minlength=len(probs)).astype(float)
    assert (count[probs == 0] == 0).all()
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    count = np.append(count[~rare], count[rare].sum())
    expected, count = expected[expected > 0], count[expected > 0]
    dof = max(1, len(expected) - 1)
    return ((count - expected) ** 2 / expected).sum() < dof + 5 * np.sqrt(2 * dof) + 5


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The exact distribution in float64, written apart from the sampler."""
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    ranked = np.argsort(-p, kind="stable")
    if top_k:
        p[ranked[top_k:]] = 0
    p /= p.sum()
    before = np.cumsum(p[ranked]) - p[ranked]
    p[ranked[before >= top_p]] = 0
    return p / p.sum()


CASES = [
    {}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.7, "temperature": 1.5}, {"min_p": 0.02, "top_k": 30, "top_p": 0.9}, {"top_k": 10**6},
]  # fmt: skip


@pytest.mark.parametrize("kwargs", CASES, ids=str)
def test_draws_follow_the_exact_distribution(kwargs):
    logits = torch.randn(300, generator=torch.Generator().manual_seed(1)) * 2
    num = 20_000
    state = SamplingState(1, 300)
    state.set_row(0, SamplingParams(**kwargs), seed=5, branch=0, prompt_len=0)
    token_ids = torch.zeros(1, num, dtype=torch.int32)
    output = Sampler().sample(logits.expand(num, -1), state, np.zeros(num, np.int64), np.arange(num), token_ids)
    assert output.errors == []
    assert output.logprobs is None
    assert chi_square_ok(output.token_ids_M.numpy(), filtered(logits.numpy(), **kwargs))


MIX = [
    {}, {"temperature": 0.0}, {"temperature": 0.7, "logprobs": 3}, {"top_k": 5}, {"top_p": 0.9, "repetition_penalty": 1.3},
    {"min_p": 0.1, "logit_bias": {5: 3.0}}, {"frequency_penalty": 1.0, "presence_penalty": 0.5, "temperature": 0.0},
    {"allowed_token_ids": [3, 4, 5, 700], "logprobs": 0}, {"min_tokens": 9, "stop_token_ids": [7]}, {"top_k": 40, "top_p": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("vocab_size", [1000, 49152])
def test_a_draw_does_not_depend_on_the_batch(vocab_size):
    generator = torch.Generator().manual_seed(3)
    num = 30
    params = [SamplingParams(**MIX[i % len(MIX)]) for i in range(num)]
    logits = torch.randn(num, vocab_size, generator=generator) * 2
    known = torch.randint(0, vocab_size, (num, 40), generator=generator)
    positions = torch.randint(5, 40, (num,), generator=generator).numpy()
    logits[11] = torch.nan
    common = {"positions": positions, "known": known, "bad_words": [[1], [2, 3]]}
    whole = sample(logits, params, **common)
    order = np.random.default_rng(0).permutation(num)
    shuffled = sample(logits, params, order=order, **common)
    alone = [sample(logits, params, order=[i], **common) for i in range(num)]
    pairs = [sample(logits, params, order=[i, (i + 7) % num], **common) for i in range(num)]
    assert [i for i, _ in whole.errors] == [11]
    for i in range(num):
        token = int(whole.token_ids_M[i])
        at = int(np.flatnonzero(order == i)[0])
        assert token == shuffled.token_ids_M[at] == alone[i].token_ids_M[0] == pairs[i].token_ids_M[0]
        if whole.logprobs[i] is not None and i != 11:
            for other in (shuffled.logprobs[at], alone[i].logprobs[0], pairs[i].logprobs[0]):
                assert all((a == b).all() for a, b in zip(whole.logprobs[i], other))


def test_a_draw_depends_on_seed_branch_and_position_alone():
    logits = torch.zeros(1, 50_000)
    params = SamplingParams()

    def token(seed, branch, position, row):
        state = SamplingState(4, 50_000)
        state.set_row(row, params, seed, branch, 3)
        return int(
            Sampler()
            .sample(
                logits, state, np.array([row], np.int32), np.array([position]), torch.zeros(4, 9, dtype=torch.int32)
            )
            .token_ids_M
        )

    assert token(1, 0, 5, 0) == token(1, 0, 5, 3)
    assert len({token(1, 0, 5, 0), token(2, 0, 5, 0), token(1, 1, 5, 0), token(1, 0, 6, 0), token(-1, 0, 5, 0)}) == 5


def greedy(logits, kwargs, **more):
    """Tokens, greedy unless kwargs say otherwise."""
    return sample(logits, [SamplingParams(**{"temperature": 0.0} | kwargs)] * len(logits), **more).token_ids_M


def edited(logits, params, prompt, output, bad_words=()):
    """The logits after all edits, through the sampler's own path."""
    from quire.sampling.sampler import edit_logits

    state = SamplingState(2, logits.shape[1])
    state.set_row(1, params, 0, 0, len(prompt), [EOS], bad_words)
    token_ids = torch.full((2, MAX_LEN), 9, dtype=torch.int32)
    token_ids[1, : len(prompt) + len(output)] = torch.tensor([*prompt, *output], dtype=torch.int32)
    edited_MV = logits.clone()
    rows = np.array([1])
    edit_logits(edited_MV, state, rows, np.array([len(prompt) + len(output)]), token_ids, state.uses_R[rows])
    return edited_MV


@pytest.fixture
def logits():
    return torch.randn(1, 40, generator=torch.Generator().manual_seed(7)) * 3


PROMPT, OUTPUT = [5, 6, 6, 30], [7, 7, 7, 8, 30]


def test_twins_in_transformers(logits):
    hf = pytest.importorskip("transformers.generation.logits_process")
    ids = torch.tensor([PROMPT + OUTPUT])
    words = [[11], [30, 12], [8, 30, 13], [8, 14], [7, 7, 7, 7, 7, 7, 8, 30, 15]]
    for params, processor in (
        (SamplingParams(repetition_penalty=1.4), hf.RepetitionPenaltyLogitsProcessor(1.4)),
        (SamplingParams(repetition_penalty=0.7), hf.RepetitionPenaltyLogitsProcessor(0.7)),
        (SamplingParams(min_tokens=6), hf.MinNewTokensLengthLogitsProcessor(4, 6, [EOS])),
        (SamplingParams(min_tokens=5), hf.MinNewTokensLengthLogitsProcessor(4, 5, [EOS])),
        (SamplingParams(logit_bias={3: 2.5, 4: -100}), hf.SequenceBiasLogitsProcessor({(3,): 2.5, (4,): -100.0})),
        (SamplingParams(bad_words=["x"]), hf.NoBadWordsLogitsProcessor(words)),
    ):
        ours = edited(logits, params, PROMPT, OUTPUT, words if params.bad_words else ())
        assert torch.allclose(ours, processor(ids, logits.clone()), atol=1e-6), params


@pytest.mark.parametrize(
    "kwargs", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.07}, {"top_k": 12, "top_p": 0.9, "min_p": 0.01}]
)
def test_truncation_keeps_what_transformers_keeps(logits, kwargs):
    hf = pytest.importorskip("transformers.generation.logits_process")
    scores = logits / 0.8
    if "min_p" in kwargs:
        scores = hf.MinPLogitsWarper(kwargs["min_p"])(None, scores)
    if "top_k" in kwargs:
        scores = hf.TopKLogitsWarper(kwargs["top_k"])(None, scores)
    if "top_p" in kwargs:
        scores = hf.TopPLogitsWarper(kwargs["top_p"])(None, scores)
    num = 20_000
    params = SamplingParams(temperature=0.8, **kwargs)
    state = SamplingState(1, 40)
    state.set_row(0, params, 1, 0, 0)
    tokens = Sampler().sample(
        logits.expand(num, -1), state, np.zeros(num, np.int64), np.arange(num), torch.zeros(1, 1, dtype=torch.int32)
    )
    assert chi_square_ok(tokens.token_ids_M.numpy(), scores.softmax(-1)[0].double().numpy())


def test_frequency_and_presence_count_the_output_only(logits):
    ours = edited(logits, SamplingParams(frequency_penalty=0.5, presence_penalty=-0.25), PROMPT, OUTPUT)
    expected = logits.clone()
    for token in set(OUTPUT):
        expected[0, token] -= 0.5 * OUTPUT.count(token) - 0.25
    assert torch.allclose(ours, expected)


def test_penalties_look_at_known_tokens_of_their_own_row_only():
    """Two rows of different lengths in one batch; behind the shorter one lies what an earlier sequence left."""
    logits = torch.zeros(2, 40)
    logits[:, 9] = 0.1
    params = [
        SamplingParams(temperature=0.0, presence_penalty=1.0),
        SamplingParams(temperature=0.0, repetition_penalty=2.0),
    ]
    known = [[1, 1, 1, 1, 3, 9, 9, 9, 9], [1, 1, 1, 1, 3, 9, 9, 9, 9]]
    assert sample(logits, [params[0]] * 2, positions=[5, 9], known=known).token_ids_M.tolist() == [9, 0]
    ten = torch.full((2, 40), -1.0)
    ten[:, 9], ten[:, 3], ten[:, 4] = 1.0, 0.9, 0.6
    # Row 0 knows no 9 yet, row 1 does: its 9 halves to 0.5, its 3 to 0.45, so 4 wins.
    assert sample(ten, [params[1]] * 2, positions=[5, 9], known=known).token_ids_M.tolist() == [9, 4]


def test_edits_apply_in_their_order(logits):
    params = SamplingParams(
        allowed_token_ids=[2, 7, 9], logit_bias={7: 2.0, 1: 50.0}, min_tokens=9, max_tokens=20,
        repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25,
    )  # fmt: skip
    ours = edited(logits, params, PROMPT, OUTPUT, [[9]])
    assert ours.isfinite().nonzero()[:, 1].tolist() == [7]
    biased = float(logits[0, 7]) + 2.0
    assert float(ours[0, 7]) == pytest.approx((biased * 2 if biased < 0 else biased / 2) - 0.5 * 3 - 0.25, abs=1e-5)


def test_stop_tokens_are_banned_until_min_tokens(logits):
    for kwargs, banned in (({}, [EOS, 9]), ({"ignore_eos": True}, [9])):
        params = SamplingParams(min_tokens=6, stop_token_ids=[9], **kwargs)
        assert edited(logits, params, PROMPT, OUTPUT).isinf().nonzero()[:, 1].tolist() == banned
    assert torch.equal(edited(logits, SamplingParams(min_tokens=5, stop_token_ids=[9]), PROMPT, OUTPUT), logits)


def test_two_bad_words_that_end_alike(logits):
    banned = edited(logits, SamplingParams(bad_words=["x"]), PROMPT, OUTPUT, [[30, 3], [29, 3], [28, 4]])
    assert banned.isinf().nonzero()[:, 1].tolist() == [3]
    # One that began in the prompt may be completed, as in vLLM.
    assert torch.equal(edited(logits, SamplingParams(bad_words=["x"]), PROMPT, [], [[30, 3]]), logits)


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.zeros(2, 1000)
    logits[1, [400, 900]] = 1.0
    assert greedy(logits, {}).tolist() == [0, 400]
    for kwargs in (
        {"temperature": 1e-6},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "min_p": 1.0, "top_k": 1},
    ):
        assert greedy(logits, kwargs).tolist() == [0, 400], kwargs


def test_edges():
    alone = torch.full((1, 500), -torch.inf)
    alone[0, 321] = -3e4
    for kwargs in (
        {},
        {"top_p": 0.5},
        {"top_k": 3},
        {"min_p": 0.5},
        {"temperature": 100.0},
        {"temperature": 1e-4},
        {"temperature": 0},
    ):
        output = sample(alone, [SamplingParams(**kwargs)])
        assert (output.token_ids_M.tolist(), output.errors) == ([321], [])
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(1))
    assert sample(logits, [SamplingParams(logit_bias={77: 100.0})]).token_ids_M.tolist() == [77]
    assert sample(logits, [SamplingParams(allowed_token_ids=[77])]).token_ids_M.tolist() == [77]
    empty = sample(logits[:0], [])
    assert (len(empty.token_ids_M), empty.errors, empty.logprobs) == (0, [], None)


@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0.5}])
def test_a_bad_row_harms_only_itself(kwargs):
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    params = [SamplingParams(**kwargs)] * 5
    good = sample(logits, params).token_ids_M
    broken = logits.clone()
    broken[1, 7], broken[3, 9], broken[4] = torch.nan, torch.inf, -torch.inf
    output = sample(broken, params)
    assert [i for i, _ in output.errors] == [1, 3, 4]
    assert all("not finite" in message for _, message in output.errors)
    assert output.token_ids_M[[0, 2]].tolist() == good[[0, 2]].tolist()
    assert output.token_ids_M[[1, 3, 4]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_allowed_is_said_so(temperature):
    params = [
        SamplingParams(temperature=temperature),
        SamplingParams(temperature=temperature, allowed_token_ids=[EOS], min_tokens=16),
    ]
    output = sample(torch.zeros(2, 300), params)
    assert [(i, "no token is allowed" in message) for i, message in output.errors] == [(1, True)]


def test_rows_are_reused_clean():
    state = SamplingState(1, 300)
    logits, row, at = torch.zeros(1, 300), np.array([0]), np.array([4])
    token_ids = torch.zeros(1, MAX_LEN, dtype=torch.int32)
    state.set_row(0, SamplingParams(allowed_token_ids=[7], logprobs=2, repetition_penalty=1.5), 1, 0, 4)
    assert Sampler().sample(logits, state, row, at, token_ids).token_ids_M.tolist() == [7]
    state.clear_row(0)
    assert state.uses_R[0] == 0
    state.set_row(0, SamplingParams(temperature=0.0), 1, 0, 4)
    output = Sampler().sample(logits, state, row, at, token_ids)
    assert (output.token_ids_M.tolist(), output.logprobs) == ([0], None)


def test_logprobs_are_of_the_raw_logits():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(3))
    params = [
        SamplingParams(logprobs=k, temperature=0.3, repetition_penalty=1.9, logit_bias={5: 9.0}) for k in (0, 3, -1)
    ]
    output = sample(logits, [*params, SamplingParams()])
    assert output.logprobs[3] is None
    exact = torch.log_softmax(logits.double(), -1).numpy()
    for i, k in enumerate((0, 3, 300)):
        row = output.logprobs[i]
        token = int(output.token_ids_M[i])
        order = np.argsort(-exact[i])
        assert row.token_ids.tolist() == [token, *order[:k]]
        assert np.allclose(row.logprobs, exact[i][row.token_ids], atol=1e-5)
        assert row.ranks.tolist() == [1 + (exact[i] > exact[i][token]).sum(), *range(1, k + 1)]


@pytest.mark.parametrize("k", [0, 4, -1])
def test_prompt_logprobs_in_pieces(k):
    generator = torch.Generator().manual_seed(4)
    hidden, head = torch.randn(23, 8, generator=generator), torch.randn(8, 60, generator=generator)
    targets = torch.randint(0, 60, (23,), generator=generator)
    sizes = []

    def compute_logits(hidden_nD):
        sizes.append(len(hidden_nD))
        return hidden_nD @ head

    got = prompt_logprobs(hidden, compute_logits, targets, k, piece=10)
    assert sizes == [10, 10, 3]
    exact = torch.log_softmax((hidden @ head).double(), -1).numpy()
    width = 60 if k < 0 else k
    assert got.token_ids.shape == got.logprobs.shape == got.ranks.shape == (23, width + 1)
    assert (got.token_ids[:, 0] == targets.numpy()).all()
    assert np.allclose(got.logprobs, np.take_along_axis(exact, got.token_ids, 1), atol=1e-4)
    assert (got.token_ids[:, 1:] == np.argsort(-exact, 1)[:, :width]).all()
    mine = np.take_along_axis(exact, targets.numpy()[:, None], 1)
    assert (got.ranks[:, 0] == 1 + (exact > mine).sum(1)).all()
    assert prompt_logprobs(hidden[:0], compute_logits, targets[:0], 2).logprobs.shape == (0, 3)
