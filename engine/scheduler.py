"""The policy: which tokens of which sequences the next step computes.

Knows requests, slots, blocks and the token budget. Knows no tensors, text, clocks or processes.

A step is filled in this order, under one budget of `max_batched_tokens`, of which prompts get what
`pace` leaves them beside decodes:

 1. Every decoding sequence gets its one token. If no block is free for it, the sequence that was
    admitted last gives all of its blocks back and waits again (preemption by recompute). What is
    left of the step's first rows is shared out among drafts (`speculation`), which preempt nobody.
 2. Prompts get what is left, in the order that `turns` says: one chunk of each that was admitted
    before and holds all its blocks since, and of waiting ones, which are admitted now. The longest
    cached prefix is taken, never the last token, whose logits are needed. One block is left for
    each running sequence: the next decodes shall not preempt a newcomer.

A step may be scheduled while the one before it is in flight: a decode's next row then computes a
token that only the device knows. If it ends the sequence, what the row samples is dropped.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

import msgspec

from .accounts import Accounts
from .batch_limits import check_limits
from .block_pool import BlockPool
from .chunks import Chunks, fixed_chunks
from .errors import DuplicateRequest, InvalidField
from .messages import EngineStatistics, FinishReason, Output, Submit
from .pace import Pace
from .sequence import Sampled, Sequence, SequenceState, sequences_of
from .speculation import Speculation
from .step import Growth, Row, Step, StepResult
from .turns import Turns


class Scheduler:
    """`num_blocks` of `block_size` tokens; sequences of at most `context_len` tokens."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        context_len: int,
        eos_token_ids: list[int],
        max_num_seqs: int,
        max_batched_tokens: int,
        prefix_cache: bool = True,
        speculative: str = "off",
        max_decode_slowdown: float = 0.0,
        max_overtaking: float = 0.0,
        deterministic: bool = False,
    ) -> None:
        """`deterministic`: steps are such that a sequence's tokens depend on nothing but itself."""
        check_limits(max_num_seqs, max_batched_tokens, num_blocks, block_size, context_len)
        self._pool = BlockPool(num_blocks)
        self._block_size = block_size
        self._context_len = context_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_batched_tokens = max_batched_tokens
        self._prefix_cache = prefix_cache
        self._speculation = Speculation(speculative, context_len, max_batched_tokens)
        self._chunks = Chunks(0, block_size)
        if deterministic:
            self._chunks = fixed_chunks(max_num_seqs, max_batched_tokens, block_size)
        self._pace = Pace(0.0 if deterministic else max_decode_slowdown)
        self._turns = Turns(max_overtaking)
        self._requests: dict[str, list[Sequence]] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._released_slots: list[int] = []
        self._ended: list[Output] = []
        self._num_in_flight = 0
        self._must_land = False
        self.accounts = Accounts()

    def add(self, submit: Submit) -> None:
        """Queues the request's n sequences. Raises DuplicateRequest or InvalidField."""
        if submit.request_id in self._requests:
            raise DuplicateRequest(f"request {submit.request_id} is still live")
        num_prompt_tokens = len(submit.prompt_ids)
        if not 0 < num_prompt_tokens <= self._context_len - 1:
            limit = f"a prompt has 1 to {self._context_len - 1} tokens here"
            raise InvalidField("prompt", num_prompt_tokens, limit)
        if not self._prefix_cache:
            # The n samples of one request still share its prompt; nobody else finds it.
            submit = msgspec.structs.replace(submit, cache_salt=submit.request_id)
        sequences = sequences_of(submit, self._eos_token_ids)
        num_found = len(self._found_prefix(sequences[0])) * self._block_size
        self._turns.arrive(sequences, num_prompt_tokens - num_found)
        self._requests[submit.request_id] = sequences
        self._waiting.extend(sequences)

    def abort(self, request_id: str, index: int | None = None) -> bool:
        """Ends the request, or its one sample `index`, whatever its state.

        Blocks are free now, or after the step in flight. Idempotent: False when nothing was live.
        """
        sequences = self._requests.get(request_id, [])
        ended = [s for s in sequences if index is None or s.index == index]
        for sequence in ended:
            self._end(sequence, FinishReason.ABORTED)
        return bool(ended)

    def take_ended(self) -> list[Output]:
        """Terminal records of sequences that ended outside `apply`."""
        ended, self._ended = self._ended, []
        return ended

    @property
    def has_work(self) -> bool:
        return bool(self._requests) or bool(self._ended)

    def live_request_ids(self) -> list[str]:
        return list(self._requests)

    @property
    def may_run_ahead(self) -> bool:
        """Whether a step can be scheduled before the one in flight is over.

        Guesses need to know a sequence's tokens, and so does preemption, which gives them back.
        """
        return not self._must_land and not self._speculation.is_on

    def schedule(self) -> Step | None:
        """The next step, or None when nothing can be computed, or not before another is over."""
        step = Step(self.accounts.num_steps, released=self._released_slots)
        self._released_slots = []
        self._must_land = False
        self._schedule_decodes(step)
        if self._speculation.has_room(len(step.rows)):
            self._add_drafts(step)
        self._add_prompts(step)
        if not step.rows:
            self._released_slots = step.released
            return None
        self.accounts.num_steps += 1
        self._num_in_flight += 1
        return step

    def _prompt_budget(self, step: Step, num_prompts: int) -> int:
        waiting = islice(self._waiting, len(self._free_slots))
        num_prompts += sum(s.may_start for s in waiting)
        room = self._max_batched_tokens - step.num_tokens
        return self._pace.prompt_budget(step.num_tokens, num_prompts, room)

    def took(self, step: Step, spent_s: float) -> None:
        """How long the step kept others waiting: what later steps go by."""
        # A decode's row samples after each of its tokens, a prompt's after the last one at most.
        num_decodes = sum(r.num_tokens for r in step.rows if r.num_sampled == r.num_tokens)
        self._pace.learn(num_decodes, step.num_tokens - num_decodes, spent_s)

    def _schedule_decodes(self, step: Step) -> None:
        for sequence in [s for s in self._running if s.is_decoding]:
            if sequence.goes_on(self._context_len) and self._make_room(sequence, step):
                self._add_row(step, sequence, 1)

    def _make_room(self, sequence: Sequence, step: Step) -> bool:
        """A block for its newest token. False: it was preempted, or others in flight would be."""
        num_tokens = sequence.num_tokens + sequence.num_awaited
        num_needed = self._num_blocks_of(num_tokens) - len(sequence.block_ids)
        if num_needed <= 0:
            return True
        while self._pool.num_free < num_needed:
            if self._num_in_flight:
                self._must_land = True
                return False
            victim = self._running[-1]
            self._preempt(victim, step)
            if victim is sequence:
                return False
        self._grow(sequence, num_needed, step)
        return True

    def _grow(self, sequence: Sequence, num_blocks: int, step: Step) -> None:
        block_ids = self._pool.allocate(num_blocks)
        step.grown.append(Growth(sequence.slot, len(sequence.block_ids), block_ids))
        sequence.block_ids += block_ids

    def _preempt(self, victim: Sequence, step: Step) -> None:
        # Decodes run oldest first, so the youngest running sequence has no row in this step yet.
        self._running.remove(victim)
        step.released.append(victim.slot)
        self._free_slots.append(victim.slot)
        self._give_back(victim)
        victim.state = SequenceState.PREEMPTED
        self._waiting.appendleft(victim)
        self.accounts.num_preemptions += 1

    def _add_drafts(self, step: Step) -> None:
        by_slot = {s.slot: s for s in self._running}
        sequences = [by_slot[row.slot] for row in step.rows]
        self._speculation.propose(sequences)
        for row, sequence in zip(step.rows, sequences, strict=True):
            self._make_room_for_drafts(sequence, step)
            if sequence.draft_ids:
                step.drafted.append(sequence.add_drafts(row))

    def _make_room_for_drafts(self, sequence: Sequence, step: Step) -> None:
        """Gives them blocks that no next decode may need, and cuts them to the room there is."""
        num_tokens = sequence.num_tokens + len(sequence.draft_ids)
        num_needed = self._num_blocks_of(num_tokens) - len(sequence.block_ids)
        if num_needed > 0 and num_needed + len(self._running) <= self._pool.num_free:
            self._grow(sequence, num_needed, step)
        room = len(sequence.block_ids) * self._block_size - sequence.num_tokens
        sequence.draft_ids = sequence.draft_ids[:room]

    def _add_prompts(self, step: Step) -> None:
        prompts = [s for s in self._running if s.is_prefilling]
        budget = self._prompt_budget(step, len(prompts))
        may_admit = budget > 0 and bool(self._free_slots)
        waiting = [s for s in self._waiting if s.may_start] if may_admit else []
        computed = []
        for sequence in self._turns.ordered(prompts + waiting):
            if budget <= 0:
                break
            if sequence.state is not SequenceState.RUNNING:
                # What is behind one that does not fit is longer, or would take from it.
                may_admit = may_admit and bool(self._free_slots) and self._admit(sequence, step)
                if not may_admit:
                    continue
                self._waiting.remove(sequence)
            num_tokens = self._add_row(step, sequence, budget)
            budget -= num_tokens
            computed.append((sequence, num_tokens))
        self._turns.count(computed, [*prompts, *self._waiting])

    def _admit(self, sequence: Sequence, step: Step) -> bool:
        """Gives the sequence a slot and blocks for all of its tokens, or changes nothing."""
        prefix, num_tokens = self._found_prefix(sequence), sequence.num_tokens
        if self._chunks.are_fixed:
            # It must not be preempted: what decodes gave would be computed again in longer rows.
            num_tokens += sequence.num_tokens_left(self._context_len)
        num_new = self._num_blocks_of(num_tokens) - len(prefix)
        if num_new + len(self._running) > self._pool.num_free_after_holding(prefix):
            return False
        self._pool.hold(prefix)
        sequence.block_ids = prefix + self._pool.allocate(num_new)
        sequence.num_computed = len(prefix) * self._block_size
        sequence.num_published = len(prefix)
        sequence.slot = self._free_slots.pop()
        sequence.state = SequenceState.RUNNING
        self._running.append(sequence)
        self.accounts.count_prefix(sequence.num_tokens, sequence.num_computed)
        if sequence.num_cached_tokens < 0:
            sequence.num_cached_tokens = sequence.num_computed
        step.admitted.append(sequence.admission())
        step.grown.append(Growth(sequence.slot, 0, list(sequence.block_ids)))
        return True

    def _found_prefix(self, sequence: Sequence) -> list[int]:
        num_findable = self._chunks.num_shared_blocks(sequence.num_tokens - 1)
        prefix = self._pool.find_prefix(sequence.hashes(num_findable, self._block_size))
        return prefix[: self._chunks.num_shared_blocks(len(prefix) * self._block_size)]

    def _add_row(self, step: Step, sequence: Sequence, budget: int) -> int:
        start = sequence.num_computed + sequence.num_flying
        num_tokens = self._chunks.num_tokens(start, sequence.num_uncomputed, budget)
        if num_tokens == 0:
            return 0
        num_sampled = int(num_tokens == sequence.num_uncomputed)
        row = Row(sequence.slot, start, num_tokens, num_sampled)
        step.rows.append(row)
        sequence.take_off(row)
        return num_tokens

    def apply(self, step: Step, result: StepResult, scheduled_s: float) -> list[Output]:
        """Takes what the step of `scheduled_s` brought.

        One Output per sequence that gained a token or ended.
        """
        self._num_in_flight -= 1
        by_slot = {s.slot: s for s in self._running if s.is_in_flight}
        samples = zip(result.token_ids, result.logprobs, strict=True)
        outputs = []
        for row in step.rows:
            sampled = list(islice(samples, row.num_sampled))
            output = self._take_row(by_slot[row.slot], row, sampled, scheduled_s)
            if output is not None:
                outputs.append(output)
        self._sweep()
        return self.take_ended() + outputs

    def _take_row(
        self, sequence: Sequence, row: Row, sampled: list[Sampled], scheduled_s: float
    ) -> Output | None:
        sequence.land(row)
        sequence.first_scheduled_s = sequence.first_scheduled_s or scheduled_s
        self.accounts.num_computed_tokens += row.num_tokens
        draft_ids, sequence.draft_ids = sequence.draft_ids, []
        num_kept, output = row.num_tokens - len(draft_ids), None
        if sampled and sequence.state is SequenceState.RUNNING:
            if draft_ids:
                sampled = self._speculation.judge(sequence, draft_ids, sampled)
            output = sequence.take(sampled, self._context_len)
            num_kept += max(0, len(output.token_ids) - 1)
        self._advance(sequence, num_kept)
        if output is not None and output.finish_reason is not FinishReason.NONE:
            self._retire(sequence)
        return output

    def fail(self, step: Step, reason: str) -> list[Output]:
        """The step could not be computed: its sequences end, all others go on."""
        self._num_in_flight -= 1
        by_slot = {s.slot: s for s in self._running if s.is_in_flight}
        for row in step.rows:
            sequence = by_slot[row.slot]
            sequence.land(row)
            sequence.draft_ids = []
            if sequence.state is SequenceState.RUNNING:
                self._end(sequence, FinishReason.ERROR, reason)
        self._sweep()
        return self.take_ended()

    def _advance(self, sequence: Sequence, num_tokens: int) -> None:
        # What a row computed after a token that was dropped belongs to nobody.
        sequence.num_computed = min(sequence.num_computed + num_tokens, sequence.num_tokens)
        num_full = sequence.num_computed // self._block_size
        if self._chunks.are_fixed:
            num_full = min(num_full, self._chunks.num_shared_blocks(sequence.num_prompt_tokens))
        if num_full > sequence.num_published:
            hashes = sequence.hashes(num_full, self._block_size)
            for i in range(sequence.num_published, num_full):
                self._pool.publish(sequence.block_ids[i], hashes[i])
            sequence.num_published = num_full

    def _end(self, sequence: Sequence, reason: FinishReason, error: str = "") -> None:
        output = Output(sequence.request_id, sequence.index, [], reason, error=error)
        if sequence.num_output_tokens == 0:
            output.num_cached_tokens = max(0, sequence.num_cached_tokens)
            output.first_scheduled_s = sequence.first_scheduled_s
        self._ended.append(output)
        self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        """The sequence is over. Blocks that a step in flight still writes wait for `apply`."""
        if sequence.state in (SequenceState.WAITING, SequenceState.PREEMPTED):
            self._waiting.remove(sequence)
        sequence.state = SequenceState.ENDED
        siblings = self._requests[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request_id]
        if not sequence.is_in_flight:
            self._sweep()

    def _sweep(self) -> None:
        """Takes slot and blocks from running sequences that ended and are not in flight."""
        over = [s for s in self._running if s.state is SequenceState.ENDED and not s.is_in_flight]
        for sequence in over:
            self._running.remove(sequence)
            self._released_slots.append(sequence.slot)
            self._free_slots.append(sequence.slot)
            self._give_back(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.slot = -1
        sequence.num_computed = 0
        sequence.num_published = 0

    def _num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def statistics(self) -> EngineStatistics:
        blocks = self._pool.statistics()
        return EngineStatistics(
            len(self._running),
            len(self._waiting),
            blocks.num_blocks,
            blocks.num_held,
            blocks.num_cached,
            num_drafted_tokens=self._speculation.num_drafted_tokens,
            num_accepted_tokens=self._speculation.num_accepted_tokens,
            **msgspec.structs.asdict(self.accounts),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError when slots, blocks, queues and requests do not agree."""
        self._pool.check_integrity()
        slots = [s.slot for s in self._running]
        assert len({*slots, *self._free_slots}) == len(slots) + len(self._free_slots)
        assert all(s.slot == -1 and not s.block_ids for s in self._waiting)
        for s in self._running:
            assert s.num_computed + s.num_flying <= len(s.block_ids) * self._block_size
            assert s.is_in_flight or s.num_flying == s.num_awaited == 0
            assert s.num_published * self._block_size <= s.num_computed
        references = sum(len(s.block_ids) for s in self._running)
        assert references == self._pool.num_references, "a block is held by nobody"
        queued = [s for s in self._running if s.state is SequenceState.RUNNING]
        live = [s for group in self._requests.values() for s in group]
        assert sorted(map(id, live)) == sorted(map(id, [*queued, *self._waiting]))
