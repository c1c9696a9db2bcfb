"""Drafts from a small model with the same vocabulary.

Its sampler runs with the parameters, the seed and the positions of the request itself. Sampling is
an argmax over logits plus noise that hangs on (seed, position, token), so where both models nearly
agree they take the same token at every temperature, not only at 0.

Each sequence that is drafted for owns a slot: a fixed run of pages of the draft's own pool. With
more sequences than slots, the one that was not drafted for longest loses its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from aios_compile.runtime.batch import Executor
from aios_compile.runtime.batch_builder import BatchBuilder
from aios_compile.runtime.request import Sequence
from aios_compile.runtime.schedule_state import Chunk, Plan, SequenceState


@dataclass
class _Slot:
    """A sequence as the draft model sees it: tokens of the request, then its own guesses."""

    pages: list[int]
    shadow: Sequence
    num_computed: int = 0
    num_certain: int = 0  # tokens of the request when it was looked at last; guesses follow

    @property
    def num_behind(self) -> int:
        return len(self.shadow.tokens) - self.num_computed

    def follow(self, real: Sequence) -> None:
        """Drop guesses that did not come true, take in the tokens that did."""
        ours, tokens = self.shadow.tokens, real.tokens
        same = min(len(ours), len(tokens))
        for place in range(min(max(real.num_prompt_tokens, self.num_certain), same), same):
            if ours[place] != tokens[place]:
                same = place
                break
        self._cut(same)
        for token_id in tokens[same:]:
            self.guess(token_id)
        self.num_certain = len(tokens)

    def guess(self, token_id: int) -> None:
        self.shadow.tokens.append(token_id)
        if self.shadow.penalties is not None:
            self.shadow.penalties.add(token_id)

    def _cut(self, length: int) -> None:
        for token_id in reversed(self.shadow.tokens[length:]):
            if self.shadow.penalties is not None:
                self.shadow.penalties.remove(token_id)
        del self.shadow.tokens[length:]
        # the last token is computed again if need be: the next one is sampled from it
        self.num_computed = min(self.num_computed, length - 1)


class DraftModel:
    """The proposer of method "draft_model". Uses the executor from the engine's thread alone."""

    def __init__(self, executor: Executor) -> None:
        limits = self._limits = executor.limits
        self._executor = executor
        self._builder = BatchBuilder(limits)
        width = -(-limits.max_model_len // limits.page_size)
        count = (limits.num_pages - 1) // width
        self._free = [list(range(1 + i * width, 1 + (i + 1) * width)) for i in range(count)]
        self._slots: OrderedDict[int, _Slot] = OrderedDict()  # least recently used first
        self.num_slots = count
        # no more at once than have a slot each: nobody loses the one it has just got
        self._most = min(count, limits.max_running)
        self.num_steps = 0

    def propose(self, wanted: Seq[tuple[Sequence, int]]) -> list[list[int]]:
        """Return drafts; none for a sequence without a slot, or whose prompt is not computed yet.

        One step brings those up to date that are behind; each further one adds a draft to all.
        """
        drafts: list[list[int]] = [[] for _ in wanted]
        active: list[tuple[int, _Slot]] = []
        for i, (sequence, count) in enumerate(wanted[: self._most]):
            slot = self._slot_of(sequence, count)
            if slot is not None:
                active.append((i, slot))
        while active:
            sampled = self._step([slot for _, slot in active])
            following = []
            for (i, slot), token_id in zip(active, sampled):
                if token_id is None:
                    continue  # its prompt needs more steps than one
                drafts[i].append(token_id)
                slot.guess(token_id)
                if len(drafts[i]) < wanted[i][1]:
                    following.append((i, slot))
            active = following
        return drafts

    def forget(self, sequence_id: int) -> None:
        slot = self._slots.pop(sequence_id, None)
        if slot is not None:
            self._free.append(slot.pages)

    def _slot_of(self, sequence: Sequence, count: int) -> _Slot | None:
        if len(sequence.tokens) + count > self._limits.max_model_len:
            return None  # the draft model's context is shorter than the target's
        slot = self._slots.get(sequence.sequence_id)
        if slot is None:
            if not self._free and self._slots:
                self.forget(next(iter(self._slots)))
            if not self._free:
                return None
            shadow = Sequence(sequence.admitted, sequence.index, None)
            shadow.sequence_id, shadow.seed = sequence.sequence_id, sequence.seed
            slot = self._slots[sequence.sequence_id] = _Slot(self._free.pop(), shadow)
        self._slots.move_to_end(sequence.sequence_id)
        slot.follow(sequence)
        return slot

    def _step(self, slots: Seq[_Slot]) -> list[int | None]:
        """Run one step; return each slot's next token, None if its prompt is not through yet."""
        plan, states, ends = Plan(), {}, []
        room = self._limits.max_num_batched_tokens
        for place, slot in enumerate(slots):
            after = len(slots) - place - 1  # each of the others needs a token
            size = min(slot.num_behind, room - plan.num_tokens - after)
            samples = size == slot.num_behind
            shadow = slot.shadow
            states[shadow.sequence_id] = SequenceState(
                sequence_id=shadow.sequence_id,
                request_id=0,
                num_prompt_tokens=shadow.num_prompt_tokens,
                num_tokens=len(shadow.tokens),
                all_rows=False,
                samples=True,
                forks_from=None,
                pages=slot.pages,
                page_epoch=slot.pages[0],  # one run of pages for each epoch: see _slot_of
            )
            plan.chunks.append(Chunk(shadow.sequence_id, slot.num_computed, size, int(samples)))
            plan.num_tokens += size
            plan.num_rows += samples
            slot.num_computed += size
            ends.append(samples)
        batch = self._builder.build(plan, {s.shadow.sequence_id: s.shadow for s in slots}, states)
        tokens = iter(self._executor.step(batch).sampled_ids[: plan.num_rows].tolist())
        self.num_steps += 1
        return [next(tokens) if samples else None for samples in ends]
