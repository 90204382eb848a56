"""Plans on their way from rank 0, each told by what differs from the one before: 256 sequences that go on cost a quarter."""

import marshal
from dataclasses import replace

from lmi_dist.plan import MARSHAL_VERSION, Chunk, Plan


class PlanWriter:
    """Writes one plan after the other. Of a decode that continues the last plan's, in the same table, only the token is told."""

    def __init__(self) -> None:
        self._last: dict[int, Chunk] = {}  # decodes of the last plan by sequence

    def write(self, plan: Plan) -> bytes:
        last, decodes = self._last.get, plan.decodes
        # the scheduler makes a new table when anything in it changes; all else of a sequence stays
        fresh = [c for c in decodes if (p := last(c.sequence)) is None or c.table is not p.table or c.start != p.start + 1]
        self._last = {chunk.sequence: chunk for chunk in decodes}
        rest = replace(plan, decodes=tuple(fresh)).to_bytes()
        return marshal.dumps(([c.sequence for c in decodes], [c.token_ids[0] for c in decodes], rest), MARSHAL_VERSION)


class PlanReader:
    """Reads what a PlanWriter wrote, all of it and in order. Only for bytes of our own rank 0: marshal trusts what it reads."""

    def __init__(self) -> None:
        self._last: dict[int, Chunk] = {}

    def read(self, data: bytes | memoryview) -> Plan:
        sequences, tokens, rest = marshal.loads(data)
        plan = Plan.of_bytes(rest)
        fresh = {chunk.sequence: chunk for chunk in plan.decodes}
        last = self._last
        decodes = tuple([fresh.get(s) or _continue(last[s], token) for s, token in zip(sequences, tokens, strict=True)])
        self._last = {chunk.sequence: chunk for chunk in decodes}
        return replace(plan, decodes=decodes)


def _continue(last: Chunk, token: int) -> Chunk:
    return Chunk(
        last.sequence,
        (token,),
        last.start + 1,
        last.table,
        last.prompt_length,
        last.num_outputs,
        last.adapter,
        last.cross_table,
        last.cross_length,
    )
