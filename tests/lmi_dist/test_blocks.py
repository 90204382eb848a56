"""BlockPool and PrefixChain: references, what can be found again, and what is forgotten first."""

import pytest

from lmi_dist.blocks import BlockPool, PrefixChain

TOKENS = list(range(100, 140))


def chain(salt: str = "", adapter: int = -1) -> PrefixChain:
    return PrefixChain(4, salt, adapter)


def publish(pool: BlockPool, blocks: tuple[int, ...], names: PrefixChain, tokens: list[int] = TOKENS) -> None:
    for index, block in enumerate(blocks):
        pool.publish(block, names.digest(index, tokens))


def test_blocks_go_to_one_owner() -> None:
    pool = BlockPool(5, 4)

    taken = pool.take(3) + pool.take(2)

    assert sorted(taken) == [0, 1, 2, 3, 4]
    assert (pool.num_available, pool.num_used) == (0, 5)


def test_taking_too_many_is_refused() -> None:
    pool = BlockPool(2, 4)

    with pytest.raises(AssertionError, match="3 blocks taken but only 2 available"):
        pool.take(3)

    assert pool.num_available == 2


def test_unpublished_blocks_become_free() -> None:
    pool = BlockPool(3, 4)

    pool.give_back(pool.take(3))

    assert (pool.num_available, pool.num_idle, pool.num_used) == (3, 0, 0)


def test_published_blocks_are_found_again() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.take(3)
    publish(pool, blocks, chain())

    pool.give_back(blocks)

    assert pool.find(chain(), TOKENS, 12) == blocks
    assert (pool.num_available, pool.num_idle) == (4, 3)


def test_only_full_blocks_are_found() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.take(3)
    publish(pool, blocks, chain())

    assert pool.find(chain(), TOKENS, 11) == blocks[:2]
    assert pool.find(chain(), TOKENS, 3) == ()


def test_finding_stops_at_first_difference() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.take(3)
    publish(pool, blocks, chain())

    other = [*TOKENS[:4], 0, *TOKENS[5:]]

    assert pool.find(chain(), other, 12) == blocks[:1]


@pytest.mark.parametrize("names", [chain(salt="other"), chain(adapter=0), chain(salt="\ud800")])
def test_salt_and_adapter_keep_apart(names: PrefixChain) -> None:
    pool = BlockPool(4, 4)
    publish(pool, pool.take(1), chain())

    assert pool.find(names, TOKENS, 4) == ()


def test_shared_block_stays_until_last() -> None:
    pool = BlockPool(1, 4)
    blocks = pool.take(1)
    publish(pool, blocks, chain())

    pool.share(blocks)
    pool.give_back(blocks)

    assert (pool.references(blocks[0]), pool.num_available) == (1, 0)


def test_sharing_wakes_idle_blocks() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.take(2)
    publish(pool, blocks, chain())
    pool.give_back(blocks)

    assert pool.num_unreferenced(blocks) == 2
    pool.share(blocks)

    assert (pool.num_unreferenced(blocks), pool.num_available, pool.num_idle) == (0, 0, 0)


def test_equal_block_is_published_once() -> None:
    pool = BlockPool(2, 4)
    first, second = pool.take(1), pool.take(1)

    publish(pool, first, chain())
    publish(pool, second, chain())
    pool.give_back(first + second)

    assert pool.find(chain(), TOKENS, 4) == first
    assert not pool.is_findable(second[0])
    assert (pool.num_available, pool.num_idle) == (2, 1)


def test_free_blocks_go_before_idle() -> None:
    pool = BlockPool(2, 4)
    kept = pool.take(1)
    publish(pool, kept, chain())
    pool.give_back(kept)

    taken = pool.take(1)

    assert taken != kept
    assert pool.find(chain(), TOKENS, 4) == kept


def test_least_recently_used_goes_first() -> None:
    pool = BlockPool(2, 4)
    old, new = pool.take(1), pool.take(1)
    publish(pool, old, chain("old"))
    publish(pool, new, chain("new"))
    pool.give_back(old)
    pool.give_back(new)
    pool.share(old)  # used once more: now `new` is the older one
    pool.give_back(old)

    pool.take(1)

    assert pool.find(chain("old"), TOKENS, 4) == old
    assert pool.find(chain("new"), TOKENS, 4) == ()


def test_prefix_loses_its_end_first() -> None:
    pool = BlockPool(3, 4)
    blocks = pool.take(3)
    publish(pool, blocks, chain())
    pool.give_back(blocks)

    pool.take(1)

    assert pool.find(chain(), TOKENS, 12) == blocks[:2]


def test_evicted_block_carries_new_name() -> None:
    pool = BlockPool(1, 4)
    block = pool.take(1)
    publish(pool, block, chain("old"))
    pool.give_back(block)

    assert pool.take(1) == block
    assert not pool.is_findable(block[0])
    publish(pool, block, chain("new"))

    assert pool.find(chain("old"), TOKENS, 4) == ()
    assert pool.find(chain("new"), TOKENS, 4) == block


def test_undone_take_hands_out_same() -> None:
    pool = BlockPool(6, 4)
    idle = pool.take(2)
    publish(pool, idle, chain())
    pool.give_back(idle)

    first = pool.take(6)
    pool.give_back(first)

    assert pool.take(6) == first


def test_digest_covers_all_before() -> None:
    changed = [0, *TOKENS[1:]]

    assert chain().digest(1, TOKENS) == chain().digest(1, TOKENS[:8])
    assert chain().digest(1, TOKENS) != chain().digest(1, changed)
    assert chain().digest(0, TOKENS) != chain().digest(1, TOKENS[:4] * 2)
    assert chain().digest(0, [2**40] * 4) != chain().digest(0, [0] * 4)


def test_digests_follow_growing_text() -> None:
    names = chain()
    text = TOKENS[:4]
    first = names.digest(0, text)
    text += TOKENS[4:8]

    assert names.digest(1, text) == chain().digest(1, TOKENS)
    assert names.digest(0, text) == first


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for_rounds_up(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(1, 4).blocks_for(num_tokens) == num_blocks
