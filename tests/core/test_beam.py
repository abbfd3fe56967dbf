"""Beam search by hand, and beside a plain transcription of its rules. Tokens are small numbers, scores are made up."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from quire.core.beam import Beam, BeamSearch, End
from quire.core.beam_groups import end_of
from quire.core.sequence import RequestGroup
from quire.core.step import Candidates
from quire.sampling_params import SamplingParams

EOS = 0


def candidates(scores: dict[int, float]) -> Candidates:
    """Best first, as the device gives them."""
    tokens = sorted(scores, key=lambda token: -scores[token])
    return Candidates(np.asarray(tokens), np.asarray([scores[token] for token in tokens], dtype=np.float32))


def ends(max_tokens: int, *stops: int) -> Callable[[Beam, int], End | None]:
    def end(beam: Beam, token: int) -> End | None:
        if token in stops:
            return "stop", None if token == EOS else token
        return ("length", None) if beam.length + 1 >= max_tokens else None

    return end


def search(width: int = 2, max_tokens: int = 10, **options) -> BeamSearch:
    return BeamSearch(width, num_end_tokens=1, max_tokens=max_tokens, **options)


def tokens_of(beams: Sequence[Beam]) -> list[list[int]]:
    return [beam.token_ids() for beam in beams]


def told(one: BeamSearch) -> list[tuple[list[int], float]]:
    return [(hypothesis.beam.token_ids(), float(hypothesis.score)) for hypothesis in one.finished]


class TestByHand:
    def test_one_beam_becomes_as_many_as_the_width(self) -> None:
        one = search(3)
        found = one.advance([candidates({5: -1.0, 6: -2.0, 7: -3.0, 8: -4.0})], ends(10, EOS))
        assert [survivor.parent for survivor in found] == [0, 0, 0]
        assert tokens_of(one.live) == [[5], [6], [7]]
        assert [float(beam.score) for beam in one.live] == [-1.0, -2.0, -3.0]

    def test_beams_are_ranked_together_whatever_their_parent(self) -> None:
        """-1-1.5 = -2.5 and -2-0.25 = -2.25 go on; -1-3 = -4 and -2-9 do not."""
        one = search(2)
        one.advance([candidates({5: -1.0, 6: -2.0})], ends(10))
        found = one.advance([candidates({5: -1.5, 6: -3.0}), candidates({5: -0.25, 6: -9.0})], ends(10))
        assert [(survivor.parent, survivor.beam.token) for survivor in found] == [(1, 5), (0, 5)]
        assert tokens_of(one.live) == [[6, 5], [5, 5]]

    def test_one_that_ends_above_the_width_is_a_hypothesis_and_another_takes_its_place(self) -> None:
        one = search(2)
        found = one.advance([candidates({EOS: -0.5, 5: -1.0, 6: -2.0, 7: -3.0})], ends(10, EOS))
        assert tokens_of([survivor.beam for survivor in found]) == [[5], [6]]
        assert told(one) == [([EOS], -0.5)]

    def test_one_that_ends_below_the_width_is_lost(self) -> None:
        """Rank 2, where only ranks 0 and 1 may finish."""
        one = search(2)
        one.advance([candidates({5: -0.5, 6: -1.0, EOS: -2.0})], ends(10, EOS))
        assert one.finished == []
        assert tokens_of(one.live) == [[5], [6]]

    def test_several_ends_leave_a_full_width(self) -> None:
        """With three end tokens (1 + 3) * 2 candidates are ranked: six may end, and two still go on."""
        one = BeamSearch(2, num_end_tokens=3, max_tokens=9)
        assert one.num_ranked == 8
        scores = {0: -0.1, 1: -0.2, 2: -0.3, 5: -0.4, 6: -0.5}
        one.advance([candidates(scores)], ends(9, 0, 1, 2))
        assert tokens_of(one.live) == [[5], [6]]
        assert [tokens for tokens, _ in told(one)] == [[0], [1]]  # 2 has rank 2

    @pytest.mark.parametrize(("penalty", "best"), [(0.0, [EOS]), (1.0, [5, 5, EOS]), (-1.0, [EOS])])
    def test_scores_are_normalized_by_length(self, penalty: float, best: list[int]) -> None:
        """[EOS] adds up to -1, [5, 5, EOS] to -1.5: / 1 and / 3 with penalty 1, times 1 and 3 with penalty -1."""
        one = search(1, length_penalty=penalty, early_stopping="never", max_tokens=3)
        one.width, one.num_ranked = 2, 4
        step = candidates({5: -0.5, EOS: -1.0, 6: -5.0, 7: -6.0})
        low = candidates({5: -9.0, EOS: -20.0, 6: -9.5, 7: -9.6})
        one.advance([step], ends(3, EOS))
        one.advance([candidates({5: -0.5, EOS: -30.0, 6: -31.0}), low], ends(3, EOS))
        one.advance([candidates({EOS: -0.5, 5: -30.0, 6: -31.0}), low], ends(3, EOS))
        assert told(one)[0][0] == best
        by_tokens = {tuple(tokens): score for tokens, score in told(one)}
        assert by_tokens[(EOS,)] == -1.0
        assert by_tokens[(5, 5, EOS)] == pytest.approx(-1.5 / 3**penalty)

    def test_the_best_hypotheses_stay_and_of_equal_ones_the_older(self) -> None:
        one = search(1, early_stopping="never", length_penalty=0.0)
        one.advance([candidates({EOS: -1.0, 5: -1.0})], ends(10, EOS))
        assert told(one) == [([EOS], -1.0)]
        assert one.is_done  # the live one has -1.0 too, and can get no better

    def test_what_is_banned_is_no_candidate(self) -> None:
        one = search(3)
        banned = -np.inf
        found = one.advance([candidates({5: -1.0, 6: banned, 7: banned, EOS: banned})], ends(10, EOS))
        assert tokens_of(one.live) == [[5]]  # fewer than the width
        assert len(found) == 1
        found = one.advance([candidates({5: -1.0, 6: -2.0, 7: -2.5, EOS: banned})], ends(10, EOS))
        assert tokens_of(one.live) == [[5, 5], [5, 6], [5, 7]]  # and full again

    def test_nothing_allowed_ends_it_without_a_hypothesis(self) -> None:
        one = search(2)
        assert one.advance([candidates({5: -np.inf, 6: -np.inf})], ends(10)) == []
        assert one.is_done
        assert one.best(2) == []

    def test_not_a_number_is_no_candidate(self) -> None:
        one = search(2)
        found = Candidates(np.asarray([5, 6]), np.asarray([np.nan, -1.0], dtype=np.float32))
        one.advance([found], ends(10))
        assert tokens_of(one.live) == [[6]]

    def test_the_longest_answers_end_all(self) -> None:
        one = search(2, max_tokens=2)
        one.advance([candidates({5: -1.0, 6: -2.0, 7: -3.0, 8: -4.0})], ends(2))
        step = candidates({5: -1.0, 6: -2.0, 7: -3.0, 8: -4.0})
        assert one.advance([step, step], ends(2)) == []
        assert one.is_done
        assert told(one) == [([5, 5], -1.0), ([5, 6], -1.5)]  # of -3 and -3, the first
        assert [hypothesis.reason for hypothesis in one.finished] == ["length"] * 2

    def test_scores_are_added_in_float32(self) -> None:
        one = search(1)
        total = np.float32(0)
        for score in (-0.1, -16777216.0, -0.3):
            one.advance([candidates({5: score, 6: score - 5})], ends(10))
            total = np.float32(np.float32(score) + total)
        assert one.live[0].score == total and isinstance(one.live[0].score, np.float32)

    def test_infos_follow_their_tokens(self) -> None:
        one = search(1)
        for i in range(3):
            found = candidates({5 + i: -1.0, 9: -5.0})
            found.logprobs, found.ranks = np.asarray([-1.0 - i, -5.0]), np.asarray([1, 2])
            found.top_ids, found.top_logprobs = np.asarray([5]), np.asarray([-1.0])
            one.advance([found], ends(10))
        infos = one.live[0].infos(last=2)
        assert [info.logprob for info in infos if info] == [-2.0, -3.0]
        assert one.live[0].token_ids(last=2) == [6, 7]
        assert one.live[0].token_ids(last=0) == []
        assert one.live[0].token_ids() == [5, 6, 7]


class TestEarlyStopping:
    """Two hypotheses of length 1 with -2.0 and -2.2 are there; two live beams, the best with -2.3."""

    def started(
        self, rule: bool | str, penalty: float = 1.0, max_tokens: int = 10, best_live: float = -2.3
    ) -> BeamSearch:
        one = BeamSearch(2, num_end_tokens=2, max_tokens=max_tokens, early_stopping=rule, length_penalty=penalty)
        one.advance([candidates({EOS: -2.0, 1: -2.2, 5: best_live, 6: best_live - 1})], ends(max_tokens, EOS, 1))
        return one

    def test_true_ends_as_soon_as_there_are_enough(self) -> None:
        assert self.started(True).is_done
        one = search(2, early_stopping=True)
        one.advance([candidates({EOS: -0.1, 5: -0.2, 6: -0.3})], ends(10, EOS))
        assert not one.is_done  # one of two

    def test_false_ends_when_the_best_live_beam_is_no_better_now(self) -> None:
        assert self.started(False).is_done  # -2.3 against -2.2, though -2.3 / 10 would be better
        assert not self.started(False, best_live=-2.1).is_done

    def test_never_goes_on_while_the_longest_answer_could_be_better(self) -> None:
        assert not self.started("never").is_done  # -2.3 / 10 against -2.2
        assert self.started("never", penalty=0.0).is_done  # nothing gets better by length
        assert self.started("never", penalty=-1.0).is_done
        assert self.started("never", penalty=1.0, max_tokens=10, best_live=-22.5).is_done  # -22.5 / 10 < -2.2

    @pytest.mark.parametrize("rule", [False, "never"])
    def test_a_free_place_is_always_worth_going_on_for(self, rule: bool | str) -> None:
        one = search(2, early_stopping=rule)
        one.advance([candidates({EOS: -0.1, 5: -50.0, 6: -60.0})], ends(10, EOS))
        assert not one.is_done


class TestWhatIsTold:
    def test_settled_is_what_all_share(self) -> None:
        one = search(2)
        assert one.settled().length == 0
        one.advance([candidates({5: -1.0, 6: -2.0})], ends(10, EOS))
        assert one.settled().token_ids() == []
        one.advance([candidates({7: -0.1, 8: -0.2}), candidates({7: -9.0, 8: -9.5})], ends(10, EOS))
        assert tokens_of(one.live) == [[5, 7], [5, 8]]
        assert one.settled().token_ids() == [5]
        one.advance([candidates({7: -0.1, 8: -0.2}), candidates({7: -9.0, 8: -9.5})], ends(10, EOS))
        assert one.settled().token_ids() == [5, 7]

    def test_a_hypothesis_holds_back_what_is_settled(self) -> None:
        """[EOS] may win: nothing is certain while it is among the best."""
        one = search(2, early_stopping="never")
        one.advance([candidates({EOS: -1.0, 5: -1.1, 6: -9.0})], ends(10, EOS))
        one.advance([candidates({7: -0.1, 8: -0.2, 9: -5.0}), candidates({7: -9.0, 8: -9.5})], ends(10, EOS))
        assert tokens_of(one.live) == [[5, 7], [5, 8]]
        assert one.settled().token_ids() == []

    def test_beams_of_equal_tokens_by_different_ways_are_not_one(self) -> None:
        root = Beam()
        one, other = (Beam(Beam(root, 5, 1), token, 2) for token in (6, 7))
        found = search(2)
        found.live = [one, other]
        assert found.settled() is root

    def test_an_aborted_search_gives_its_live_beams_behind_its_hypotheses(self) -> None:
        one = search(2, early_stopping="never")
        one.advance([candidates({EOS: -1.0, 5: -1.1, 6: -9.0})], ends(10, EOS))
        one.advance([candidates({7: -0.1, 8: -0.2}), candidates({7: -9.0, 8: -9.5})], ends(10, EOS))
        best = one.best(2)
        assert [(h.beam.token_ids(), h.reason) for h in best] == [([EOS], "stop"), ([5, 7], "abort")]
        assert float(best[1].score) == pytest.approx(-1.2 / 2)
        assert len(one.best(1)) == 1
        assert len(one.best(9)) == 3

    def test_one_aborted_before_its_first_token_gives_nothing(self) -> None:
        assert search(4).best(4) == []


class TestEndOf:
    def group(self, **params) -> RequestGroup:
        asked = SamplingParams(use_beam_search=True, n=2, **{"max_tokens": 5, **params})
        group = RequestGroup("r", np.asarray([1], dtype=np.int32), asked, seed=0, stop_token_ids=(EOS,))
        group.max_tokens = 5
        return group

    def after(self, count: int) -> Beam:
        beam = Beam()
        for i in range(count):
            beam = Beam(beam, 5, i + 1)
        return beam

    def test_ends_and_their_reasons(self) -> None:
        group = self.group(stop_token_ids=[3])
        assert end_of(group, Beam(), EOS) == ("stop", None)
        assert end_of(group, Beam(), 3) == ("stop", 3)
        assert end_of(group, Beam(), 4) is None
        assert end_of(group, self.after(4), 4) == ("length", None)
        assert end_of(group, self.after(4), EOS) == ("stop", None)

    def test_no_stop_string_within_min_tokens(self) -> None:
        group = self.group(min_tokens=2)
        group.find_stop_string = lambda beam, token: "it" if token == 7 else None
        assert [end_of(group, self.after(i), 7) for i in range(4)] == [None, None, ("stop", "it"), ("stop", "it")]


# -- beside a plain transcription of the rules ---------------------------------------------------------------------------------
@dataclass
class Plain:
    """The rules of quire.core.beam as they are written there, with lists and tuples, and no thought of speed."""

    width: int
    stops: set[int]
    max_tokens: int
    penalty: float
    rule: bool | str
    live: list[tuple[tuple[int, ...], np.float32]] = field(default_factory=lambda: [((), np.float32(0))])
    kept: list[tuple[np.float32, tuple[int, ...]]] = field(default_factory=list)
    is_done: bool = False

    def normal(self, score: np.float32, length: int) -> np.float32:
        return np.float32(score / np.float32(float(length) ** self.penalty))

    def step(self, scores: Callable[[tuple[int, ...]], dict[int, float]]) -> None:
        everything = []
        for tokens, score in self.live:
            for token, more in scores(tokens).items():
                total = np.float32(np.float32(more) + score)
                if total > -np.inf:
                    everything.append((total, (*tokens, token)))
        everything.sort(key=lambda pair: -pair[0])
        ranked = everything[: max(2, 1 + len(self.stops)) * self.width]
        length = len(self.live[0][0]) + 1
        ended = [tokens[-1] in self.stops or length == self.max_tokens for _, tokens in ranked]
        going = [(tokens, total) for (total, tokens), end in zip(ranked, ended) if not end]
        self.live = going[: self.width]
        for (total, tokens), end in list(zip(ranked, ended))[: self.width]:
            if end:
                self.kept.append((self.normal(total, length), tokens))
        self.kept.sort(key=lambda pair: -pair[0])
        del self.kept[self.width :]
        if not self.live:
            self.is_done = True
        elif len(self.kept) == self.width:
            far = self.max_tokens if self.rule == "never" and self.penalty > 0 else length
            self.is_done = self.rule is True or not self.normal(self.live[0][1], far) > self.kept[-1][0]


@pytest.mark.parametrize("seed", range(300))
def test_any_search_is_that_of_the_rules(seed: int) -> None:
    rng = random.Random(seed)
    vocabulary = rng.randint(2, 12)
    stops = set(rng.sample(range(vocabulary), rng.randint(0, min(3, vocabulary - 1))))
    width, max_tokens = rng.randint(1, 6), rng.randint(1, 9)
    penalty, rule = rng.choice([-1.0, 0.0, 0.5, 1.0, 2.0]), rng.choice([True, False, "never"])
    ban = rng.choice([0.0, 0.0, 0.2, 0.6])

    def scores(tokens: tuple[int, ...]) -> dict[int, float]:
        own = random.Random(f"{seed} {tokens}")
        return {token: -np.inf if own.random() < ban else -own.expovariate(0.7) for token in range(vocabulary)}

    def found(beam: Beam) -> Candidates:
        given = candidates(scores(tuple(beam.token_ids())))
        most = one.num_ranked
        return Candidates(given.token_ids[:most], given.scores[:most])

    right = Plain(width, stops, max_tokens, penalty, rule)
    one = BeamSearch(
        width, num_end_tokens=len(stops), max_tokens=max_tokens, length_penalty=penalty, early_stopping=rule
    )
    settled: list[list[int]] = [[]]
    for _ in range(max_tokens):
        before = len(one.live)
        survivors = one.advance([found(beam) for beam in one.live], ends(max_tokens, *stops))
        right.step(scores)
        assert [(tuple(beam.token_ids()), beam.score) for beam in one.live] == right.live
        assert [(h.score, tuple(h.beam.token_ids())) for h in one.finished] == right.kept
        assert one.is_done == right.is_done
        assert all(survivor.parent < before for survivor in survivors)
        if one.is_done:
            break
        settled.append(one.settled().token_ids())
    assert one.is_done
    for earlier, later in itertools.pairwise(settled):
        assert later[: len(earlier)] == earlier
    for hypothesis in one.best(width):  # what was told of it while it ran was right
        assert hypothesis.beam.token_ids()[: len(settled[-1])] == settled[-1]
