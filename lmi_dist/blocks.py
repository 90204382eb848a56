"""Who holds which block of the KV pool, and which blocks can be found again by what they hold. Knows ids, not memory.

A block is free (nobody's), used (some table refers to it) or idle (unreferenced, kept because its keys can be found again).
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from lmi_dist.plan import PlacedImage


class PrefixChain:
    """Names of one sequence's full blocks, computed when first asked for: a block's digest covers salt, adapter, the encoder's
    input and every token and image up to its end, for its keys depend on all of them.
    d[i] = sha256(d[i - 1] + tokens of block i + digests of the images that begin in it).

    `adapter` is a slot: whoever loads other weights into a slot must give its sequences another salt.
    """

    __slots__ = ("_block_size", "_digests", "_images")

    def __init__(
        self,
        block_size: int,
        salt: str,
        adapter: int,
        encoder_ids: Sequence[int] = (),
        images: Sequence[PlacedImage] = (),
    ) -> None:
        self._block_size = block_size
        self._images: dict[int, bytes] = {}  # by block
        for placed in images:
            block = placed.start // block_size
            self._images[block] = self._images.get(block, b"") + placed.image.digest
        # surrogatepass: a salt from JSON may hold half a surrogate pair.
        root = hashlib.sha256(f"{adapter}:{salt}".encode("utf-8", "surrogatepass"))
        if encoder_ids:
            root = hashlib.sha256(root.digest() + array("q", encoder_ids).tobytes())
        self._digests = [root.digest()]

    def digest(self, index: int, token_ids: Sequence[int]) -> bytes:
        """Name of the sequence's block `index`, which must be full. `token_ids` may only grow from one call to the next."""
        digests = self._digests
        while len(digests) <= index + 1:
            first = (len(digests) - 1) * self._block_size
            tokens = array("q", token_ids[first : first + self._block_size])
            images = self._images.get(len(digests) - 1, b"")
            digests.append(hashlib.sha256(digests[-1] + tokens.tobytes() + images).digest())
        return digests[index + 1]

    def cross_digests(self, num_blocks: int) -> list[bytes]:
        """Names of the blocks with the encoder's keys. An encoder reads both ways, so each of them depends on its whole input."""
        return [hashlib.sha256(b"cross %d " % index + self._digests[0]).digest() for index in range(num_blocks)]


class BlockPool:
    """Blocks with reference counts and a prefix cache. Deterministic: the same calls hand out the same blocks.

    `take` and `share` add a reference, `give_back` removes one. A published block stays findable after its last reference has gone,
    until `take` needs it: free blocks go first, then the idle one that was given back longest ago.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks  # digest under which a block can be found
        self._by_name: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: what was given back last is warm
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first; a dict is slow to lose its first key again and again

    @property
    def num_available(self) -> int:
        """Blocks that `take` could hand out now: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Unreferenced blocks that can be found again."""
        return len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def references(self, block: int) -> int:
        """Number of tables that hold this block."""
        return self._references[block]

    def is_findable(self, block: int) -> bool:
        return self._names[block] is not None

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def take(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks for the caller alone; what they held is forgotten. Raises AssertionError when fewer are available."""
        if num_blocks > self.num_available:
            raise AssertionError(f"{num_blocks} blocks taken but only {self.num_available} available; ask num_available first")
        return tuple([self._take_one() for _ in range(num_blocks)])

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference for each of these findable blocks."""
        for block in blocks:
            if self._references[block] == 0:
                del self._idle[block]
            self._references[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """One reference less for each. Last first, so that of a prefix its end is evicted before its beginning."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._retire(block)

    def find(self, chain: PrefixChain, token_ids: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        """The longest run of findable blocks that holds the first tokens, at most `num_tokens` of them. Takes no reference."""
        found: list[int] = []
        for index in range(num_tokens // self.block_size):
            block = self._by_name.get(chain.digest(index, token_ids))
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def find_all(self, digests: Iterable[bytes]) -> tuple[int, ...]:
        """The blocks of these names if each can be found, else none. Takes no reference."""
        found = [self._by_name.get(digest) for digest in digests]
        return () if None in found else tuple(block for block in found if block is not None)

    def num_unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of these are idle, so that sharing them makes so many fewer available."""
        return sum(1 for block in blocks if self._references[block] == 0)

    def publish(self, block: int, digest: bytes) -> None:
        """Make a used block findable. If an equal one is findable already, that one stays so and this one remains as it is."""
        if digest not in self._by_name:
            self._names[block] = digest
            self._by_name[digest] = block

    def _take_one(self) -> int:
        block = self._free.pop() if self._free else self._evict()
        self._references[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        name = self._names[block]
        assert name is not None, f"idle block {block} has no name"
        del self._by_name[name]
        self._names[block] = None
        return block

    def _retire(self, block: int) -> None:
        if self._names[block] is None:
            self._free.append(block)
        else:
            self._idle[block] = None
